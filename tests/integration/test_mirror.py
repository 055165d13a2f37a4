"""The mirror in a whole stack: hot reload, sharing, hostile shadows, and clients that notice none of it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

from integration.bus_labs import collecting
from integration.servers import eventually
from integration.shadow_server import ShadowServer, drip, hang, shadow_server
from integration.stack import MODEL, Load, Stack, chat, messages, metric, running_stack
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.routing_events import COMPARISON
from penstock.common.settings import BusSettings
from penstock.common.subjects import EVENTS, event_filter
from penstock.common.telemetry import Metrics

pytestmark = pytest.mark.integration


@dataclass
class Lab:
    """A stack with a mirror, the file that it reads, and a shadow."""

    stack: Stack
    config: Path
    shadow: ShadowServer
    session: aiohttp.ClientSession
    mirror_ports: list[int]

    async def mirror(self, **fields: Any) -> None:
        """Configure by writing into the file; returns once the ingress goes by it."""
        value = {"Enable": True, "Target": self.shadow.url, "Ratio": 100, "Timeout": 500, **fields}
        self.config.write_text(json.dumps(value))
        await self.until(value)

    async def until(self, value: dict[str, Any]) -> None:
        """Until copies are made as `value` says: the shadow has one, or nothing is sent any more."""
        active = value["Enable"]
        for port in self.mirror_ports:
            await eventually(lambda: self._metric_is(port, "penstock_mirror_active", active))  # noqa: B023

        async def made() -> bool:
            before = await self.copies()
            await self.ask("is it on?")
            await self.settled()
            return (await self.copies() > before) is active

        await eventually(made)

    async def _metric_is(self, port: int, name: str, value: float) -> bool:
        return await metric(self.session, port, name) == value

    async def ask(self, prompt: str, **headers: str) -> None:
        status, _, _ = await chat(self.session, self.stack.url, prompt, headers=headers)
        assert status == 200

    async def copies(self) -> float:
        """Copies that the ingress made and sent."""
        port = self.stack.ingresses[0].admin_port
        return await metric(self.session, port, "penstock_ingress_mirror_copies_total")

    async def settled(self) -> None:
        """Until the mirrors have dealt with every copy that was sent."""

        async def all_done() -> bool:
            name = "penstock_mirror_copies_total"
            done = [await metric(self.session, port, name) for port in self.mirror_ports]
            return sum(done) >= await self.copies()

        await eventually(all_done)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with lab_of(tmp_path) as lab:
        yield lab


@asynccontextmanager
async def lab_of(folder: Path, mirrors: int = 1, *ingress_flags: str) -> AsyncIterator[Lab]:
    config = folder / "mirror.json"
    with running_stack() as stack:
        async with shadow_server() as shadow, aiohttp.ClientSession() as session:
            stack.start_sims(1)
            stack.start_discovery()
            stack.start_ingress(*ingress_flags)
            ports = [stack.start_mirror(config) for _ in range(mirrors)]
            await stack.ready()
            for port in ports:
                await eventually(lambda: metric(session, port, "penstock_config_synced"))  # noqa: B023
            yield Lab(stack, config, shadow, session, ports)


async def test_on_off_on_by_writing_the_file(lab: Lab) -> None:
    """As the reference's own script does, with the counts that it leaves to a human."""
    await lab.mirror()
    for enabled in (True, False, True):
        await lab.mirror(Enable=enabled)
        before = len(lab.shadow.received)
        for number in range(5):
            await lab.ask(f"request {number}")
        await lab.settled()
        assert len(lab.shadow.received) - before == (5 if enabled else 0)


