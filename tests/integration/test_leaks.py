"""Thousands of requests whose clients leave at random moments and whose engines fail at random: afterwards
everything that is held is as it was before."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from functools import partial

import aiohttp
import psutil
import pytest

from integration.drills import held_memory, until_true, upstream_connections, workers
from integration.leaving import Crowd, Leave
from integration.stack import Stack, engine_state, metric, running_stack

pytestmark = pytest.mark.integration

REQUESTS = 10_000
WARM_UP = 1_000
# Requests that hang end after this long, connections to engines are closed when idle for as long.
SHORT_S = "2"
EMPTY_WITHIN_S = 30.0
# Less than 1.3 KB a request.
GROWTH_BYTES = 12 * 1024 * 1024


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(2)
        stack.start_discovery()
        # Without the ring of the last 10,000 decisions, which fills up to its bound meanwhile.
        stack.start_scheduler("--explain", "off")
        stack.start_scheduler("--explain", "off")
        stack.start_ingress(
            *("--request-timeout", SHORT_S, "--stream-idle-timeout", SHORT_S),
            *("--upstream-idle-timeout", "1", "--header-timeout", SHORT_S),
        )
        await stack.ready()
        yield stack


async def test_nothing_is_left_of_requests_whose_clients_left_and_whose_engines_failed(stack: Stack) -> None:
    seed = int(os.environ.get("PENSTOCK_SEED", "7"))
    async with aiohttp.ClientSession() as session:
        await until_true(partial(no_connection, stack, session), EMPTY_WITHIN_S)
        rest = await held(stack, session)
        await Crowd(stack.ingresses[0].port, seed).ask(WARM_UP)
        await until_true(partial(as_before, stack, session, rest), EMPTY_WITHIN_S)
        memory = held_memory(stack)

        crowd, started = Crowd(stack.ingresses[0].port, seed + 1), time.monotonic()
        await crowd.ask(REQUESTS)
        print(
            f"\n{REQUESTS} requests in {time.monotonic() - started:.0f} s: {dict(sorted(crowd.left.items()))}"
        )
        await until_true(partial(as_before, stack, session, rest), EMPTY_WITHIN_S)
        grown = {pid: rss - memory[pid] for pid, rss in held_memory(stack).items()}
        print(f"memory grew by {grown}")
        assert all(growth < GROWTH_BYTES for growth in grown.values()), f"memory grew: {grown}"
        assert sum(crowd.left[leave] for leave in Leave) == REQUESTS
        assert all(crowd.left[leave] for leave in Leave)
        assert crowd.left["status 200"]


async def no_connection(stack: Stack, session: aiohttp.ClientSession) -> None:
    """What made the stack ready has left the pools."""
    assert not any((await upstream_connections(session, stack.ingresses[0])).values())


async def as_before(stack: Stack, session: aiohttp.ClientSession, rest: dict[str, float]) -> None:
    """Everything held is what it was at rest."""
    now = await held(stack, session)
    left = {
        name: f"{rest[name]:g} before, {count:g} after" for name, count in now.items() if count > rest[name]
    }
    assert not left, f"left behind: {left}"


async def held(stack: Stack, session: aiohttp.ClientSession) -> dict[str, float]:
    """Everything that a request takes and has to give back."""
    ingress = stack.ingresses[0]
    names = ["ingress_exchanges", "ingress_in_flight", "ingress_connections", "tasks"]
    counts = {
        f"{n} of the ingress": await metric(session, ingress.admin_port, f"penstock_{n}") for n in names
    }
    for state, count in (await upstream_connections(session, ingress)).items():
        counts[f"upstream connections {state}"] = count
    for n, port in enumerate(stack.scheduler_ports):
        for name in ("scheduler_in_flight_requests", "tasks"):
            counts[f"{name} of scheduler {n}"] = await metric(session, port, f"penstock_{name}")
    for engine in stack.engines:
        says = await engine_state(session, engine)
        counts[f"requests of {engine}"] = says["running"] + says["waiting"]
    counts["file descriptors of the worker"] = workers(ingress)[0].num_fds()
    for n, scheduler in enumerate(stack.schedulers):
        counts[f"file descriptors of scheduler {n}"] = psutil.Process(scheduler.pid).num_fds()
    return counts
