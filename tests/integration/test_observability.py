"""Metrics and logs of the real services: what is documented is what there is."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from integration.servers import eventually
from integration.stack import Stack, chat, metric, running_stack, stream_chat
from penstock.cli.metric_families import families, ingress_tls

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def ports() -> dict[str, int]:
    return {}


@pytest.fixture(scope="module")
def stack(ports: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(1)
        ports["discovery"] = stack.start_discovery()
        stack.start_scheduler()
        ports["scheduler"] = stack.scheduler_ports[0]
        ports["ingress"] = stack.start_ingress("--workers", "2").admin_port
        config = tmp_path_factory.mktemp("mirror") / "mirror.json"
        config.write_text(json.dumps({"Enable": False}))
        ports["mirror"] = stack.start_mirror(Path(config))
        yield stack


@pytest.fixture
async def session(stack: Stack) -> AsyncIterator[aiohttp.ClientSession]:
    await stack.ready()
    async with aiohttp.ClientSession() as session:
        yield session


async def test_services_export_what_the_reference_lists(
    session: aiohttp.ClientSession, stack: Stack, ports: dict[str, int]
) -> None:
    await chat(session, stack.url, "something to count")
    known, optional = families(), {family.name for family in ingress_tls().declared()}
    for service, port in ports.items():
        async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
            text = await response.text()
        exported = {}
        for family in text_string_to_metric_families(text):
            name = family.name + ("_total" if family.type == "counter" else "")
            exported[name] = family
        listed = {name for name, (_, services) in known.items() if service in services}
        assert listed - optional <= exported.keys() <= listed, service
        for name, family in exported.items():
            described, _ = known[name]
            assert (family.type, family.documentation) == (described.kind, described.help)
            labels = {frozenset(sample.labels.keys() - {"le"}) for sample in family.samples}
            assert labels <= {frozenset(described.label_names)}, name


async def test_a_stream_is_measured_from_the_first_piece_to_the_last(
    session: aiohttp.ClientSession, stack: Stack, ports: dict[str, int]
) -> None:
    port = ports["ingress"]
    before = await metric(session, port, "penstock_ingress_tokens_total")

    async def measured() -> bool:
        # Of eight streams one is; on a busy machine all of it may come in one piece, which has no gaps.
        for number in range(8):
            assert [piece async for piece in stream_chat(session, stack.url, f"{number}", max_tokens=20)]
        return await _counted(session, port, "penstock_ingress_itl_seconds")

    await eventually(measured)
    assert await metric(session, port, "penstock_ingress_tokens_total") >= before
    await eventually(lambda: _counted(session, port, "penstock_bus_ping_seconds"))
    async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
        text = await response.text()
    for name in ("ttft", "itl", "e2e", "schedule"):
        (count,) = re.findall(rf"^penstock_ingress_{name}_seconds_count (\S+)$", text, re.MULTILINE)
        assert float(count) > 0, name
    assert re.search(
        r'^penstock_bus_watch_age_seconds\{bucket="penstock-v1-instances"\} ', text, re.MULTILINE
    )
    assert re.search(r"^penstock_registry_instances 1\.0$", text, re.MULTILINE)


async def _counted(session: aiohttp.ClientSession, port: int, histogram: str) -> bool:
    async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
        return bool(re.search(rf"^{histogram}_count [1-9]", await response.text(), re.MULTILINE))


async def test_logs_are_json_and_name_the_request(session: aiohttp.ClientSession, stack: Stack) -> None:
    _, headers, _ = await chat(session, stack.url, "say something", headers={"x-request-id": "logged-1"})
    assert headers["x-request-id"] == "logged-1"
    process = stack.ingresses[0].process
    await eventually(lambda: process.find('"logged-1"'))
    assert stack.discovery is not None
    for one in (process, stack.discovery, *stack.schedulers, *stack.mirrors):
        lines = [json.loads(line) for line in list(one.lines)]
        assert lines
        assert all({"time", "level", "service", "message"} <= line.keys() for line in lines)
    (line,) = [json.loads(line) for line in list(process.lines) if '"logged-1"' in line]
    assert line.items() >= {"message": "request", "request_id": "logged-1", "status": 200}.items()
    assert "say something" not in process.stderr