async def test_a_copy_is_its_request(lab: Lab) -> None:
    await lab.mirror(Authorization="Bearer shadow")
    body = json.dumps({"model": MODEL, "prompt": "é 1", "max_tokens": 2}, indent=3).encode()
    headers = {
        "x-request-id": "req-7",
        "authorization": "Bearer client",
        "cookie": "a=b",
        "x-own": "kept",
        "user-agent": "mine/1",
        "content-type": "application/json",
    }
    url = URL(f"{lab.stack.url}/v1/completions?a=%2F&api_key=secret&b", encoded=True)
    async with lab.session.post(url, data=body, headers=headers) as response:
        assert response.status == 200
    await lab.settled()
    copy = lab.shadow.received[-1]
    assert (copy.method, copy.target, copy.body) == ("POST", "/v1/completions?a=%2F&b", body)
    wanted = {
        "x-request-id": "req-7",
        "authorization": "Bearer shadow",
        "x-own": "kept",
        "user-agent": "mine/1",
    }
    assert {name: copy.headers.get(name) for name in wanted} == wanted
    assert "cookie" not in copy.headers


async def test_a_mounted_config_map_is_followed(lab: Lab) -> None:
    """Its files are links to `..data`, a link that Kubernetes turns to another folder."""

    def swap(version: int, value: dict[str, Any]) -> None:
        folder = lab.config.parent / f"..{version}"
        folder.mkdir()
        (folder / "mirror.json").write_text(json.dumps(value))
        fresh = lab.config.parent / "..data_tmp"
        fresh.symlink_to(folder.name)
        os.rename(fresh, lab.config.parent / "..data")

    on = {"Enable": True, "Target": lab.shadow.url, "Ratio": 100}
    swap(1, on)
    lab.config.symlink_to(Path("..data") / "mirror.json")
    await lab.until(on)
    swap(2, on | {"Enable": False})
    await lab.until(on | {"Enable": False})
    swap(3, on)
    await lab.until(on)


async def test_what_an_admin_writes_counts_until_it_is_deleted(lab: Lab) -> None:
    admin = f"{lab.stack.ingresses[0].admin_url}/admin/api/mirror"
    on = {"Enable": True, "Target": lab.shadow.url, "Ratio": 100}

    async def source() -> str:
        async with lab.session.get(admin) as response:
            return str((await response.json())["origin"])

    await lab.mirror()
    assert await source() == "file"
    async with lab.session.put(admin, json={"Enable": False}) as response:
        assert response.status == 200
    await lab.until({"Enable": False})
    # The file changes and does not count, until it does.
    lab.config.write_text(json.dumps(on | {"Ratio": 99.5}))
    await lab.until({"Enable": False})
    assert await source() == "admin"
    async with lab.session.delete(admin) as response:
        assert response.status == 200
    await lab.until(on)
    assert await source() == "file"


async def test_two_replicas_share_the_copies_and_no_copy_is_sent_twice(tmp_path: Path) -> None:
    async with lab_of(tmp_path, 2) as lab:
        await lab.mirror()
        async with Load([lab.stack.url]) as load:
            await load.answers(300)
            await load.stop()
            assert load.failures == []
        await lab.settled()
        copies = [copy.headers["x-penstock-mirror"] for copy in lab.shadow.received]
        assert len(copies) == len(set(copies)) == await lab.copies()
        shares = [
            await metric(lab.session, port, "penstock_mirror_copies_total") for port in lab.mirror_ports
        ]
        assert min(shares) > 0
        # What one replica leaves undone when it is killed is what it had in hand, and no more.
        lab.stack.mirrors[0].kill()
        before = len(lab.shadow.received)
        await lab.ask("one is left")
        await eventually(lambda: len(lab.shadow.received) > before)


async def test_whatever_the_shadow_does_clients_are_answered(lab: Lab) -> None:
    for shadow in ("hangs", "never ends", "refuses", "talks nonsense", "redirects"):
        await answered_beside(lab, shadow)


