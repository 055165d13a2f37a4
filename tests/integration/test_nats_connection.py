"""The connection to NATS under faults that the memory bus does not know."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import nats
import pytest

from integration.bus_labs import NatsLab, collecting
from integration.servers import eventually, free_port
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.codec import encode
from penstock.common.messages import Heartbeat, LoadReport
from penstock.common.settings import BusSettings
from penstock.common.subjects import EVENTS, HEARTBEAT, LOAD, event_filter, event_subject
from penstock.common.telemetry import Metrics

pytestmark = pytest.mark.integration


@pytest.fixture
async def lab() -> AsyncIterator[NatsLab]:
    lab = NatsLab()
    try:
        yield lab
    finally:
        await lab.close()


def beat(name: str) -> Heartbeat:
    return Heartbeat("ingress", name, "run1", True)


async def test_a_server_that_hangs_for_a_moment_does_not_leave_the_connection_deaf(lab: NatsLab) -> None:
    member = await lab.member()
    seen: list[str] = []
    await member.bus.subscribe(HEARTBEAT, lambda m: seen.append(m.id))
    # Long enough for one ping to be answered late, too short for the connection to be given up.
    await lab.server.freeze_for(2.5)
    await eventually(lambda: member.bus.publish(HEARTBEAT, beat("after"), "a") and "after" in seen)
    assert member.connection == []


async def test_a_subscribe_that_is_given_up_does_not_leave_the_connection_deaf(lab: NatsLab) -> None:
    member = await lab.member()
    seen: list[str] = []
    await member.bus.subscribe(HEARTBEAT, lambda m: seen.append(m.id))
    lab.server.freeze()
    subscribing = asyncio.ensure_future(member.bus.subscribe(LOAD, lambda _: None))
    for _ in range(20):
        await asyncio.sleep(0)
    subscribing.cancel()
    lab.server.thaw()
    await eventually(lambda: member.bus.publish(HEARTBEAT, beat("after"), "a") and "after" in seen)
    assert member.connection == []


async def test_a_subscription_closed_while_the_server_hangs_does_not_leave_the_connection_deaf(
    lab: NatsLab,
) -> None:
    member = await lab.member()
    seen: list[str] = []
    await member.bus.subscribe(HEARTBEAT, lambda m: seen.append(m.id))
    closing = await member.bus.subscribe(LOAD, lambda _: None)
    lab.server.freeze()
    await closing.close()
    lab.server.thaw()
    await eventually(lambda: member.bus.publish(HEARTBEAT, beat("after"), "a") and "after" in seen)
    assert member.connection == []


async def test_a_server_that_hangs_is_left_and_met_again_once(lab: NatsLab) -> None:
    member = await lab.member()
    seen: list[str] = []
    await member.bus.subscribe(HEARTBEAT, lambda m: seen.append(m.id))
    lab.server.freeze()
    await eventually(lambda: not member.bus.connected)
    lab.server.thaw()
    await eventually(lambda: member.bus.publish(HEARTBEAT, beat("after"), "a") and "after" in seen)
    assert member.connection == [False, True]


GREETINGS = {
    "closes": b"",
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "broken INFO": b"INFO {\r\n",
    "INFO that is a list": b"INFO []\r\n",
    "no text": b"\xff\xfe\xfd\r\n",
    "much": b"x" * 1_000_000,
}


@pytest.mark.parametrize("greeting", GREETINGS.values(), ids=GREETINGS.keys())
async def test_a_peer_that_is_no_nats_server_is_passed_over(lab: NatsLab, greeting: bytes) -> None:
    met = asyncio.Event()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        met.set()
        writer.close()

    impostor = await asyncio.start_server(greet, "127.0.0.1", 0)
    port = impostor.sockets[0].getsockname()[1]
    bus = NatsBus(BusSettings(nats_url=f"nats://127.0.0.1:{port},{lab.server.url}"), "test", Metrics())
    async with impostor:
        await bus.start()
        await eventually(lambda: bus.connected)
        assert met.is_set()
        await bus.close()


async def test_the_next_server_is_tried_when_one_refuses(lab: NatsLab) -> None:
    url = f"nats://127.0.0.1:{free_port()},{lab.server.url}"
    bus = NatsBus(BusSettings(nats_url=url), "test", Metrics())
    await bus.start()
    await eventually(lambda: bus.connected)
    await bus.close()


async def test_a_subscription_made_while_the_connection_is_being_made_is_not_forgotten(lab: NatsLab) -> None:
    seen: set[int] = set()
    buses = [NatsBus(BusSettings(nats_url=lab.server.url), "test", Metrics()) for _ in range(40)]
    for turns, bus in enumerate(buses):
        await bus.start()
        for _ in range(turns * 2):
            await asyncio.sleep(0)
        await bus.subscribe(HEARTBEAT, lambda _, turns=turns: seen.add(turns))  # type: ignore[misc]
        await eventually(lambda bus=bus: bus.connected)  # type: ignore[misc]
    await lab.deliver(HEARTBEAT.name("a"), encode(beat("1")))
    await eventually(lambda: seen == set(range(len(buses))))
    for bus in buses:
        await bus.close()


async def test_a_bus_can_be_closed_at_any_moment_of_connecting(lab: NatsLab) -> None:
    for turns in range(0, 60, 2):
        bus = NatsBus(BusSettings(nats_url=lab.server.url), "test", Metrics())
        await bus.start()
        for _ in range(turns):
            await asyncio.sleep(0)
        # The answer of the server is there, and waits for the loop, when the bus is closed.
        await asyncio.to_thread(bool)
        async with asyncio.timeout(30):
            await bus.close()
        assert not bus.connected
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("nats-")]


async def test_the_send_buffer_is_bounded_and_what_is_over_the_bound_is_counted(lab: NatsLab) -> None:
    member = await lab.member()
    report = LoadReport("i", "run1", 1, finished=tuple("d" * 100 for _ in range(2000)))
    # Without a turn of the loop in between nothing leaves the buffer.
    taken = [member.bus.publish(LOAD, report, "i") for _ in range(100)]
    assert 0 < sum(taken) < 100
    assert member.dropped(LOAD.pattern, "send buffer full") == taken.count(False)
    await eventually(lambda: member.bus.publish(LOAD, report, "i"))


async def test_a_follower_that_has_seen_nothing_yet_misses_nothing_during_an_outage(
    lab: NatsLab,
) -> None:
    bus = (await lab.member()).bus
    await bus.ensure_stream(EVENTS)
    await bus.append(event_subject("a", "m"), b"old", {})
    spy = await nats.connect(lab.server.url)
    reads = await spy.subscribe("$JS.API.DIRECT.GET.>")
    await spy.flush()
    async with collecting(bus.follow(EVENTS, event_filter(), None)) as stored:
        # Where the end is, and what has come after it.
        await eventually(lambda: reads.pending_msgs >= 2)
        await spy.close()
        await lab.down()
        await lab.up()
        await bus.append(event_subject("a", "m"), b"new", {})
        await eventually(lambda: [message.payload for message in stored] == [b"new"])


async def test_a_stream_whose_settings_differ_is_brought_up_to_date(lab: NatsLab) -> None:
    bus = (await lab.member()).bus
    await bus.ensure_stream(EVENTS)
    await bus.append(event_subject("a", "m"), b"kept", {})
    await bus.ensure_stream(dataclasses.replace(EVENTS, max_age_s=3600.0))
    client = await nats.connect(lab.server.url)
    info = await client.jetstream().stream_info(EVENTS.name)
    await client.close()
    assert (info.config.max_age, info.state.messages) == (3600, 1)


async def test_whoever_waits_for_an_answer_when_the_bus_is_closed_is_told(lab: NatsLab) -> None:
    member = await lab.member()
    stored = member.bus.append("nobody.stores.this", b"x", {})
    await member.bus.close()
    await eventually(stored.done, timeout_s=3)
    assert stored.exception() is not None
