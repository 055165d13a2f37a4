"""The instance table, fed by a watch of the registry on a NATS that is killed, emptied, frozen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import nats
import pytest
from nats.js.errors import APIError

from integration.bus_labs import Member, NatsLab, collecting
from integration.servers import eventually
from penstock.common.bus import Bus, Change, Listing, Lost, WatchEvent
from penstock.common.codec import encode_record
from penstock.common.instances import InstanceTable, complete_key, encode_instance, instance_key
from penstock.common.messages import CompleteMarker
from penstock.common.model import Endpoint, Instance
from penstock.common.subjects import INSTANCES

pytestmark = pytest.mark.integration


@pytest.fixture
async def lab() -> AsyncIterator[NatsLab]:
    lab = NatsLab()
    try:
        yield lab
    finally:
        await lab.close()


def instance(name: str, source: str = "static") -> Instance:
    return Instance(id=name, endpoint=Endpoint("127.0.0.1", 8000), models=("model-a",), source=source)


async def write(bus: Bus, names: Iterable[str], source: str = "static") -> None:
    for name in names:
        await bus.put(INSTANCES, instance_key(name), encode_instance(instance(name, source)))


async def mark(bus: Bus, source: str = "static", sources: Sequence[str] = ("static",)) -> None:
    marker = CompleteMarker(source, tuple(sources))
    await bus.put(INSTANCES, complete_key(source), encode_record(marker))


@dataclass
class Follower:
    """A table at work, and what it went through."""

    table: InstanceTable = field(default_factory=InstanceTable)
    events: list[WatchEvent] = field(default_factory=list)
    smallest: int | None = None

    def apply(self, event: WatchEvent) -> WatchEvent:
        self.table.apply(event)
        self.events.append(event)
        if self.table.synced:
            self.smallest = min(len(self.table), self.smallest if self.smallest is not None else 1000)
        return event

    @property
    def names(self) -> set[str]:
        return {instance.id for instance in self.table.instances()}

    def count(self, kind: type[Listing] | type[Lost]) -> int:
        return sum(isinstance(event, kind) for event in self.events)


@asynccontextmanager
async def following(member: Member) -> AsyncIterator[Follower]:
    follower = Follower()
    watch = member.bus.watch(INSTANCES)
    async with collecting(follower.apply(event) async for event in watch):
        yield follower
    await watch.aclose()


@asynccontextmanager
async def fleet(lab: NatsLab, names: str) -> AsyncIterator[tuple[Bus, Follower]]:
    """A writer's bus, and a follower that has seen the instances `names` and the marker of their source."""
    writer, reader = await lab.member("writer"), await lab.member("reader")
    assert await writer.bus.ensure_bucket(INSTANCES)
    await write(writer.bus, names)
    await mark(writer.bus)
    async with following(reader) as follower:
        await eventually(lambda: follower.table.synced and follower.names == set(names))
        yield writer.bus, follower


async def test_the_table_stays_while_nats_is_killed_and_follows_when_it_is_back(lab: NatsLab) -> None:
    async with fleet(lab, "abc") as (bus, follower):
        lab.server.kill()
        await eventually(lambda: follower.table.lost)
        assert follower.names == set("abc")
        lab.server.start()
        await eventually(lambda: not follower.table.lost)
        assert follower.names == set("abc")
        await eventually(lambda: bus.connected)
        await write(bus, "d")
        await bus.delete(INSTANCES, instance_key("a"))
        await eventually(lambda: follower.names == set("bcd"))
        assert follower.smallest == 3


async def test_an_emptied_registry_leaves_the_table_until_it_is_complete(lab: NatsLab) -> None:
    async with fleet(lab, "abc") as (bus, follower):
        await lab.down()
        await lab.up(keep_store=False)
        assert await bus.ensure_bucket(INSTANCES)
        await eventually(lambda: follower.count(Listing) == 2)
        assert follower.names == set("abc")
        await write(bus, "bd")
        await eventually(lambda: "d" in follower.names)
        assert follower.names == set("abcd")
        await mark(bus)
        await eventually(lambda: follower.names == set("bd"))
        assert follower.smallest == 2


async def test_an_emptied_registry_that_is_listed_again_still_leaves_the_table(lab: NatsLab) -> None:
    async with fleet(lab, "abc") as (bus, follower):
        await lab.down()
        await lab.up(keep_store=False)
        await bus.ensure_bucket(INSTANCES)
        await write(bus, "b")
        await eventually(lambda: follower.count(Listing) == 2)
        await lab.down()
        await lab.up(keep_store=True)
        await eventually(lambda: follower.count(Listing) == 3)
        assert follower.names == set("abc")
        await eventually(lambda: bus.connected)
        await mark(bus)
        await eventually(lambda: follower.names == {"b"})


async def test_each_source_keeps_its_instances_until_it_is_complete_itself(lab: NatsLab) -> None:
    async with fleet(lab, "ab") as (bus, follower):
        both = ("static", "redis")
        await write(bus, "xy", "redis")
        await mark(bus, "static", both)
        await mark(bus, "redis", both)
        await eventually(lambda: follower.names == set("abxy"))
        await lab.down()
        await lab.up(keep_store=False)
        await bus.ensure_bucket(INSTANCES)
        await write(bus, "a")
        await mark(bus, "static", both)
        await eventually(lambda: follower.names == set("axy"))
        await write(bus, "x", "redis")
        await mark(bus, "redis", both)
        await eventually(lambda: follower.names == set("ax"))