async def answered_beside(lab: Lab, shadow: str) -> None:
    nonsense = await asyncio.start_server(_talk_nonsense, "127.0.0.1", 0)
    await lab.mirror()
    match shadow:
        case "hangs":
            lab.shadow.answer = hang
        case "never ends":
            lab.shadow.answer = drip
        case "refuses":
            await lab.mirror(Target="http://127.0.0.1:9")
        case "talks nonsense":
            await lab.mirror(Target=f"http://127.0.0.1:{nonsense.sockets[0].getsockname()[1]}")
        case "redirects":
            lab.shadow.answer = _redirect
    async with Load([lab.stack.url]) as load:
        await load.answers(200)
        await load.stop()
        assert load.failures == []
    await lab.settled()
    port = lab.mirror_ports[0]
    assert await metric(lab.session, port, "penstock_mirror_under_way") == 0
    assert not any(copy.target == "/elsewhere" for copy in lab.shadow.received)
    lab.shadow.answer = None
    before = len(lab.shadow.received)
    await lab.mirror()

    async def copied_again() -> bool:
        await lab.ask("well again?")
        return len(lab.shadow.received) > before

    await eventually(copied_again)
    nonsense.close()


async def _talk_nonsense(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\xff\x00 HTTP/9 \r\n" * 1000)
    writer.close()


async def _redirect(request: aiohttp.web.Request) -> aiohttp.web.StreamResponse:
    raise aiohttp.web.HTTPTemporaryRedirect("/elsewhere")


async def test_without_the_mirror_and_without_the_bus_clients_are_answered(lab: Lab) -> None:
    await lab.mirror()
    async with Load([lab.stack.url]) as load:
        await load.answers(50)
        lab.stack.mirrors[0].kill()
        await load.answers(50)
        lab.stack.nats.kill()
        await load.answers(50)
        lab.stack.nats.restart(keep_store=False)
        lab.mirror_ports = [lab.stack.start_mirror(lab.config)]
        await load.answers(50)
        before = len(lab.shadow.received)
        # Copies flow again by themselves.
        await eventually(lambda: len(lab.shadow.received) > before)
        await load.stop()
        assert load.failures == []


async def test_a_full_stream_loses_its_oldest_copies_and_no_request(lab: Lab) -> None:
    await lab.mirror()
    lab.stack.mirrors[0].freeze()
    body = {"model": MODEL, "messages": messages("hi"), "max_tokens": 1, "padding": "x" * 500_000}

    async def ask() -> None:
        url = f"{lab.stack.url}/v1/chat/completions"
        async with lab.session.post(url, json=body) as response:
            assert response.status == 200

    for _ in range(20):
        # 200 of them are 100 MB; the stream holds 64 MiB.
        await asyncio.gather(*(ask() for _ in range(10)))
    sent = await lab.copies()
    lab.stack.mirrors[0].thaw()

    async def nothing_waits() -> bool:
        name = "penstock_mirror_copies_left_total"
        left = await metric(lab.session, lab.mirror_ports[0], name)
        taken = await metric(lab.session, lab.mirror_ports[0], "penstock_mirror_copies_total")
        return left > 0 and left + taken >= sent

    await eventually(nothing_waits)


async def test_both_answers_are_compared(lab: Lab) -> None:
    await lab.mirror(Compare=True)
    bus = NatsBus(BusSettings(nats_url=lab.stack.nats.url), "tool/test", Metrics())
    await bus.start()
    try:
        async with collecting(bus.follow(EVENTS, event_filter(COMPARISON), 600.0)) as stored:
            await lab.ask("compare me", **{"x-request-id": "compared-1"})

            def found() -> Any:
                events = [event for message in stored for event in json.loads(message.payload)]
                return [e["data"] for e in events if e["subject"] == "compared-1"]

            (data,) = await eventually(found)
    finally:
        await bus.close()
    primary, shadow = data["primary"], data["shadow"]
    assert (primary["status"], shadow["status"]) == (200, 200)
    assert (primary["completion_tokens"], primary["finish_reason"]) == (8, "length")
    assert (shadow["completion_tokens"], shadow["finish_reason"]) == (3, "stop")
    for figures in (primary, shadow):
        assert 0 < figures["ttft_ms"] <= figures["total_ms"]
        assert figures["bytes_out"] > 0
