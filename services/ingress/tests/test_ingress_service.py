"""The loops of an ingress: know the fleet by the registry, tell the schedulers what is in flight."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from integration.servers import eventually

from penstock.common.subjects import INSTANCES

from .ingress_lab import Engine, Lab


@asynccontextmanager
async def running(*loops: asyncio.Task[None]) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for loop in loops:
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


async def test_the_table_follows_the_registry_and_outlives_the_bus(lab: Lab) -> None:
    await lab.bus.ensure_bucket(INSTANCES)
    async with running(asyncio.create_task(lab.service.watch(), name="watch")):
        record = b'{"id":"x","endpoint":{"host":"h","port":1},"models":["m"],"source":"a"}'
        await lab.bus.put(INSTANCES, "instance.x", record)
        await lab.bus.put(INSTANCES, "instance.y", b"no record")
        await lab.bus.put(INSTANCES, "complete.a", b'{"source":"a","sources":["a"]}')
        await eventually(lambda: lab.table.get("x"))
        await eventually(lambda: lab.table.undecodable == 1)
        lab.broker.set_up(False)
        await eventually(lambda: lab.metric("penstock_registry_lost") == 1)
        assert [instance.id for instance in lab.table.serving("m")] == ["x"]
        lab.broker.set_up(True)
        await eventually(lambda: lab.metric("penstock_registry_lost") == 0)
        await lab.bus.delete(INSTANCES, "instance.x")
        await eventually(lambda: not lab.table.get("x"))


async def test_schedulers_hear_of_work_as_it_comes_and_goes_and_of_all_after_a_reconnect(
    lab: Lab, engine: Engine
) -> None:
    async with running(asyncio.create_task(lab.service.report(), name="report")):
        await eventually(lambda: lab.published)
        assert (lab.published[0].in_flight, lab.published[0].pieces) == ((), 1)
        client, peer = await lab.exchange(engine)
        await eventually(lambda: [r for r in lab.published if [w.instance for w in r.in_flight] == ["e1"]])
        lab.broker.set_up(False)
        heard = len(lab.published)
        lab.broker.set_up(True)
        await eventually(lambda: len(lab.published) > heard)
        everything = next(report for report in lab.published[heard:] if report.pieces)
        assert [work.instance for work in everything.in_flight] == ["e1"]
        peer.answer()
        await client.response()
        await eventually(lambda: lab.scheduler.placed <= lab.released)
