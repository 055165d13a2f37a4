"""What the bus port promises about streams, and the routing log on top of them, asked of both adapters."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import defaultdict
from collections.abc import Sequence

import msgspec
import pytest

from integration.bus_labs import Lab, Member, collecting
from integration.servers import eventually
from penstock.common.bus import Bus, Stored
from penstock.common.errors import BusError, BusUnavailable
from penstock.common.event_batches import BATCH_TYPE, INCARNATION, PREVIOUS, SEQUENCE, WRITER
from penstock.common.event_log import EventWriter
from penstock.common.routing_events import OUTCOME, PLACEMENT, REJECTION, OutcomeEvent
from penstock.common.subjects import EVENTS, Stream, event_filter, event_subject

pytestmark = pytest.mark.integration

STREAM = Stream("CONTRACT", ("contract.>",), 1024 * 1024, 3600, 64 * 1024)
HOUR_S = 3600.0


async def append(bus: Bus, *texts: str, subject: str = "contract.a") -> list[int]:
    return [await bus.append(subject, text.encode(), {}) for text in texts]


def payloads(stored: Sequence[Stored]) -> list[str]:
    return [message.payload.decode() for message in stored]


async def test_what_is_appended_has_a_sequence_and_is_read_back_as_it_was(lab: Lab) -> None:
    bus = (await lab.member()).bus
    await bus.ensure_stream(STREAM)
    await bus.ensure_stream(STREAM)
    assert await append(bus, "1", "2") == [1, 2]
    assert await bus.append("contract.b", b"3", {"Some-Header": "some value"}) == 3
    async with collecting(bus.follow(STREAM, "contract.*", HOUR_S)) as stored:
        await eventually(lambda: payloads(stored) == ["1", "2", "3"])
    last = stored[-1]
    assert (last.subject, last.sequence, last.headers["Some-Header"]) == ("contract.b", 3, "some value")
    assert stored[0].time_s <= stored[1].time_s <= last.time_s


async def test_a_repeated_message_id_is_stored_once(lab: Lab) -> None:
    bus = (await lab.member()).bus
    await bus.ensure_stream(STREAM)
    headers = [{"Nats-Msg-Id": name} for name in ("x", "y", "x", "x", "y")]
    assert [await bus.append("contract.a", b"%d" % n, h) for n, h in enumerate(headers)] == [1, 2, 1, 1, 2]
    async with collecting(bus.follow(STREAM, "contract.a", HOUR_S)) as stored:
        await eventually(lambda: len(stored) >= 2)
        await append(bus, "end")
        await eventually(lambda: payloads(stored)[-1] == "end")
        assert payloads(stored) == ["0", "1", "end"]


async def test_following_without_a_past_starts_with_what_comes(lab: Lab) -> None:
    bus = (await lab.member()).bus
    await bus.ensure_stream(STREAM)
    await append(bus, "old")
    async with collecting(bus.follow(STREAM, "contract.*", None)) as stored:
        numbers = itertools.count()

        async def seen() -> bool:
            await append(bus, f"{next(numbers)}")
            return bool(stored)

        await eventually(seen)
        assert "old" not in payloads(stored)


async def test_a_follower_sees_its_subjects_only(lab: Lab) -> None:
    bus = (await lab.member()).bus
    await bus.ensure_stream(EVENTS)
    async with collecting(bus.follow(EVENTS, event_filter(PLACEMENT, "m/1"), HOUR_S)) as stored:
        for event_type, model in ((OUTCOME, "m/1"), (PLACEMENT, "m/2"), (PLACEMENT, "m/1"), (PLACEMENT, "")):
            await bus.append(event_subject(event_type, model), f"{event_type} {model}".encode(), {})
        await bus.append(event_subject(PLACEMENT, "m/1"), b"end", {})
        await eventually(lambda: payloads(stored) == ["placement m/1", "end"])


async def test_nothing_is_taken_for_stored_without_a_stream_or_without_the_bus(lab: Lab) -> None:
    bus = (await lab.member()).bus
    with pytest.raises(BusError):
        await append(bus, "1")
    await bus.ensure_stream(STREAM)
    await lab.down()
    with pytest.raises(BusUnavailable):
        await append(bus, "2")


@pytest.mark.parametrize("since_s", [None, HOUR_S], ids=["from the end", "from an hour ago"])
async def test_a_follower_misses_nothing_and_repeats_nothing_when_the_bus_was_away(
    lab: Lab, since_s: float | None
) -> None:
    bus = (await lab.member()).bus
    await bus.ensure_stream(STREAM)
    async with collecting(bus.follow(STREAM, "contract.a", since_s)) as stored:
        await eventually(lambda: _beginning(bus, stored))
        await lab.down()
        await lab.up()
        await append(bus, "1", "2")
        await lab.down()
        await lab.up()
        await append(bus, "3")
        await eventually(lambda: "3" in payloads(stored))
        assert [text for text in payloads(stored) if text != "begin"] == ["1", "2", "3"]


async def _beginning(bus: Bus, stored: list[Stored]) -> bool:
    """Whether the follower is there: it is, once it sees what is appended."""
    if not stored:
        await append(bus, "begin")
    return bool(stored)


async def test_a_follower_goes_on_with_a_stream_that_was_made_anew(lab: Lab) -> None:
    bus = (await lab.member()).bus
    await bus.ensure_stream(STREAM)
    await append(bus, *map(str, range(20)))
    async with collecting(bus.follow(STREAM, "contract.a", HOUR_S)) as stored:
        await eventually(lambda: len(stored) == 20)
        await lab.down()
        await lab.up(keep_store=False)
        await bus.ensure_stream(STREAM)
        await append(bus, "new 1", "new 2")
        await eventually(lambda: payloads(stored)[20:] == ["new 1", "new 2"])


class Log:
    """A writer of the routing log at work, and what is wrong with what it has written."""

    def __init__(self, member: Member, incarnation: str = "run1") -> None:
        self.bus, self.metrics = member.bus, member.metrics
        self.writer = EventWriter(member.bus, "scheduler/7f3a", incarnation, member.metrics)
        self.running = asyncio.create_task(self.writer.run(), name="event-log")
        self._emitted = itertools.count(1)

    def emit(self, count: int) -> None:
        for number in itertools.islice(self._emitted, count):
            kind = (PLACEMENT, REJECTION, OUTCOME)[number % 3]
            model = ("a", "b/c")[number % 2]
            request = f"request-{number}"
            self.writer.emit(kind, model, request, OutcomeEvent(request, model, "ok", 200, "/", "i"))

    async def stop(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)


def events_in(message: Stored) -> list[dict[str, object]]:
    return msgspec.json.decode(message.payload, type=list[dict[str, object]])


def assert_chained(stored: Sequence[Stored]) -> None:
    """Per writer: sequences without a gap, in order, and each message names the hash of the one before."""
    previous: dict[tuple[str, str], str] = defaultdict(str)
    last: dict[tuple[str, str], int] = defaultdict(int)
    for message in stored:
        writer = message.headers[WRITER], message.headers[INCARNATION]
        first, final = map(int, message.headers[SEQUENCE].split("-"))
        assert first == last[writer] + 1
        assert [event["id"] for event in events_in(message)] == [
            f"{writer[0]}/{writer[1]}/{n}" for n in range(first, final + 1)
        ]
        assert message.headers[PREVIOUS] == previous[writer]
        assert message.headers["content-type"] == BATCH_TYPE
        previous[writer] = hashlib.sha256(previous[writer].encode() + message.payload).hexdigest()
        last[writer] = final


async def assert_logged(bus: Bus, count: int) -> None:
    """Exactly `request-1` to `request-<count>` are in the log, each once, chained."""
    async with collecting(bus.follow(EVENTS, event_filter(), HOUR_S)) as stored:
        await eventually(lambda: sum(len(events_in(m)) for m in stored) >= count)
        requests = [str(event["subject"]) for message in stored for event in events_in(message)]
        assert sorted(requests) == sorted(f"request-{n}" for n in range(1, count + 1))
        assert_chained(stored)
        for message in stored:
            for event in events_in(message):
                assert str(event["type"]).split(".")[1] in message.subject


async def test_every_event_is_logged_once_numbered_and_chained(lab: Lab) -> None:
    member = await lab.member()
    log = Log(member)
    log.emit(1000)
    assert await log.writer.flush(10)
    log.emit(1)
    assert await log.writer.flush(10)
    await assert_logged(member.bus, 1001)
    await log.stop()


async def test_events_of_the_time_without_a_bus_are_logged_afterwards(lab: Lab) -> None:
    member = await lab.member()
    log = Log(member)
    log.emit(10)
    assert await log.writer.flush(10)
    await lab.down()
    log.emit(100)
    assert not await log.writer.flush(0.05)
    log.emit(100)
    await lab.up()
    assert await log.writer.flush(10)
    await assert_logged(member.bus, 210)
    await log.stop()


async def test_events_under_way_when_the_bus_is_killed_are_logged_once(lab: Lab) -> None:
    member = await lab.member()
    log = Log(member)
    for _ in range(2):
        before = acknowledged(member)
        # More messages than may be under way at one time.
        log.emit(20_000)
        await eventually(lambda before=before: acknowledged(member) > before)  # type: ignore[misc]
        await lab.down()
        log.emit(10)
        await lab.up()
    assert await log.writer.flush(20)
    await assert_logged(member.bus, 2 * 20_010)
    await log.stop()


def acknowledged(member: Member) -> float:
    return member.metrics.counter("penstock_events_total", "", "result").labels("acknowledged").value


async def test_the_log_goes_on_in_a_stream_that_was_made_anew(lab: Lab) -> None:
    member = await lab.member()
    log = Log(member)
    log.emit(10)
    assert await log.writer.flush(10)
    await lab.down()
    await lab.up(keep_store=False)
    log.emit(10)
    assert await log.writer.flush(10)
    async with collecting(member.bus.follow(EVENTS, event_filter(), HOUR_S)) as stored:
        await eventually(lambda: sum(len(events_in(m)) for m in stored) == 10)
        assert stored[0].headers[SEQUENCE].startswith("11-")
    await log.stop()
