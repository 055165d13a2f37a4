"""Replicas of the scheduler are replaced and frozen under load: no request fails, no session moves.

The freeze has to outlast the time after which a replica is warmed again, so this takes a quarter of a minute.
"""

from __future__ import annotations

import asyncio

import aiohttp
import pytest

from integration.drills import Drill, drill, labelled, until_true
from integration.servers import eventually
from integration.stack import Stack, chat, running_stack

pytestmark = pytest.mark.integration

SESSIONS = 24
FROZEN_S = 6.0


def prompt(session: int, turn: int) -> str:
    """Nine blocks of its own, and two more in each turn."""
    return f"session {session} ".ljust(2300, ".") + " and more".ljust(512, ".") * turn


async def turn(
    session: aiohttp.ClientSession, stack: Stack, number: int, strategy: str = "prefix-cache"
) -> list[str]:
    """Where the next turn of each session went; every one was placed by a scheduler."""
    targets = []
    for one in range(SESSIONS):
        status, headers, body = await chat(
            session, stack.url, prompt(one, number), headers={"routing-strategy": strategy}
        )
        assert status == 200, body
        assert headers["routing-strategy"] == strategy
        targets.append(headers["target-pod"])
    return targets


async def replaced(stack: Stack, d: Drill, index: int) -> None:
    """A replica is killed once another one has taken its place."""
    await asyncio.to_thread(stack.start_scheduler)
    port = stack.scheduler_ports[-1]
    await asyncio.to_thread(stack.schedulers[-1].wait_for_line, '"taking requests"')
    assert (await labelled(d.session, port, "penstock_scheduler_warm_ups_total", "end"))["snapshot"] == 1
    await d.shows("penstock_ingress_schedulers", lambda v: v == 3)
    await asyncio.to_thread(stack.schedulers.pop(index).kill)
    stack.scheduler_ports.pop(index)
    await d.shows("penstock_ingress_schedulers", lambda v: v == 2)


async def test_no_request_fails_and_no_session_moves_while_every_replica_is_replaced_and_one_frozen() -> None:
    with running_stack() as stack:
        stack.start_sims(3)
        stack.start_discovery()
        for _ in range(2):
            stack.start_scheduler()
        stack.start_ingress()
        await stack.ready()
        async with aiohttp.ClientSession() as quiet:
            homes = await turn(quiet, stack, 0)
        assert len(set(homes)) == 3
        async with drill(stack, "every scheduler replaced", clients=6) as d:
            await replaced(stack, d, 0)
            await replaced(stack, d, 0)
            assert await turn(d.session, stack, 1) == homes
            d.phase("frozen")
            stack.schedulers[0].freeze()
            await d.shows("penstock_ingress_schedulers", lambda v: v == 1)
            later = await turn(d.session, stack, 2)
            await d.runs(FROZEN_S)
            stack.schedulers[0].thaw()
            await d.said(stack.schedulers[0], "the loop stood still")
            d.phase("thawed")
            port = stack.scheduler_ports[0]

            async def warmed_again() -> None:
                ends = await labelled(d.session, port, "penstock_scheduler_warm_ups_total", "end")
                assert ends["snapshot"] == 2

            await until_true(warmed_again, 60.0)
            await d.shows("penstock_ingress_schedulers", lambda v: v == 2)
            # From here on the one that was frozen answers alone.
            await asyncio.to_thread(stack.schedulers.pop(1).kill)
            stack.scheduler_ports.pop(1)
            await eventually(lambda: d.load.answered > 0)
            await d.shows("penstock_ingress_schedulers", lambda v: v == 1)
            assert later == homes
            assert await turn(d.session, stack, 3) == homes


async def test_a_lone_scheduler_that_is_killed_and_started_again_sends_sessions_where_they_were() -> None:
    with running_stack() as stack:
        stack.start_sims(3)
        stack.start_discovery()
        stack.start_scheduler()
        stack.start_ingress()
        await stack.ready()
        async with aiohttp.ClientSession() as session:
            # Where chance sent them nobody would guess.
            homes = await turn(session, stack, 0, "random")
            assert len(set(homes)) == 3
            await asyncio.to_thread(stack.schedulers.pop().kill)
            stack.scheduler_ports.pop()
            await asyncio.to_thread(stack.start_scheduler)
            await asyncio.to_thread(stack.schedulers[-1].wait_for_line, '"taking requests"')
            await stack.ready()
            ends = await labelled(
                session, stack.scheduler_ports[-1], "penstock_scheduler_warm_ups_total", "end"
            )
            assert ends["replay"] == 1
            assert await turn(session, stack, 1) == homes
