"""What the bus port promises about buckets, watches and streams, and the routing log on top of them."""

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
from penstock.common.bus import Bus, Change, Listing, Lost, Stored, WatchEvent
from penstock.common.errors import BusError, BusUnavailable, MessageTooLarge, RevisionConflict
from penstock.common.event_log import BATCH_TYPE, INCARNATION, PREVIOUS, SEQUENCE, WRITER, EventWriter
from penstock.common.routing_events import OUTCOME, PLACEMENT, REJECTION, OutcomeEvent
from penstock.common.subjects import EVENTS, Bucket, Stream, event_filter, event_subject

pytestmark = pytest.mark.integration

BUCKET = Bucket("contract", max_value_bytes=1024, max_bytes=1024 * 1024)
STREAM = Stream("CONTRACT", ("contract.>",), 1024 * 1024, 3600, 64 * 1024)
HOUR_S = 3600.0


async def with_bucket(lab: Lab) -> Bus:
    bus = (await lab.member()).bus
    assert await bus.ensure_bucket(BUCKET)
    return bus


def listings(events: Sequence[WatchEvent]) -> list[dict[str, bytes]]:
    """What each listing held."""
    return [
        {key: e.value for key, e in event.entries.items()} for event in events if isinstance(event, Listing)
    ]


def changes(events: Sequence[WatchEvent]) -> list[tuple[str, bytes | None]]:
    """Key and value of each change."""
    return [(e.key, e.entry.value if e.entry else None) for e in events if isinstance(e, Change)]


async def test_a_bucket_is_created_once(lab: Lab) -> None:
    bus = await with_bucket(lab)
    assert not await bus.ensure_bucket(BUCKET)
    assert not await (await lab.member("other")).bus.ensure_bucket(BUCKET)


async def test_every_write_has_a_higher_revision(lab: Lab) -> None:
    bus = await with_bucket(lab)
    revisions = [await bus.put(BUCKET, key, b"v") for key in ("a", "b", "a", "c", "a")]
    assert revisions == sorted(set(revisions))


async def test_a_write_goes_through_only_at_the_expected_revision(lab: Lab) -> None:
    bus = await with_bucket(lab)
    first = await bus.put(BUCKET, "a", b"1", expected=0)
    second = await bus.put(BUCKET, "a", b"2", expected=first)
    for wrong in (0, first, second + 1):
        with pytest.raises(RevisionConflict) as caught:
            await bus.put(BUCKET, "a", b"x", expected=wrong)
        assert (caught.value.key, caught.value.expected) == ("a", wrong)
    with pytest.raises(RevisionConflict):
        await bus.delete(BUCKET, "a", expected=first)
    with pytest.raises(RevisionConflict):
        await bus.put(BUCKET, "nothing", b"x", expected=second)
    async with collecting(bus.watch(BUCKET)) as events:
        await eventually(lambda: listings(events) == [{"a": b"2"}])


async def test_a_deleted_key_does_not_exist(lab: Lab) -> None:
    bus = await with_bucket(lab)
    revision = await bus.put(BUCKET, "a", b"1", expected=0)
    await bus.delete(BUCKET, "a", expected=revision)
    with pytest.raises(RevisionConflict):
        await bus.put(BUCKET, "a", b"x", expected=revision)
    again = await bus.put(BUCKET, "a", b"2", expected=0)
    assert again > revision
    with pytest.raises(RevisionConflict):
        await bus.put(BUCKET, "a", b"x", expected=0)


async def test_a_key_with_an_empty_value_exists(lab: Lab) -> None:
    bus = await with_bucket(lab)
    await bus.put(BUCKET, "a", b"", expected=0)
    with pytest.raises(RevisionConflict):
        await bus.put(BUCKET, "a", b"x", expected=0)
    async with collecting(bus.watch(BUCKET)) as events:
        await eventually(lambda: listings(events) == [{"a": b""}])


async def test_only_one_of_many_creates_a_key(lab: Lab) -> None:
    bus = await with_bucket(lab)
    outcomes = await asyncio.gather(
        *(bus.put(BUCKET, "a", b"%d" % n, expected=0) for n in range(20)), return_exceptions=True
    )
    assert [type(o) for o in outcomes if not isinstance(o, int)] == [RevisionConflict] * 19


async def test_a_value_over_its_bound_is_refused_with_the_bound(lab: Lab) -> None:
    bus = await with_bucket(lab)
    await bus.put(BUCKET, "a", b"x" * BUCKET.max_value_bytes)
    with pytest.raises(MessageTooLarge, match="1025 bytes is over the limit of 1024"):
        await bus.put(BUCKET, "a", b"x" * 1025)


