"""What the bus port promises about sharing out a stream, asked of both adapters."""

from __future__ import annotations

import pytest

from integration.bus_labs import Lab, collecting
from integration.servers import eventually
from penstock.common.bus import Bus, Taken
from penstock.common.codec import encode
from penstock.common.messages import MirrorCopy
from penstock.common.subjects import MIRROR, Stream

pytestmark = pytest.mark.integration

# Holds three copies of PIECE bytes.
PIECE = 4000
SMALL = Stream("CONTRACT_TAKEN", (MIRROR.pattern,), 3 * (PIECE + 300), 60, 64 * 1024, storage="memory")


def copy(name: str) -> MirrorCopy:
    return MirrorCopy(name, name, "m", b"POST", b"/v1/completions", b"", b"x" * PIECE)


def publish(bus: Bus, *names: str) -> None:
    for name in names:
        assert bus.publish(MIRROR, copy(name), "m")


def ids(*taken: list[Taken[MirrorCopy]]) -> list[str]:
    return [one.message.id for some in taken for one in some]


async def test_what_is_published_is_taken_in_order_by_one_of_the_group(lab: Lab) -> None:
    sender, one, other = [(await lab.member(name)).bus for name in ("sender", "one", "other")]
    await sender.ensure_stream(SMALL)
    names = [f"{number}" for number in range(40)]
    async with (
        collecting(one.take(SMALL, MIRROR)) as by_one,
        collecting(other.take(SMALL, MIRROR)) as by_other,
    ):
        for name in names:
            publish(sender, name)
            await eventually(lambda: name in ids(by_one, by_other))  # noqa: B023
        assert sorted(ids(by_one, by_other)) == sorted(names)
        for some in (by_one, by_other):
            numbers = [int(name) for name in ids(some)]
            assert numbers == sorted(numbers)


async def test_what_waits_for_hands_is_kept_and_the_oldest_leave_a_full_stream_counted(lab: Lab) -> None:
    bus = (await lab.member()).bus
    await bus.ensure_stream(SMALL)
    publish(bus, *map(str, range(10)))
    async with collecting(bus.take(SMALL, MIRROR)) as taken:
        await eventually(lambda: len(taken) == 3)
        assert ids(taken) == ["7", "8", "9"]
        assert [one.left for one in taken] == [7, 7, 7]
    publish(bus, "10")
    async with collecting(bus.take(SMALL, MIRROR)) as taken:
        await eventually(lambda: ids(taken) == ["10"])
        assert taken[0].left == 7


async def test_one_that_takes_is_given_what_it_asks_for_and_no_more(lab: Lab) -> None:
    bus, other = (await lab.member()).bus, (await lab.member("other")).bus
    await bus.ensure_stream(SMALL)
    publish(bus, "1", "2", "3")
    busy = bus.take(SMALL, MIRROR)
    assert (await anext(busy)).message.id == "1"
    async with collecting(other.take(SMALL, MIRROR)) as taken:
        await eventually(lambda: ids(taken) == ["2", "3"])
    await busy.aclose()


async def test_what_cannot_be_decoded_is_dropped_and_counted(lab: Lab) -> None:
    member = await lab.member()
    await member.bus.ensure_stream(SMALL)
    for payload in (b"\xff", encode(copy("a"))[:-1], b""):
        await member.bus.append(MIRROR.name("m"), payload, {})
    publish(member.bus, "good")
    async with collecting(member.bus.take(SMALL, MIRROR)) as taken:
        await eventually(lambda: ids(taken) == ["good"])
    assert member.dropped(MIRROR.pattern, "undecodable") == 3


async def test_taking_goes_on_when_the_bus_was_away_and_forgot_the_stream(lab: Lab) -> None:
    bus = (await lab.member()).bus
    async with collecting(bus.take(SMALL, MIRROR)) as taken:
        for name, keep_store in (("first", True), ("second", False), ("third", False)):
            await eventually(lambda: _reaches(bus, taken, name))  # noqa: B023
            await lab.down()
            assert not bus.publish(MIRROR, copy("lost"), "m")
            await lab.up(keep_store=keep_store)
        assert "lost" not in ids(taken)


async def _reaches(bus: Bus, taken: list[Taken[MirrorCopy]], name: str) -> bool:
    if name not in ids(taken):
        publish(bus, name)
    return name in ids(taken)
