"""Multi-turn sessions through real processes: do follow-up turns land on the instance that holds them?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial

import aiohttp
from integration.servers import eventually
from integration.stack import metric

from replica_bench.fleet import Fleet, running_fleet
from replica_bench.sessions import Sessions, Tally

# Thirty processes on two busy cores take their time.
READY_S = 180.0
SPEED = ("--speedup", "10", "--max-batch", "64")


async def measure(
    replicas: int,
    *,
    workers: int,
    engines: int,
    sessions: int,
    seconds: float,
    replace: bool,
    flags: Sequence[str] = (),
) -> Tally:
    """One run, with these flags of the ingress; with `replace`, a fifth of the engines is killed at half time
    and others take their place."""
    mortal = -(-engines // 5)
    with running_fleet() as fleet:
        await asyncio.to_thread(_start, fleet, replicas, workers, engines, mortal, flags)
        await eventually(partial(_ready, fleet, replicas, engines), READY_S)
        users = Sessions(fleet.url, sessions)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(users.run(seconds), name="sessions")
            if replace:
                await asyncio.sleep(seconds / 2)
                await _replace(fleet, users, mortal)
        return users.tally


def _start(
    fleet: Fleet, replicas: int, workers: int, engines: int, mortal: int, flags: Sequence[str]
) -> None:
    fleet.start_engines(mortal, *SPEED)
    fleet.start_engines(engines - mortal, *SPEED)
    fleet.list_engines()
    fleet.start_discovery()
    for _ in range(replicas):
        fleet.start_scheduler()
    fleet.start_ingress(workers, *flags)


async def _replace(fleet: Fleet, users: Sessions, count: int) -> None:
    victim, addresses = next(iter(fleet.engines.items()))
    users.gone |= set(addresses)
    await asyncio.to_thread(victim.kill)
    del fleet.engines[victim]
    await asyncio.to_thread(fleet.start_engines, count, *SPEED)
    fleet.list_engines()


async def _ready(fleet: Fleet, replicas: int, engines: int) -> bool:
    """Every worker hears of every scheduler and engine."""
    port = int(fleet.admin_url.rsplit(":", 1)[1])
    async with aiohttp.ClientSession() as session:
        for url in (fleet.admin_url, *(f"http://127.0.0.1:{one}" for one in fleet.admin_ports)):
            try:
                async with session.get(f"{url}/readyz") as response:
                    if response.status != 200:
                        return False
            except aiohttp.ClientError:
                return False
        heard = await metric(session, port, "penstock_ingress_schedulers")
        known = await metric(session, fleet.admin_ports[0], "penstock_registry_taking_work")
        return heard >= replicas and known == engines


async def runs(
    *, workers: int, engines: int, sessions: int, seconds: float, flags: Sequence[str] = ()
) -> AsyncIterator[tuple[str, Tally]]:
    """(what, figures) of each."""
    for replicas in (1, 4):
        for replace in (False, True):
            plural = "s" if replicas > 1 else ""
            name = f"{replicas} scheduler{plural}" + (", a fifth replaced" if replace else "")
            yield (
                name,
                await measure(
                    replicas,
                    workers=workers,
                    engines=engines,
                    sessions=sessions,
                    seconds=seconds,
                    replace=replace,
                    flags=flags,
                ),
            )
