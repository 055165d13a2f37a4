"""Parts of the suite are killed and started again under load: no request fails, and everything heals."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import aiohttp
import pytest

from integration.drills import OUTAGE_S, drill
from integration.servers import eventually
from integration.stack import Load, Stack, metric, running_stack

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """Shared: a test that leaves something behind fails the next one."""
    with running_stack() as stack:
        stack.start_sims(2)
        stack.start_discovery()
        for _ in range(2):
            stack.start_scheduler()
        stack.start_ingress()
        yield stack


async def test_no_request_fails_while_one_of_two_schedulers_is_killed_and_replaced(stack: Stack) -> None:
    async with drill(stack, "one of two schedulers killed") as d:
        stack.scheduler_ports.pop()
        await asyncio.to_thread(stack.schedulers.pop().kill)
        port = stack.scheduler_ports[0]
        await d.shows("penstock_scheduler_replicas", lambda v: v == 1, port)
        await d.shows("penstock_ingress_schedulers", lambda v: v == 1)
        await d.said(stack.schedulers[0], "a scheduler is silent")
        await d.logged("degraded", what="a scheduler", active=True)
        await d.runs(OUTAGE_S)
        await asyncio.to_thread(stack.start_scheduler)
        await d.shows("penstock_scheduler_replicas", lambda v: v == 2, port)
        await d.logged("degraded", what="a scheduler", active=False)
        await d.healed()


@pytest.mark.parametrize("keep_store", [True, False], ids=["with its store", "without its store"])
async def test_no_request_fails_while_nats_is_killed_and_restarted(stack: Stack, keep_store: bool) -> None:
    name = "NATS killed, restarted " + ("with its store" if keep_store else "without its store")
    async with drill(stack, name) as d:
        await asyncio.to_thread(stack.nats.kill)
        await d.shows("penstock_ingress_placing_locally", lambda v: v == 1)
        await d.shows("penstock_registry_lost", lambda v: v == 1)
        for line in ("placing locally", "connection to the bus lost"):
            await d.said(stack.ingresses[0].process, line)
        await d.runs(OUTAGE_S)
        if not keep_store:
            stack.nats.wipe()
        await asyncio.to_thread(stack.nats.start)
        await d.healed()
        await d.shows("penstock_registry_lost", lambda v: v == 0)
        for what in ("placing locally", "registry"):
            # Said while there was no log to say it in.
            await d.logged("degraded", what=what, active=True)
            await d.logged("degraded", what=what, active=False)


async def test_no_request_fails_while_discovery_is_killed_and_restarted(stack: Stack) -> None:
    async with drill(stack, "discovery killed") as d:
        assert stack.discovery is not None
        port = stack.scheduler_ports[0]
        await asyncio.to_thread(stack.discovery.kill)
        await d.shows("penstock_scheduler_discoveries", lambda v: v == 0, port)
        await d.said(stack.schedulers[0], "discovery is silent")
        await d.logged("degraded", what="discovery", active=True)
        await d.runs(OUTAGE_S)
        await asyncio.to_thread(stack.start_discovery)
        await d.logged("degraded", what="discovery", active=False)
        await d.healed()


async def test_two_schedulers_and_two_ingresses_share_the_work_and_agree(stack: Stack) -> None:
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