async def test_a_frozen_nats_is_noticed_and_met_again(lab: NatsLab) -> None:
    async with fleet(lab, "ab") as (bus, follower):
        lab.server.freeze()
        await eventually(lambda: follower.table.lost, timeout_s=6)
        assert follower.names == set("ab")
        lab.server.thaw()
        await eventually(lambda: not follower.table.lost and bus.connected)
        await write(bus, "c")
        await eventually(lambda: follower.names == set("abc"))


async def test_a_bucket_made_anew_behind_the_watch_is_noticed(lab: NatsLab) -> None:
    async with fleet(lab, "ab") as (bus, follower):
        await delete_stream(lab)
        assert await bus.ensure_bucket(INSTANCES)
        await write(bus, "c")
        await eventually(lambda: follower.names == set("abc"), timeout_s=5)
        await mark(bus)
        await eventually(lambda: follower.names == {"c"})
        assert follower.count(Lost) == 1
        assert bus.connected


async def test_a_bucket_that_is_gone_is_noticed_and_its_successor_found(lab: NatsLab) -> None:
    async with fleet(lab, "ab") as (bus, follower):
        await delete_stream(lab)
        await eventually(lambda: follower.table.lost, timeout_s=5)
        assert follower.names == set("ab")
        await bus.ensure_bucket(INSTANCES)
        await eventually(lambda: not follower.table.lost)
        assert follower.names == set("ab")


async def delete_stream(lab: NatsLab) -> None:
    """As an operator would: not through our bus."""
    client = await nats.connect(lab.server.url)
    await client.jetstream().delete_stream(INSTANCES.stream)
    await client.close()


async def test_a_watch_lists_a_large_registry_while_it_is_written(lab: NatsLab) -> None:
    async with fleet(lab, "a") as (bus, follower):
        names = {f"instance-{n}" for n in range(500)}
        late = await lab.member("late")
        writing = asyncio.ensure_future(write(bus, sorted(names)))
        async with following(late) as other:
            await writing
            await eventually(lambda: follower.names == other.names == names | {"a"})
            assert other.count(Listing) == 1
            assert other.count(Lost) == 0


async def test_records_that_are_no_instances_harm_nobody(lab: NatsLab) -> None:
    async with fleet(lab, "ab") as (bus, follower):
        for key, value in {
            "instance.x": b"\xff\x00",
            instance_key("a"): b'{"id": 7}',
            "instance.y": b"[" * 50_000,
            "complete.z": b"null",
            "unknown.kind": b"{}",
        }.items():
            await bus.put(INSTANCES, key, value)
        await write(bus, "c")
        await eventually(lambda: "c" in follower.names)
        assert follower.names == set("abc")
        assert follower.table.undecodable == 4


async def test_marks_of_deleted_instances_leave_the_bucket_and_harm_nobody(lab: NatsLab) -> None:
    """However many come and go; and a record that would leave without a mark is none."""
    short = replace(INSTANCES, name="short", marks_max_age_s=1)
    bus = (await lab.member()).bus
    await bus.ensure_bucket(short)
    client = await nats.connect(lab.server.url)
    streams = client.jetstream()

    async def only_one_is_left() -> bool:
        return (await streams.stream_info(short.stream)).state.messages == 1

    async with collecting(bus.watch(short)) as seen:
        await eventually(lambda: seen)
        for number in range(50):
            await bus.put(short, f"i.{number}", b"x", expected=0)
        for number in range(50):
            await bus.delete(short, f"i.{number}")
        await bus.put(short, "kept", b"x")
        await eventually(only_one_is_left)
        assert await bus.put(short, "i.0", b"again", expected=0) > 100
        await streams.publish(short.subject("forged"), b"x", headers={"Nats-TTL": "1h"})
        await bus.put(short, "last", b"x")
        await eventually(lambda: any(isinstance(one, Change) and one.key == "last" for one in seen))
        assert not any(isinstance(one, Lost) for one in seen)
        there = {one.key: one.entry is not None for one in seen if isinstance(one, Change)}
        assert {key for key, exists in there.items() if exists} == {"kept", "last", "i.0"}
        # Whose key it is has it back.
        await bus.put(short, "forged", b"mine", expected=0)
    async with collecting(bus.watch(short)) as seen:
        await eventually(lambda: seen)
        assert isinstance(seen[0], Listing)
        assert seen[0].entries.keys() == {"kept", "last", "i.0", "forged"}
    await client.close()


async def test_the_bucket_of_an_older_release_gets_bounded_marks_too(lab: NatsLab) -> None:
    bus, old = (await lab.member()).bus, replace(INSTANCES, marks_max_age_s=0)
    await bus.ensure_bucket(old)
    await bus.put(old, "key", b"x")
    assert not await bus.ensure_bucket(INSTANCES)
    await bus.delete(INSTANCES, "key")
    client = await nats.connect(lab.server.url)
    message = await client.jetstream().get_last_msg(INSTANCES.stream, INSTANCES.subject("key"))
    assert (message.headers or {})["Nats-TTL"] == f"{INSTANCES.marks_max_age_s}s"
    await client.close()


async def test_a_bucket_that_could_be_purged_is_closed_to_it(lab: NatsLab) -> None:
    async with fleet(lab, "ab") as (bus, follower):
        await delete_stream(lab)
        client = await nats.connect(lab.server.url)
        streams = client.jetstream()
        await streams.add_stream(name=INSTANCES.stream, subjects=[INSTANCES.subject(">")])
        assert not await bus.ensure_bucket(INSTANCES)
        await write(bus, "c")
        with pytest.raises(APIError, match="purge"):
            await streams.purge_stream(INSTANCES.stream)
        await client.close()
        await eventually(lambda: follower.names == set("abc"), timeout_s=5)
