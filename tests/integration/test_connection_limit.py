"""The bound of client connections, over several workers and across the death of one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest

from integration.drills import workers
from integration.servers import eventually
from integration.stack import Ingress, metric, running_stack

pytestmark = pytest.mark.integration

LIMIT, WORKERS, CLIENTS = 10, 2, 40
# Each worker may let one in that another let in at the same moment.
MOST = LIMIT + WORKERS - 1


@asynccontextmanager
async def crowd(ingress: Ingress) -> AsyncIterator[Callable[[], int]]:
    """Clients that connect and say nothing; how many of them are let in so far."""
    streams = [await asyncio.open_connection("127.0.0.1", ingress.port) for _ in range(CLIENTS)]

    def kept() -> int:
        return sum(not reader.at_eof() and reader.exception() is None for reader, _ in streams)

    await eventually(lambda: kept() <= MOST)
    yield kept
    for _, writer in streams:
        writer.close()


async def test_the_connection_limit_counts_the_clients_of_all_workers() -> None:
    with running_stack() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        ingress = stack.start_ingress("--workers", str(WORKERS), "--connection-limit", str(LIMIT))
        await stack.ready()
        async with aiohttp.ClientSession() as session:

            async def clients() -> float:
                return await metric(session, ingress.admin_port, "penstock_ingress_connections")

            async with crowd(ingress) as kept:
                refused = "penstock_ingress_connections_refused_total"

                async def told_apart() -> bool:
                    return await metric(session, ingress.admin_port, refused) == CLIENTS - kept()

                await eventually(told_apart)
                assert LIMIT <= kept() <= MOST
                assert any("--connection-limit" in line for line in ingress.process.lines)
                victim, *_ = workers(ingress)
                victim.kill()
                name = "penstock_ingress_worker_restarts_total"
                await eventually(lambda: metric(session, ingress.admin_port, name))
            await stack.ready()

            async def empty() -> bool:
                return not await clients()

            await eventually(empty)
            # What the dead worker held is not counted any more.
            async with crowd(ingress) as kept:
                assert LIMIT <= kept() <= MOST
