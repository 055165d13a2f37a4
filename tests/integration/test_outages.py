"""Parts of the suite are killed under load: no request fails, and everything heals by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import aiohttp
import pytest

from integration.servers import eventually
from integration.stack import Load, Stack, chat, metric, running_stack

pytestmark = pytest.mark.integration


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(2)
        stack.start_discovery()
        stack.start_scheduler()
        stack.start_ingress()
        await stack.ready()
        yield stack


async def placed_by_a_scheduler(stack: Stack) -> None:
    """The first ingress asks schedulers again."""
    async with aiohttp.ClientSession() as session:

        async def asked() -> bool:
            _, headers, _ = await chat(session, stack.url, "who placed this")
            return "local" != headers["routing-strategy"]  # noqa: SIM300

        await eventually(asked, 20.0)


async def nothing_in_flight(stack: Stack) -> None:
    """Every ingress and scheduler counts nothing."""
    async with aiohttp.ClientSession() as session:

        async def empty() -> bool:
            counts = [
                await metric(session, i.admin_port, "penstock_ingress_in_flight") for i in stack.ingresses
            ]
            counts += [
                await metric(session, p, "penstock_scheduler_in_flight_requests")
                for p in stack.scheduler_ports
            ]
            return not any(counts)

        await eventually(empty, 20.0)


async def test_no_request_fails_while_the_scheduler_is_killed_and_replaced(stack: Stack) -> None:
    async with Load([stack.url]) as load:
        await load.answers(100)
        await asyncio.to_thread(stack.schedulers.pop().kill)
        stack.scheduler_ports.clear()
        await load.answers(200)
        await asyncio.to_thread(stack.start_scheduler)
        await placed_by_a_scheduler(stack)
        await load.answers(100)
        await load.stop()
        assert load.failures == []
    await nothing_in_flight(stack)


@pytest.mark.parametrize("keep_store", [True, False], ids=["with its store", "without its store"])
async def test_no_request_fails_while_nats_is_killed_and_restarted(stack: Stack, keep_store: bool) -> None:
    async with Load([stack.url]) as load:
        await load.answers(100)
        await asyncio.to_thread(stack.nats.kill)
        await load.answers(200)
        if not keep_store:
            stack.nats.wipe()
        await asyncio.to_thread(stack.nats.start)
        await placed_by_a_scheduler(stack)
        await load.answers(100)
        await load.stop()
        assert load.failures == []
    await nothing_in_flight(stack)


async def test_no_request_fails_while_discovery_is_killed(stack: Stack) -> None:
    async with Load([stack.url]) as load:
        await load.answers(50)
        assert stack.discovery is not None
        await asyncio.to_thread(stack.discovery.kill)
        await load.answers(200)
        await asyncio.to_thread(stack.start_discovery)
        await load.answers(100)
        await load.stop()
        assert load.failures == []


async def test_two_schedulers_and_two_ingresses_share_the_work_and_agree(stack: Stack) -> None:
    stack.start_scheduler()
    stack.start_ingress("--workers", "2")
    await stack.ready()
    async with Load([i.url for i in stack.ingresses], clients=24) as load, aiohttp.ClientSession() as session:
        await load.answers(400)

        async def everybody_works() -> bool:
            # A replica is asked once its heartbeat is heard, up to a second after it is ready.
            names = [(port, "scheduler_decisions") for port in stack.scheduler_ports]
            names += [(ingress.admin_port, "ingress_placements") for ingress in stack.ingresses]
            counts = [await metric(session, port, f"penstock_{name}_total") for port, name in names]
            return all(counts)

        await eventually(everybody_works)
        await load.stop()
        assert load.failures == []
    await nothing_in_flight(stack)


async def test_a_killed_worker_of_the_ingress_is_replaced(stack: Stack) -> None:
    ingress = stack.start_ingress("--workers", "2")
    await stack.ready()
    async with aiohttp.ClientSession() as session:
        pid = await _worker_pid(ingress.process.pid)
        await asyncio.to_thread(_kill, pid)

        async def restarted() -> bool:
            return await metric(session, ingress.admin_port, "penstock_ingress_worker_restarts_total") == 1

        await eventually(restarted)
    await stack.ready()
    async with Load([ingress.url]) as load:
        await load.answers(50)
        await load.stop()
        assert load.failures == []


async def _worker_pid(parent: int) -> int:
    import psutil

    return int(psutil.Process(parent).children()[0].pid)


def _kill(pid: int) -> None:
    import os
    import signal

    os.kill(pid, signal.SIGKILL)
