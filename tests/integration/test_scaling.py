"""Under load, schedulers are scaled from one to three and back, and a node of the deployed NATS cluster dies.

Each takes a third of a minute: three Pythons start and warm up, three servers agree on leaders twice.
"""

from __future__ import annotations

import asyncio
import time

import pytest

from integration.deployed_bus import DeployedStack, deployed_stack
from integration.drills import OUTAGE_S, Drill, drill
from integration.log_reader import assert_all_told
from integration.servers import eventually
from integration.stack import Stack, running_stack
from penstock.common.subjects import EVENTS, INSTANCES

pytestmark = pytest.mark.integration

LEAVES_WITHIN_S = 60.0
HEALS_WITHIN_S = 60.0


async def test_schedulers_scale_from_one_to_three_and_back_without_a_failed_request_or_a_lost_event() -> None:
    with running_stack() as stack:
        stack.start_sims(2)
        stack.start_discovery()
        stack.start_scheduler()
        stack.start_ingress("--workers", "2")
        async with drill(stack, "schedulers scaled 1, 3, 1") as d:
            until = time.monotonic() + OUTAGE_S
            while True:
                await scaled_up_and_down(stack, d)
                if time.monotonic() >= until:
                    break
        await assert_all_told(stack.events_url, d.load.ids)


async def scaled_up_and_down(stack: Stack, d: Drill) -> None:
    """The one that was there first goes too."""
    d.phase("three")
    for _ in range(2):
        await asyncio.to_thread(stack.start_scheduler)
    await d.shows("penstock_ingress_schedulers", lambda v: v == 3)
    await d.runs(OUTAGE_S / 4)
    d.phase("one again")
    for _ in range(2):
        stack.scheduler_ports.pop(0)
        leaving = stack.schedulers.pop(0)
        leaving.terminate()
        await asyncio.to_thread(leaving.assert_exit, 0, LEAVES_WITHIN_S)
    await d.shows("penstock_ingress_schedulers", lambda v: v == 1)
    await d.runs(OUTAGE_S / 4)
    await d.healed()


async def test_no_request_fails_while_a_node_of_the_nats_cluster_is_killed() -> None:
    with deployed_stack(3) as stack:
        stack.start_sims(2)
        stack.start_discovery()
        for _ in range(2):
            stack.start_scheduler()
        stack.start_ingress()
        async with drill(stack, "a node of the NATS cluster killed") as d:
            until, node = time.monotonic() + OUTAGE_S, 0
            await led(stack, EVENTS.name)
            while True:
                await node_killed(stack, d, node)
                if time.monotonic() >= until:
                    break
                node = (node + 1) % len(stack.bus.servers)
        await assert_all_told(stack.events_url, d.load.ids)
        assert stack.bus.forbidden() == []


async def led(stack: DeployedStack, stream: str) -> int:
    """Who leads a stream, once all its copies are current."""
    return await eventually(lambda: stack.bus.leader_of(stream) + 1, HEALS_WITHIN_S) - 1


async def node_killed(stack: DeployedStack, d: Drill, node: int) -> None:
    """All clients are on the first one, which they name first; leaders are anywhere."""
    d.phase(f"without {node}")
    await asyncio.to_thread(stack.bus.servers[node].kill)
    await d.runs(OUTAGE_S)
    # The others have elected new leaders: registry and log are written, requests are placed by schedulers.
    await d.healed()
    await d.shows("penstock_registry_lost", lambda v: v == 0)
    await asyncio.to_thread(stack.bus.servers[node].start)
    d.phase("all back")
    for stream in (EVENTS.name, INSTANCES.stream):
        await led(stack, stream)
    await d.healed()
