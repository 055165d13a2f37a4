"""What the bus port promises about buckets and watches, asked of both adapters."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from integration.bus_labs import Lab, collecting
from integration.servers import eventually
from penstock.common.bus import Bus, Change, Listing, Lost, WatchEvent
from penstock.common.errors import BusUnavailable, MessageTooLarge, RevisionConflict
from penstock.common.subjects import Bucket, Stream

pytestmark = pytest.mark.integration

BUCKET = Bucket("contract", max_value_bytes=1024, max_bytes=1024 * 1024)
STREAM = Stream("CONTRACT", ("contract.>",), 1024 * 1024, 3600, 64 * 1024)


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
