"""The instance table, fed by a watch of the registry on a NATS that is killed, emptied, frozen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import nats
import pytest

from integration.bus_labs import Member, NatsLab, collecting
from integration.servers import eventually
from penstock.common.bus import Bus, Listing, Lost, WatchEvent
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



@pytest.fixture(autouse=True)
def dump():
    import threading, asyncio, sys, traceback
    done = threading.Event()
    def run():
        if not done.wait(8):
            for t in asyncio.all_tasks(LOOP[0]):
                print(t.get_name(), t, file=sys.__stderr__); t.print_stack(file=sys.__stderr__)
            import os; os._exit(3)
    threading.Thread(target=run, daemon=True).start()
    yield
    done.set()
LOOP=[]
@pytest.fixture(autouse=True)
async def lp():
    LOOP[:] = [asyncio.get_running_loop()]
async def test_an_emptied_registry_that_is_listed_again_still_leaves_the_table(lab: NatsLab) -> None:
    async with fleet(lab, "abc") as (bus, follower):
        lab.server.restart(keep_store=False)
        await eventually(lambda: bus.connected)
        await bus.ensure_bucket(INSTANCES)
        await write(bus, "b")
        await eventually(lambda: follower.count(Listing) == 2)
        lab.server.restart(keep_store=True)
        await eventually(lambda: bus.connected)
        await eventually(lambda: follower.count(Listing) == 3)
        assert follower.names == set("abc")
        await eventually(lambda: bus.connected)
        await mark(bus)
        await eventually(lambda: follower.names == {"b"})


