"""The routing log is what its documents say, and can be read as the guide says, with any NATS client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
import nats
import pytest

from integration.bus_users import StackOfUsers, stack_of_users
from integration.servers import Process, eventually
from integration.stack import chat, stream_chat
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.bus import Stored
from penstock.common.permissions import ARCHIVE, AUDITOR
from penstock.common.settings import BusSettings
from penstock.common.subjects import EVENTS, event_filter
from penstock.common.telemetry import Metrics

pytestmark = pytest.mark.integration

DOCS = Path(__file__).resolve().parents[2] / "docs"
BOUNDS = ("--event-retention-hours", "1", "--event-stream-mib", "64")
EXAMPLES = re.findall(r"```python\n(.*?)```", (DOCS / "guide" / "audit.md").read_text(), re.DOTALL)


@pytest.fixture
async def stack() -> AsyncIterator[StackOfUsers]:
    with stack_of_users() as stack:
        stack.start_sims(2)
        stack.start_discovery(*BOUNDS)
        stack.start_scheduler("--explain", "full", *BOUNDS)
        stack.start_ingress(*BOUNDS)
        await stack.ready()
        yield stack


async def traffic(stack: StackOfUsers) -> None:
    """Requests that end in several ways; a scheduler that goes; an instance that goes."""
    async with aiohttp.ClientSession() as session:
        for number in range(4):
            await chat(session, stack.url, f"plain {number}", headers={"x-request-id": f"plain-{number}"})
            assert [one async for one in stream_chat(session, stack.url, f"stream {number}")]
        for fault in ("500", "429", "drop-before-headers", "drop-mid-stream"):
            with contextlib.suppress(aiohttp.ClientError):
                await chat(session, stack.url, fault, headers={"x-sim-fault": fault})
        await asyncio.to_thread(stack.schedulers[0].kill)
        await chat(session, stack.url, "locally")
        for sim in stack.sims:
            await asyncio.to_thread(sim.kill)
        await chat(session, stack.url, "nobody", headers={"x-request-id": "last-of-all"})


async def test_every_event_of_a_stack_is_valid_by_the_published_schema(stack: StackOfUsers) -> None:
    await traffic(stack)
    schema = json.loads((DOCS / "reference" / "events.schema.json").read_text())
    validator = jsonschema.Draft7Validator(schema)
    messages = await logged(stack, lambda message: b"last-of-all" in message.payload)
    kinds = set()
    for message in messages:
        batch = json.loads(message.payload)
        faults = [f"{list(fault.absolute_path)}: {fault.message}" for fault in validator.iter_errors(batch)]
        assert not faults, (faults[:3], batch[:1])
        kinds |= {event["type"] for event in batch}
    assert {f"penstock.{kind}.v1" for kind in ("placement", "outcome", "instance", "degraded")} <= kinds
    # A killed scheduler without a spool: the auditor is told.
    argv = [sys.executable, "-m", "penstock.cli", "audit", "verify", "--nats-url", stack.users.url(AUDITOR)]
    with Process(argv, name="audit") as audit:
        assert await eventually(lambda: audit.exit_code is not None)
        assert audit.exit_code in (0, 1), audit.stderr
        assert audit.out[0].startswith("log ")


async def logged(stack: StackOfUsers, last: Callable[[Stored], bool]) -> list[Stored]:
    """The log up to an outcome that is the last one wanted, as an auditor reads it."""
    bus = NatsBus(BusSettings(nats_url=stack.users.url(AUDITOR)), "auditor/a", Metrics())
    await bus.start()
    messages: list[Stored] = []
    try:
        async with asyncio.timeout(20):
            async for message in bus.follow(EVENTS, event_filter(), 3600):
                messages.append(message)
                if last(message) and ".outcome." in message.subject:
                    break
    finally:
        await bus.close()
    return messages


async def test_the_examples_of_the_guide_work_for_an_auditor_and_an_archive(stack: StackOfUsers) -> None:
    live, durable = EXAMPLES
    async with aiohttp.ClientSession() as session:
        with Process([sys.executable, "-c", live, stack.users.url(AUDITOR)], name="auditor") as auditor:

            async def heard() -> bool:
                await chat(session, stack.url, "hello", headers={"x-request-id": "heard"})
                return any(line.startswith("heard completed 127.0.0.1:") for line in auditor.out)

            await eventually(heard, 20)
        taken = set[str]()
        for _ in range(2):
            ids = {line.split()[0] for line in await printed(durable, stack.users.url(ARCHIVE))}
            assert ids
            assert not ids & taken
            taken |= ids
            await chat(session, stack.url, "hello again")


async def test_the_server_takes_what_the_nats_command_asks_as_the_guide_calls_it(stack: StackOfUsers) -> None:
    """`consumer add`: the consumer (there is none), the account, the stream, then the consumer, its filter in
    the subject; `consumer next`: the consumer, a message, its acknowledgement; `sub`: a subscription."""
    by_model = "penstock.v1.events.*.sim-model"
    assert f"sub '{by_model}'" in (DOCS / "guide" / "audit.md").read_text()
    async with aiohttp.ClientSession() as session, stack.users.client(AUDITOR) as auditor:
        heard = await auditor.client.subscribe(by_model)
        await auditor.client.flush()
        await chat(session, stack.url, "hello")
        assert json.loads((await heard.next_msg(timeout=20)).data)
    address = stack.users.url(ARCHIVE)
    client = await nats.connect(address, inbox_prefix=b"_INBOX.archive")

    async def api(call: str, **body: object) -> dict[str, Any]:
        answer = await client.request(f"$JS.API.{call}", json.dumps(body).encode(), timeout=20)
        return dict(json.loads(answer.data))

    name, wanted = f"{EVENTS.name}.warehouse", "penstock.v1.events.outcome.*"
    try:
        assert (await api(f"CONSUMER.INFO.{name}"))["error"]["code"] == 404
        assert (await api("INFO"))["streams"] > 0
        assert (await api(f"STREAM.INFO.{EVENTS.name}"))["config"]["name"] == EVENTS.name
        config = {
            "name": "warehouse",
            "durable_name": "warehouse",
            "deliver_policy": "all",
            "ack_policy": "explicit",
            "replay_policy": "instant",
            "filter_subject": wanted,
        }
        body = {"stream_name": EVENTS.name, "config": config, "action": "create"}
        made = await api(f"CONSUMER.CREATE.{name}.{wanted}", **body)
        assert made["config"].items() >= config.items()
        message = await client.request(f"$JS.API.CONSUMER.MSG.NEXT.{name}", b"1", timeout=20, old_style=True)
        assert ".outcome." in message.subject
        await client.publish(message.reply, b"")
        await client.flush()

        async def acknowledged() -> bool:
            info = await api(f"CONSUMER.INFO.{name}")
            return bool(info["ack_floor"]["consumer_seq"] == 1)

        await eventually(acknowledged)
    finally:
        await client.close()


async def printed(example: str, address: str) -> list[str]:
    """What an example prints until it ends."""
    with Process([sys.executable, "-c", example, address], name="example") as process:
        assert await eventually(lambda: process.exit_code is not None, 20)
        assert process.exit_code == 0, process.stderr
        return process.out


async def test_the_stream_has_the_bounds_of_the_flags(stack: StackOfUsers) -> None:
    async with stack.users.client(ARCHIVE) as archive:
        config = (await archive.client.jetstream().stream_info(EVENTS.name)).config
        assert (config.max_age, config.max_bytes) == (3600, 64 * 1024 * 1024)
