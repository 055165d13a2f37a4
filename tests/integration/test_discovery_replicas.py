"""Three replicas of discovery share two sources; a holder is killed, another frozen. About 35 s."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from discovery_bench.scale import engines

from integration.redis_lab import RedisServer, RedisStore
from integration.servers import NatsServer, Process, eventually
from integration.source_contract import instance
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.bus import Change
from penstock.common.instances import INSTANCE_PREFIX, InstanceTable
from penstock.common.model import Endpoint, Instance, Role
from penstock.common.settings import BusSettings
from penstock.common.subjects import INSTANCES
from penstock.common.telemetry import Metrics

pytestmark = pytest.mark.integration

# The lease's 10 s, the bid, a probe, and a machine that is busy.
TAKEOVER_S = 40.0


class Consumer:
    """An instance table as every ingress has it. `missing` counts the moments at which one was gone."""

    def __init__(self, bus: NatsBus, expected: set[str]) -> None:
        self.table, self.holders = InstanceTable(), dict[str, str]()
        self.expected, self.whole, self.missing, self.writes = expected, False, 0, 0
        self._bus = bus

    async def follow(self) -> None:
        async for event in self._bus.watch(INSTANCES):
            self.table.apply(event)
            held = {one.id for one in self.table.instances() if one.takes_work}
            self.whole = self.whole or held >= self.expected
            self.missing += self.whole and not held >= self.expected
            if isinstance(event, Change) and event.entry is not None:
                self.writes += event.key.startswith(INSTANCE_PREFIX)
                if event.key.startswith("lease."):
                    self.holders[event.key.removeprefix("lease.")] = json.loads(event.entry.value)["holder"]

    def role(self, instance_id: str) -> Role | None:
        found = self.table.get(instance_id)
        return found.role if found else None


class Replicas:
    """The processes, and the two stores that they read."""

    def __init__(self, nats: NatsServer, redis: RedisStore, file: Path, engines: list[str]) -> None:
        self.redis, self.file, self.engines, self.listed = redis, file, engines, engines[:2]
        self.prefill: set[str] = set()
        self.write_file()
        flags = {
            "--nats-url": nats.url,
            "--admin-port": "0",
            "--llm-backend-discovery": "redis,endpoints",
            "--llm-backend-endpoints": f"@{file}",
            "--discovery-redis-url": f"redis://{redis.server.address}",
            "--discovery-redis-status-ttl-ms": "3600000",
            "--discovery-redis-refresh-interval-ms": "100",
            "--probe-interval": "1",
        }
        argv = [part for flag in flags.items() for part in flag]
        self.processes = {
            name: Process.module("penstock.discovery", *argv, "--discovery-id", name) for name in "abc"
        }

    def write_file(self) -> None:
        lines = [f"prefill@{one}" if one in self.prefill else one for one in self.listed]
        fresh = self.file.with_suffix(".new")
        fresh.write_text("\n".join(lines) + "\n")
        fresh.replace(self.file)

    async def change(self, consumer: Consumer) -> None:
        """Change one instance of each store and wait until consumers see both."""
        self.prefill ^= {self.listed[0]}
        self.write_file()
        wanted = Role.PREFILL if self.prefill else Role.NEUTRAL
        await self.redis.put(in_redis(self.engines[2], wanted))
        both = self.listed[0], "r"
        await eventually(lambda: [consumer.role(one) for one in both] == [wanted] * 2, TAKEOVER_S)


def in_redis(address: str, role: Role) -> Instance:
    host, port = address.split(":")
    return Instance(id="r", endpoint=Endpoint(host, int(port)), role=role)


@contextlib.asynccontextmanager
async def following(nats: NatsServer, expected: set[str]) -> AsyncIterator[Consumer]:
    bus = NatsBus(BusSettings(nats_url=nats.url), "consumer", Metrics())
    await bus.start()
    consumer = Consumer(bus, expected)
    task = asyncio.create_task(consumer.follow())
    try:
        yield consumer
    finally:
        assert not task.done()
        task.cancel()
        await bus.close()


async def test_consumers_see_no_gap_and_no_fight_while_holders_are_killed_and_frozen(tmp_path: Path) -> None:
    with RedisServer() as server, engines(3, 1024) as listed, NatsServer() as nats:
        redis = RedisStore(server, ttl_ms=3_600_000)
        # Both stores name the second one: the file speaks for it.
        await redis.put(in_redis(listed[2], Role.NEUTRAL), instance(listed[1], 1))
        replicas = Replicas(nats, redis, tmp_path / "engines", listed)
        async with following(nats, {*listed[:2], "r"}) as consumer:
            await eventually(lambda: consumer.whole and len(consumer.holders) == 2, TAKEOVER_S)
            await replicas.change(consumer)

            replicas.processes[consumer.holders["redis"]].kill()
            await replicas.change(consumer)

            frozen = replicas.processes[consumer.holders["endpoints"]]
            frozen.freeze()
            await replicas.change(consumer)
            written, held = consumer.writes, dict(consumer.holders)
            frozen.thaw()
            await eventually(lambda: frozen.find("source endpoints is written by"), TAKEOVER_S)
            assert (consumer.writes, consumer.holders, consumer.missing) == (written, held, 0)
            assert {one.id: one.source for one in consumer.table.instances()} == {
                listed[0]: "endpoints",
                listed[1]: "endpoints",
                "r": "redis",
            }
        await redis.close()
