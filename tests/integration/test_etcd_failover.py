"""Members of etcd die, lose their data and come back under load; no request fails, every answer is checked.

The scenarios are those of the reference gateway's failover test, which sends no traffic.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest

from integration.drills import OUTAGE_S, Drill, Event, drill
from integration.etcd_lab import EtcdLab, Sidecar, running_etcd
from integration.etcd_store import PREFIX, written
from integration.servers import eventually
from integration.source_contract import instance
from integration.stack import Stack, engine_state, running_stack

pytestmark = pytest.mark.integration

LEASE_S = 5
# `make soak` prolongs the outages.
LONGER_S = OUTAGE_S if OUTAGE_S > 10 else 0.0
# Every test registers the same engines anew, which is no flapping.
FLAGS = ("--probe-flap-window", "0")


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdLab]:
    with running_etcd(3) as etcd:
        yield etcd


@pytest.fixture(scope="module")
def stack(etcd: EtcdLab) -> Iterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(3)
        stack.start_discovery_of("etcd", "--discovery-etcd-endpoints", etcd.endpoints, *FLAGS)
        stack.start_scheduler()
        stack.start_ingress()
        yield stack


@dataclass
class Fleet:
    """A sidecar beside each engine, as long as it is said to be registered."""

    etcd: EtcdLab
    stack: Stack
    sidecars: dict[int, AsyncExitStack] = field(default_factory=dict)

    async def register(self, *numbers: int) -> None:
        for number in numbers:
            port = self.stack.engines[number].rpartition(":")[2]
            record = written(instance(f"engine-{number}", int(port)))
            running = self.sidecars[number] = AsyncExitStack()
            await running.enter_async_context(Sidecar(self.etcd, f"{PREFIX}engine-{number}", record, LEASE_S))

    async def all_written(self) -> bool:
        """Whether etcd holds what the sidecars say."""
        keys = await asyncio.to_thread(self.etcd.ctl, "get", PREFIX, "--prefix", "--keys-only")
        return set(keys.split()) == {f"{PREFIX}engine-{number}" for number in self.sidecars}

    async def withdraw(self, *numbers: int) -> None:
        for number in numbers:
            await self.sidecars.pop(number).aclose()


@pytest.fixture
async def fleet(etcd: EtcdLab, stack: Stack) -> AsyncIterator[Fleet]:
    """Two of the three engines are registered."""
    fleet = Fleet(etcd, stack)
    await fleet.register(0, 1)
    yield fleet
    await fleet.withdraw(*list(fleet.sidecars))


async def changes_arrive(d: Drill, fleet: Fleet) -> None:
    """A third engine registers, is used, and withdraws without a failed request."""
    before = len(d.log)
    await fleet.register(2)
    await d.used(fleet.stack.engines[2])
    await fleet.withdraw(2)
    await eventually(lambda: "engine-2" in removed(d.log[before:]))


async def left_alone(d: Drill, engine: str) -> None:
    """Nothing runs on it, and of many requests none goes there."""

    async def passed_over() -> bool:
        before = await engine_state(d.session, engine)
        await d.load.answers(50)
        after = await engine_state(d.session, engine)
        return bool(before == {**after, "running": 0, "waiting": 0})

    await eventually(passed_over)


def removed(log: list[Event]) -> list[str]:
    """Instances that discovery took out of the registry."""
    return [str(data["instance"]) for kind, data in log if kind == "instance" and data["change"] == "removed"]


async def test_all_is_well_and_then_one_member_dies(fleet: Fleet, stack: Stack, etcd: EtcdLab) -> None:
    async with drill(stack, "etcd: the leader killed") as d:
        await changes_arrive(d, fleet)
        leader = await asyncio.to_thread(etcd.leader)
        leader.kill()
        await changes_arrive(d, fleet)
        await asyncio.to_thread(etcd.start, leader)
        assert set(removed(d.log)) == {"engine-2"}


async def test_a_majority_dies(fleet: Fleet, stack: Stack, etcd: EtcdLab) -> None:
    async with drill(stack, "etcd: two of three members killed") as d:
        for member in etcd.members[:2]:
            member.kill()
        await d.logged("degraded", what="source etcd", active=True)
        await d.runs(LONGER_S)
        await asyncio.to_thread(etcd.start, *etcd.members[:2])
        await d.logged("degraded", what="source etcd", active=False)
        await changes_arrive(d, fleet)
        assert set(removed(d.log)) == {"engine-2"}


async def test_all_members_die_and_lose_their_data(fleet: Fleet, stack: Stack, etcd: EtcdLab) -> None:
    async with drill(stack, "etcd: all members killed, data wiped") as d:
        for member in etcd.members:
            member.kill()
        await d.runs(LONGER_S)
        await asyncio.to_thread(etcd.restart_empty)
        await changes_arrive(d, fleet)
        await eventually(fleet.all_written)
        assert set(removed(d.log)) == {"engine-2"}


async def test_an_engine_restarts(fleet: Fleet, stack: Stack) -> None:
    """Its sidecar withdraws first, as on a rolling update, and registers it again under the same id."""
    async with drill(stack, "etcd: an engine restarts") as d:
        await fleet.withdraw(1)
        await eventually(lambda: "engine-1" in removed(d.log))
        await left_alone(d, stack.engines[1])
        await asyncio.to_thread(stack.sims[1].kill)
        await asyncio.to_thread(stack.restart_sim, 1)
        await fleet.register(1)
        await d.used(stack.engines[1])
