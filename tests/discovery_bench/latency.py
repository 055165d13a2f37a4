"""From a change in the store to an ingress that uses it: a real store, a real NATS, discovery, a table."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
from integration.etcd_lab import running_etcd
from integration.etcd_store import EtcdStore
from integration.kubernetes_lab import KubernetesLab
from integration.nats_store import NatsStore
from integration.redis_lab import RedisServer, RedisStore
from integration.servers import NatsServer, eventually
from integration.source_contract import StoreLab
from integration.test_source_file import FileLab

from discovery_bench.scale import engines
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.event_log import EventWriter
from penstock.common.identity import new_identity
from penstock.common.instances import InstanceTable
from penstock.common.model import Endpoint, Instance, Role
from penstock.common.settings import BusSettings
from penstock.common.subjects import INSTANCES
from penstock.common.telemetry import Metrics
from penstock.discovery.adapters.prober import http_prober
from penstock.discovery.service import Discovery
from penstock.discovery.surroundings import ProbePolicy

PATIENCE_S = 30.0
# Each source as discovery runs it by default, its intervals included.
ONE_SECOND_MS = "1000"
INTERVALS_S = {"redis-polled": 1.0, "file": 0.1}


@contextlib.asynccontextmanager
async def _redis(*server_flags: str) -> AsyncIterator[StoreLab]:
    flags = "--discovery-redis-refresh-interval-ms", ONE_SECOND_MS
    with RedisServer(*server_flags) as server:
        store = RedisStore(server, *flags, ttl_ms=3_600_000)
        yield store
        await store.close()


@contextlib.asynccontextmanager
async def _etcd() -> AsyncIterator[StoreLab]:
    with running_etcd() as etcd:
        store = EtcdStore(etcd)
        yield store
        await store.close()


@contextlib.asynccontextmanager
async def _kubernetes(folder: Path) -> AsyncIterator[StoreLab]:
    lab = KubernetesLab(folder)
    await lab.stub.start()
    yield lab
    await lab.close()


@contextlib.asynccontextmanager
async def _nats() -> AsyncIterator[StoreLab]:
    store = await NatsStore(ttl_ms=3_600_000).start()
    yield store
    await store.close()


@contextlib.asynccontextmanager
async def _file(folder: Path) -> AsyncIterator[StoreLab]:
    yield FileLab(folder, poll_s=0.1)


STORES: dict[str, Callable[[Path], contextlib.AbstractAsyncContextManager[StoreLab]]] = {
    "redis-notified": lambda folder: _redis("--notify-keyspace-events", "KEA"),
    "redis-polled": lambda folder: _redis(),
    "etcd": lambda folder: _etcd(),
    "kubernetes": _kubernetes,
    "nats": lambda folder: _nats(),
    "file": _file,
}


class Consumer:
    """An instance table that follows the registry, as in every ingress."""

    def __init__(self, bus: NatsBus) -> None:
        self.table = InstanceTable()
        self._bus = bus
        self._wanted: dict[str, tuple[Role, asyncio.Future[float]]] = {}

    async def follow(self) -> None:
        async for event in self._bus.watch(INSTANCES):
            self.table.apply(event)
            for instance_id, (role, seen) in self._wanted.items():
                found = self.table.get(instance_id)
                if found is not None and found.role is role and not seen.done():
                    seen.set_result(time.perf_counter())

    async def until(self, instance_id: str, role: Role) -> float:
        """The moment at which the instance has this role here."""
        seen = asyncio.get_running_loop().create_future()
        self._wanted = {instance_id: (role, seen)}
        return await asyncio.wait_for(seen, PATIENCE_S)


async def measure(name: str, changes: int, fleet: int, folder: Path) -> str:
    """The report's line: milliseconds from the start of the write to the table that shows it."""
    nats = NatsServer()
    nats.start()
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(nats.kill)
        (endpoint,) = stack.enter_context(engines(1, 2048))
        lab = await stack.enter_async_context(STORES[name](folder))
        host, port = endpoint.split(":")
        instances = [
            Instance(id=f"i{n}", endpoint=Endpoint(host, int(port)), models=("bench",)) for n in range(fleet)
        ]
        await lab.put(*instances)
        consumer = await _start(stack, nats, lab)
        await eventually(lambda: len(consumer.table) == fleet and consumer.table.synced, PATIENCE_S)
        took, chance = list[float](), random.Random(1)
        for number in range(changes):
            role = Role.DECODE if number % 4 < 2 else Role.PREFILL
            changed = msgspec.structs.replace(instances[number % 2], role=role)
            seen = asyncio.create_task(consumer.until(lab.id_of(changed.id), role))
            # Not in step with the interval at which the store is read.
            await asyncio.sleep(0.005 + INTERVALS_S.get(name, 0.0) * chance.random())
            began = time.perf_counter()
            await lab.put(changed)
            took.append(1000 * (await seen - began))
            instances[number % 2] = changed
    took.sort()
    return (
        f"{name}: {changes} changes among {fleet} instances, "
        f"p50 {took[len(took) // 2]:.1f} ms, p99 {took[int(len(took) * 0.99) - 1]:.1f} ms, "
        f"max {took[-1]:.1f} ms"
    )


async def _start(stack: contextlib.AsyncExitStack, nats: NatsServer, lab: StoreLab) -> Consumer:
    buses = [NatsBus(BusSettings(nats_url=nats.url), name, Metrics()) for name in ("discovery", "ingress")]
    for bus in buses:
        await bus.start()
        stack.push_async_callback(bus.close)
    metrics, identity = Metrics(), new_identity("discovery", "bench")
    events = EventWriter(buses[0], identity.writer, identity.incarnation, metrics)
    prober = await stack.enter_async_context(http_prober(2.0))
    source = lab.source()
    stack.push_async_callback(source.close)
    discovery = Discovery(
        [source],
        prober,
        bus=buses[0],
        events=events,
        metrics=metrics,
        identity=identity,
        policy=ProbePolicy(),
    )
    consumer = Consumer(buses[1])
    work = [*(loop for _, loop in discovery.loops()), events.run(), consumer.follow()]
    tasks = [asyncio.create_task(one) for one in work]

    async def end() -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    stack.push_async_callback(end)
    return consumer
