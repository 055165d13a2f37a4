"""One stack, one load, and outages of every kind in random order for PENSTOCK_SOAK_SECONDS (`make soak`)."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator

import pytest
from integration.drills import CLIENTS, OUTAGE_S, Drill, drill, frozen
from integration.stack import Stack, running_stack

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif("PENSTOCK_SOAK_SECONDS" not in os.environ, reason="takes long: make soak"),
]

SEED = int(os.environ.get("PENSTOCK_SEED", "7"))
TIMEOUTS = ("--request-timeout", "4", "--stream-idle-timeout", "4")
LONGEST_OUTAGE_S = 8.0


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(3)
        stack.start_discovery("--probe-timeout", "1")
        for _ in range(2):
            stack.start_scheduler("--prefix-index-blocks", "10000")
        stack.start_ingress("--workers", "2", *TIMEOUTS)
        yield stack


async def test_the_suite_survives_outages_in_any_order(stack: Stack) -> None:
    rng, done = random.Random(SEED), Counter[str]()
    async with drill(stack, f"soak, seed {SEED}", may_fail=of_an_engine) as d:
        until = time.monotonic() + OUTAGE_S
        while time.monotonic() < until:
            outage = rng.choice(OUTAGES)
            d.phase(outage.__name__)
            await outage(d, rng.uniform(0.5, LONGEST_OUTAGE_S))
            d.phase("between")
            await d.healed()
            done[outage.__name__] += 1
        print(f"\n{dict(done)}")
    # A client has one request at a time, and an engine that is out gets no others.
    assert len(d.load.failures) <= CLIENTS * sum(done[name] for name in ("engine_frozen", "engine_killed"))


def of_an_engine(failure: str) -> bool:
    """What clients of an engine that was killed or frozen may see."""
    return any(text in failure for text in ("upstream_timeout", "upstream_unreachable", "ClientPayloadError"))


async def scheduler_frozen(d: Drill, seconds: float) -> None:
    with frozen(d.stack.schedulers[0]):
        await d.runs(seconds)


async def schedulers_frozen(d: Drill, seconds: float) -> None:
    with frozen(*d.stack.schedulers):
        await d.runs(seconds)


async def scheduler_killed(d: Drill, seconds: float) -> None:
    d.stack.scheduler_ports.pop(0)
    await asyncio.to_thread(d.stack.schedulers.pop(0).kill)
    await d.runs(seconds)
    await asyncio.to_thread(d.stack.start_scheduler, "--prefix-index-blocks", "10000")


async def nats_frozen(d: Drill, seconds: float) -> None:
    with frozen(d.stack.nats):
        await d.runs(seconds)


async def nats_killed(d: Drill, seconds: float) -> None:
    await asyncio.to_thread(d.stack.nats.kill)
    await d.runs(seconds)
    await asyncio.to_thread(d.stack.nats.start)


async def nats_emptied(d: Drill, seconds: float) -> None:
    await asyncio.to_thread(d.stack.nats.kill)
    d.stack.nats.wipe()
    await d.runs(seconds)
    await asyncio.to_thread(d.stack.nats.start)


async def discovery_frozen(d: Drill, seconds: float) -> None:
    assert d.stack.discovery is not None
    with frozen(d.stack.discovery):
        await d.runs(seconds)


async def discovery_killed(d: Drill, seconds: float) -> None:
    assert d.stack.discovery is not None
    await asyncio.to_thread(d.stack.discovery.kill)
    await d.runs(seconds)
    await asyncio.to_thread(d.stack.start_discovery, "--probe-timeout", "1")


async def engine_frozen(d: Drill, seconds: float) -> None:
    with frozen(d.stack.sims[1]):
        await d.runs(seconds)


async def engine_killed(d: Drill, seconds: float) -> None:
    await asyncio.to_thread(d.stack.sims[0].kill)
    await d.runs(seconds)
    await asyncio.to_thread(d.stack.restart_sim, 0)


OUTAGES: tuple[Callable[[Drill, float], Awaitable[None]], ...] = (
    scheduler_frozen,
    schedulers_frozen,
    scheduler_killed,
    nats_frozen,
    nats_killed,
    nats_emptied,
    discovery_frozen,
    discovery_killed,
    engine_frozen,
    engine_killed,
)