async def test_a_write_that_finds_no_bucket_or_no_bus_fails_at_once(lab: Lab) -> None:
    member = await lab.member()
    with pytest.raises(BusUnavailable):
        await member.bus.put(BUCKET, "a", b"1")
    with pytest.raises(BusUnavailable):
        await member.bus.delete(BUCKET, "a")
    await member.bus.ensure_bucket(BUCKET)
    await lab.down()
    for work in (
        member.bus.put(BUCKET, "a", b"1"),
        member.bus.delete(BUCKET, "a", expected=1),
        member.bus.ensure_bucket(BUCKET),
        member.bus.ensure_stream(STREAM),
    ):
        with pytest.raises(BusUnavailable):
            await work


async def test_a_watch_of_an_empty_bucket_lists_nothing_and_then_follows(lab: Lab) -> None:
    bus = await with_bucket(lab)
    async with collecting(bus.watch(BUCKET)) as events:
        await eventually(lambda: listings(events) == [{}])
        first = await bus.put(BUCKET, "a", b"1")
        await bus.put(BUCKET, "b.c", b"2")
        await bus.delete(BUCKET, "a")
        await bus.put(BUCKET, "a", b"3", expected=0)
        await eventually(lambda: len(events) == 5)
        assert changes(events) == [("a", b"1"), ("b.c", b"2"), ("a", None), ("a", b"3")]
        written = events[1]
        assert isinstance(written, Change)
        assert written.entry is not None
        assert written.entry.revision == written.position.sequence == first
        positions = [e.position for e in events if not isinstance(e, Lost)]
        assert [p.sequence for p in positions] == sorted({p.sequence for p in positions})
        assert len({p.incarnation for p in positions}) == 1


async def test_a_watch_lists_what_there_is_without_what_was_deleted(lab: Lab) -> None:
    bus = await with_bucket(lab)
    revisions = {key: await bus.put(BUCKET, key, key.encode()) for key in ("a", "b", "c")}
    await bus.delete(BUCKET, "b")
    async with collecting(bus.watch(BUCKET)) as events, collecting(bus.watch(BUCKET)) as others:
        await eventually(lambda: events and others)
        assert listings(events) == listings(others) == [{"a": b"a", "c": b"c"}]
        listing = events[0]
        assert isinstance(listing, Listing)
        assert {key: entry.revision for key, entry in listing.entries.items()} == {
            key: revisions[key] for key in ("a", "c")
        }
        assert listing.position.sequence > revisions["c"]


async def test_a_watch_waits_for_a_bucket_that_does_not_exist(lab: Lab) -> None:
    bus = (await lab.member()).bus
    async with collecting(bus.watch(BUCKET)) as events:
        await eventually(lambda: _asked(bus))
        await bus.ensure_bucket(BUCKET)
        await bus.put(BUCKET, "a", b"1")
        await eventually(lambda: replayed(events) == {"a": b"1"})


async def _asked(bus: Bus) -> bool:
    """Whether the bus has said that the bucket is missing."""
    with pytest.raises(BusUnavailable):
        await bus.put(BUCKET, "a", b"1")
    return True


def replayed(events: Sequence[WatchEvent]) -> dict[str, bytes]:
    """What the events amount to."""
    held: dict[str, bytes] = {}
    for event in events:
        match event:
            case Listing():
                held = {key: entry.value for key, entry in event.entries.items()}
            case Change(key=key, entry=None):
                held.pop(key, None)
            case Change(key=key, entry=entry) if entry is not None:
                held[key] = entry.value
    return held


async def test_a_watch_says_when_the_bus_is_lost_and_lists_again_when_it_is_back(lab: Lab) -> None:
    bus = await with_bucket(lab)
    await bus.put(BUCKET, "a", b"1")
    async with collecting(bus.watch(BUCKET)) as events:
        await eventually(lambda: len(events) == 1)
        await lab.down()
        await eventually(lambda: len(events) == 2)
        await lab.up()
        await eventually(lambda: len(events) == 3)
        assert [type(event) for event in events] == [Listing, Lost, Listing]
        assert events[0] == events[2]
        await bus.put(BUCKET, "a", b"2")
        await eventually(lambda: replayed(events) == {"a": b"2"})


async def test_a_bucket_made_anew_has_another_incarnation(lab: Lab) -> None:
    bus = await with_bucket(lab)
    await bus.put(BUCKET, "a", b"1")
    async with collecting(bus.watch(BUCKET)) as events:
        await eventually(lambda: len(events) == 1)
        await lab.down()
        await lab.up(keep_store=False)
        assert await eventually(lambda: bus.ensure_bucket(BUCKET))
        await eventually(lambda: len(events) == 3)
        before, lost, after = events
        assert isinstance(lost, Lost)
        assert isinstance(before, Listing)
        assert isinstance(after, Listing)
        assert before.position.incarnation != after.position.incarnation
        assert after.entries == {}


async def test_a_watch_that_is_given_up_leaves_the_others_alone(lab: Lab) -> None:
    bus = await with_bucket(lab)
    async with collecting(bus.watch(BUCKET)) as events:
        async with collecting(bus.watch(BUCKET)) as short:
            await eventually(lambda: short)
        await bus.put(BUCKET, "a", b"1")
        await eventually(lambda: replayed(events) == {"a": b"1"})
        assert changes(short) == []


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
