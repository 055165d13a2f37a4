"""The routing log's writer: what it keeps, sends, sends again and drops. Readers' view: the bus contract."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import msgspec
import pytest
from integration.servers import eventually

from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.bus import Stored
from penstock.common.errors import BusTimeout
from penstock.common.event_batches import PREVIOUS, SEQUENCE
from penstock.common.event_log import WINDOW_BYTES, WINDOW_MESSAGES, EventWriter
from penstock.common.routing_events import OUTCOME, PLACEMENT, OutcomeEvent
from penstock.common.subjects import EVENTS, event_subject
from penstock.common.telemetry import Metrics

KEPT_BYTES = 1024 * 1024


def outcome(request: str, error: str = "") -> OutcomeEvent:
    return OutcomeEvent(request, "m", "ok", 200, "/v1/chat/completions", "ingress1", error=error)


def unpackable(size: int) -> str:
    """Random digits, two of which fit in a byte however they are packed."""
    return random.Random(1).randbytes(size // 2).hex()


class Desk:
    """A writer, its bus and its counts."""

    def __init__(self, bus: MemoryBus | None = None, broker: MemoryBroker | None = None) -> None:
        self.broker = broker or MemoryBroker()
        self.bus = bus or MemoryBus(self.broker)
        self.metrics = Metrics()
        self.writer = EventWriter(
            self.bus,
            "ingress/1",
            "run1",
            self.metrics,
            wall_clock=lambda: 1e9 + 0.25,
            max_kept_bytes=KEPT_BYTES,
        )

    def emit(self, count: int, model: str = "m", error: str = "") -> None:
        for number in range(count):
            self.writer.emit(OUTCOME, model, f"r{number}", outcome(f"r{number}", error))

    def count(self, result: str) -> int:
        return int(self.metrics.counter("penstock_events_total", "", "result").labels(result).value)

    @property
    def kept_bytes(self) -> float:
        (family,) = [f for f in self.metrics.snapshot() if f.name == "penstock_events_unacknowledged_bytes"]
        return family.samples[0].value

    @property
    def stored(self) -> list[Stored]:
        stream = self.broker.streams.get(EVENTS.name)
        return stream.messages if stream else []

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.writer.run(), name="event-log")
        try:
            yield
        finally:
            assert not task.done(), task
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_an_event_has_the_attributes_of_a_cloudevent() -> None:
    desk = Desk()
    async with desk.running():
        desk.writer.emit(PLACEMENT, "org/model", "request-1", outcome("request-1"))
        assert await desk.writer.flush(5)
    message = desk.stored[0]
    assert message.subject == event_subject(PLACEMENT, "org/model")
    (event,) = msgspec.json.decode(message.payload)
    assert event.pop("data")["request_id"] == "request-1"
    assert event == {
        "specversion": "1.0",
        "id": "ingress/1/run1/1",
        "source": "/penstock/ingress/1",
        "type": "penstock.placement.v1",
        "subject": "request-1",
        "time": "2001-09-09T01:46:40.250Z",
    }


async def test_events_of_one_type_and_model_share_a_message_and_others_do_not() -> None:
    desk = Desk()
    async with desk.running():
        desk.emit(3)
        desk.emit(2, model="other")
        desk.emit(1)
        assert await desk.writer.flush(5)
    assert [m.headers[SEQUENCE] for m in desk.stored] == ["1-4", "5-6"]


@pytest.mark.parametrize(
    ("count", "error_bytes", "sequences"),
    [
        (64, 0, ["1-64"]),
        (65, 0, ["1-64", "65-65"]),
        (3, 200_000, ["1-1", "2-2", "3-3"]),
    ],
)
async def test_a_message_is_bounded_by_events_and_by_bytes(
    count: int, error_bytes: int, sequences: list[str]
) -> None:
    desk = Desk()
    async with desk.running():
        desk.emit(count, error="x" * error_bytes)
        assert await desk.writer.flush(5)
    assert [m.headers[SEQUENCE] for m in desk.stored] == sequences


async def test_an_event_that_no_stream_would_take_is_dropped_and_leaves_a_visible_gap() -> None:
    desk = Desk()
    async with desk.running():
        desk.emit(2)
        desk.emit(1, error="x" * EVENTS.max_message_bytes)
        desk.emit(3)
        assert await desk.writer.flush(5)
        desk.emit(1, error="x" * EVENTS.max_message_bytes)
        assert await desk.writer.flush(5)
    assert [m.headers[SEQUENCE] for m in desk.stored] == ["1-2", "4-6", "7-7", "9-9"]
    assert (desk.count("acknowledged"), desk.count("dropped")) == (7, 2)
    gaps = [event["data"] for message in desk.stored[2:] for event in msgspec.json.decode(message.payload)]
    assert [(gap["first"], gap["last"], gap["count"]) for gap in gaps] == [(3, 3, 1), (8, 8, 1)]
    assert all(gap["cause"] == "too large for the stream" for gap in gaps)


async def test_what_waits_for_the_bus_is_packed_and_stored_as_it_was_written() -> None:
    desk = Desk()
    desk.emit(1)
    desk.broker.set_up(False)
    desk.emit(3_000)
    desk.writer.close_batches()
    assert 3_000 * 10 < desk.kept_bytes < 3_000 * 60
    desk.broker.set_up(True)
    async with desk.running():
        assert await desk.writer.flush(5)
    events = [event for message in desk.stored for event in msgspec.json.decode(message.payload)]
    assert [event["subject"] for event in events] == ["r0", *(f"r{n}" for n in range(3_000))]
    assert (desk.count("dropped"), desk.kept_bytes) == (0, 0)


async def test_nothing_to_flush_is_flushed() -> None:
    desk = Desk()
    async with desk.running():
        assert await desk.writer.flush(0)
    assert desk.stored == []


async def test_events_are_counted_as_written_then_acknowledged() -> None:
    desk = Desk()
    desk.emit(10)
    assert (desk.count("written"), desk.count("acknowledged")) == (10, 0)
    assert not await desk.writer.flush(0.01)
    async with desk.running():
        assert await desk.writer.flush(5)
    assert (desk.count("acknowledged"), desk.count("dropped")) == (10, 0)


async def test_over_the_bound_of_memory_the_oldest_go_are_counted_and_leave_a_visible_gap() -> None:
    desk = Desk()
    desk.broker.set_up(False)
    desk.emit(50, error=unpackable(100_000))
    desk.writer.close_batches()
    dropped = desk.count("dropped")
    assert 50 - KEPT_BYTES / 50_000 <= dropped < 50
    desk.broker.set_up(True)
    async with desk.running():
        assert await desk.writer.flush(5)
    assert desk.count("acknowledged") == 50 - dropped + 3
    began, ended = (
        event["data"]
        for message in desk.stored
        for event in msgspec.json.decode(message.payload)
        if event["type"] == "penstock.degraded.v1"
    )
    assert (began["what"], began["active"], ended["active"]) == ("losing events", True, False)
    (gap,) = (
        event["data"]
        for message in desk.stored
        for event in msgspec.json.decode(message.payload)
        if event["type"] == "penstock.gap.v1"
    )
    assert (gap["writer"], gap["incarnation"]) == ("ingress/1", "run1")
    assert (gap["first"], gap["last"], gap["count"]) == (1, dropped, dropped)
    assert gap["since"] == gap["until"] == "2001-09-09T01:46:40.250Z"
    assert ended["cause"] == f"of incarnation run1, events 1 to {dropped} were dropped"
    first, *rest = desk.stored
    assert first.headers[SEQUENCE].startswith(f"{dropped + 1}-")
    previous = first.headers[PREVIOUS]
    assert len(previous) == 64
    for message in desk.stored:
        assert message.headers[PREVIOUS] == previous
        previous = hashlib.sha256(previous.encode() + message.payload).hexdigest()
    assert rest


class SlowBus(MemoryBus):
    """Answers appends when told to."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker)
        self.under_way: list[tuple[asyncio.Future[int], str, bytes, Mapping[str, str]]] = []
        self.most = 0

    def append(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> asyncio.Future[int]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.under_way.append((future, subject, payload, headers))
        self.most = max(self.most, len(self.under_way))
        return future

    async def store(self, count: int) -> None:
        """Acknowledge the oldest ones."""
        for _ in range(count):
            future, subject, payload, headers = self.under_way.pop(0)
            future.set_result(await super().append(subject, payload, headers))

    def fail(self) -> None:
        """None of those under way is known to be stored."""
        for future, subject, *_ in self.under_way:
            future.set_exception(BusTimeout(subject, 5))
        self.under_way.clear()


def slow_desk() -> tuple[Desk, SlowBus]:
    broker = MemoryBroker()
    bus = SlowBus(broker)
    return Desk(bus, broker), bus


async def test_only_a_window_of_messages_is_under_way_and_the_rest_follows_in_order() -> None:
    desk, bus = slow_desk()
    messages = WINDOW_MESSAGES + 50
    async with desk.running():
        for number in range(messages):
            desk.emit(1, model=f"m{number}")
        await eventually(lambda: len(bus.under_way) == WINDOW_MESSAGES)
        await bus.store(50)
        await eventually(lambda: len(bus.under_way) == WINDOW_MESSAGES)
        await bus.store(WINDOW_MESSAGES)
        assert await desk.writer.flush(5)
    assert bus.most == WINDOW_MESSAGES
    assert [m.headers[SEQUENCE] for m in desk.stored] == [f"{n}-{n}" for n in range(1, messages + 1)]


async def test_only_a_window_of_bytes_is_under_way() -> None:
    desk, bus = slow_desk()
    async with desk.running():
        # Each is a message of its own, that packs well.
        desk.emit(40, error="x" * 200_000)
        for _ in range(40):
            await eventually(lambda: bus.under_way)
            assert sum(len(payload) for _, _, payload, _ in bus.under_way) < WINDOW_BYTES + 300_000
            await bus.store(1)
        assert await desk.writer.flush(5)
    assert desk.count("dropped") == 0
    assert 1 < bus.most < 10


async def test_what_is_not_acknowledged_is_sent_again_as_the_same_message() -> None:
    desk, bus = slow_desk()
    async with desk.running():
        desk.emit(128)
        await eventually(lambda: len(bus.under_way) == 2)
        first = [headers for *_, headers in bus.under_way]
        bus.fail()
        await eventually(lambda: len(bus.under_way) == 2)
        assert [headers for *_, headers in bus.under_way] == first
        await bus.store(2)
        assert await desk.writer.flush(5)
    assert (desk.count("acknowledged"), desk.count("dropped")) == (128, 0)


async def test_an_acknowledgement_of_what_was_dropped_meanwhile_makes_no_difference() -> None:
    desk, bus = slow_desk()
    text = unpackable(200_000)
    async with desk.running():
        desk.emit(40, error=text)
        desk.writer.close_batches()
        await eventually(lambda: bus.under_way)
        desk.emit(40, error=text)
        desk.writer.close_batches()
        # One event more says that some are dropped, and two which.
        while desk.count("acknowledged") + desk.count("dropped") < 83:
            await eventually(lambda: bus.under_way)
            await bus.store(len(bus.under_way))
            await asyncio.sleep(0)
        assert await desk.writer.flush(5)
        desk.emit(1)
        await eventually(lambda: bus.under_way)
        await bus.store(1)
        assert await desk.writer.flush(5)
    assert desk.count("acknowledged") + desk.count("dropped") == 84
    assert desk.count("dropped") > 40
