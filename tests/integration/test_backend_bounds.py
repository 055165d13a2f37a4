"""The bounds of backend traffic over several workers, before a simulated engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest

from integration.drills import workers
from integration.servers import eventually
from integration.stack import MODEL, Ingress, Stack, chat, engine_state, messages, metric, running_stack

pytestmark = pytest.mark.integration

MOST = 3


@asynccontextmanager
async def stream(ingress: Ingress) -> AsyncIterator[aiohttp.ClientResponse]:
    """A request under way, on a connection of its own; the kernel says at which worker."""
    body = {"model": MODEL, "messages": messages("long"), "max_tokens": 5000, "stream": True}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{ingress.url}/v1/chat/completions", json=body) as response,
    ):
        if response.status == 200:
            await response.content.readline()
        yield response


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Two ingresses of two workers: one bounds requests, the other connections."""
    with running_stack() as stack:
        stack.start_sims(1, "--speedup", "1")
        stack.start_discovery()
        bounds = ("--backend-max-parallel-requests", str(MOST), "--backend-max-pending-requests", "0")
        stack.start_ingress("--workers", "2", *bounds)
        stack.start_ingress("--workers", "2", "--backend-max-connections", "1")
        yield stack


async def test_requests_of_one_worker_do_not_wait_for_idle_connections_of_another(stack: Stack) -> None:
    await stack.ready()
    ingress = stack.ingresses[1]

    async def one(number: int) -> int:
        async with aiohttp.ClientSession() as session:
            return (await chat(session, ingress.url, f"{number}", max_tokens=1))[0]

    assert set(await asyncio.gather(*map(one, range(40)))) == {200}


async def test_the_bounds_count_the_requests_of_all_workers(stack: Stack) -> None:
    await stack.ready()
    ingress = stack.ingresses[0]
    async with aiohttp.ClientSession() as session, AsyncExitStack() as exits:
        for _ in range(MOST):
            response = await exits.enter_async_context(stream(ingress))
            assert response.status == 200
        for _ in range(8):
            async with stream(ingress) as refused:
                error = (await refused.json())["error"]
                assert (refused.status, error["code"]) == (503, "overloaded")
                assert refused.headers["x-envoy-overloaded"] == "true"
        overflows = "penstock_ingress_upstream_overflow_total"
        assert await metric(session, ingress.admin_port, overflows) == 8
        state = await engine_state(session, stack.engines[0])
        assert state["running"] + state["waiting"] == MOST
        # What a worker held that was killed is not counted any more.
        for victim in workers(ingress):
            victim.kill()

        async def served() -> bool:
            try:
                return (await chat(session, ingress.url, "short", max_tokens=1))[0] == 200
            except aiohttp.ClientError:
                return False

        await eventually(served)
