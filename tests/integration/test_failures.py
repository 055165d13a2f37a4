"""Parts of the suite freeze and engines freeze, die and come back under load, each for OUTAGE_S.

Parts that are killed and started again are in test_outages.py.
The stack is shared: it has to heal by itself, so a drill that leaves something behind fails the next one.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import aiohttp
import pytest

from integration.drills import CLIENTS, OUTAGE_S, drill, frozen, workers
from integration.servers import eventually
from integration.stack import Stack, chat, running_stack, stream_chat

pytestmark = pytest.mark.integration

REQUEST_TIMEOUT_S = 4
TIMEOUTS = ("--request-timeout", str(REQUEST_TIMEOUT_S), "--stream-idle-timeout", str(REQUEST_TIMEOUT_S))


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(3)
        stack.start_discovery("--probe-timeout", "1")
        stack.start_scheduler()
        stack.start_ingress(*TIMEOUTS)
        yield stack


async def test_no_request_fails_while_the_only_scheduler_is_frozen(stack: Stack) -> None:
    async with drill(stack, "scheduler frozen") as d:
        with frozen(stack.schedulers[0]):
            await d.shows("penstock_ingress_placing_locally", lambda v: v == 1)
            await d.said(stack.ingresses[0].process, "placing locally")
            await d.logged("degraded", what="placing locally", active=True)
            await d.runs(OUTAGE_S)
        await d.healed()
        await d.logged("degraded", what="placing locally", active=False)


async def test_no_request_fails_while_one_of_three_schedulers_is_frozen(stack: Stack) -> None:
    for _ in range(2):
        stack.start_scheduler()
    try:
        async with drill(stack, "one of three schedulers frozen") as d:
            with frozen(stack.schedulers[1]):
                before = await d.timed_out()
                await d.shows("penstock_ingress_schedulers", lambda v: v == 2)
                await d.said(stack.ingresses[0].process, "a scheduler does not answer")
                await d.said(stack.schedulers[0], "a scheduler is silent")
                for what in ("avoiding a scheduler", "a scheduler"):
                    await d.logged("degraded", what=what, active=True)
                first = await d.timed_out() - before
                d.phase("avoided")
                await d.runs(OUTAGE_S)
                later = await d.timed_out() - before - first
            d.notes.append(f"attempts without an answer: {first:g} at first, {later:g} once it is avoided")
            # A third of them without the avoiding; what is left allows for a machine that stalls.
            assert later < 0.05 * len(d.load.phases[-1].seconds)
            for what in ("avoiding a scheduler", "a scheduler"):
                await d.logged("degraded", what=what, active=False)
            await d.shows("penstock_ingress_schedulers", lambda v: v == 3)
            await d.healed()
    finally:
        for _ in range(2):
            stack.scheduler_ports.pop()
            await asyncio.to_thread(stack.schedulers.pop().kill)


async def test_no_request_fails_while_all_schedulers_are_gone(stack: Stack) -> None:
    async with drill(stack, "no scheduler") as d:
        stack.scheduler_ports.clear()
        await asyncio.to_thread(stack.schedulers.pop().kill)
        await d.shows("penstock_ingress_placing_locally", lambda v: v == 1)
        await d.said(stack.ingresses[0].process, "placing locally")
        await d.logged("degraded", what="placing locally", active=True)
        await d.runs(OUTAGE_S)
        await asyncio.to_thread(stack.start_scheduler)
        await d.healed()
        await d.logged("degraded", what="placing locally", active=False)


async def test_no_request_fails_while_nats_is_frozen(stack: Stack) -> None:
    async with drill(stack, "NATS frozen") as d:
        with frozen(stack.nats):
            await d.shows("penstock_ingress_placing_locally", lambda v: v == 1)
            await d.shows("penstock_registry_lost", lambda v: v == 1)
            await d.said(stack.ingresses[0].process, "placing locally")
            await d.said(stack.ingresses[0].process, "connection to the bus lost")
            await d.runs(OUTAGE_S)
        await d.healed()
        await d.shows("penstock_registry_lost", lambda v: v == 0)
        # The log is on the frozen server: what was said meanwhile is stored once it is back.
        for what in ("placing locally", "registry"):
            await d.logged("degraded", what=what, active=True)
            await d.logged("degraded", what=what, active=False)


async def test_no_request_fails_while_discovery_is_frozen(stack: Stack) -> None:
    assert stack.discovery is not None
    async with drill(stack, "discovery frozen") as d:
        port = stack.scheduler_ports[0]
        with frozen(stack.discovery):
            await d.shows("penstock_scheduler_discoveries", lambda v: v == 0, port)
            await d.said(stack.schedulers[0], "discovery is silent")
            await d.logged("degraded", what="discovery", active=True)
            await d.runs(OUTAGE_S)
        await d.logged("degraded", what="discovery", active=False)
        await d.shows("penstock_scheduler_discoveries", lambda v: v == 1, port)
        await d.healed()


async def test_a_killed_worker_takes_only_its_own_connections_along(stack: Stack) -> None:
    ingress = stack.start_ingress("--workers", "2", *TIMEOUTS)
    stack.ingresses.reverse()
    lost: list[int] = []
    try:
        async with drill(stack, "one of two workers killed", may_fail=lambda _: True, clients=16) as d:
            victim = workers(ingress)[0]
            victim.suspend()
            lost.append(sum(c.laddr.port == ingress.port for c in victim.net_connections()))
            victim.kill()
            await d.shows("penstock_ingress_worker_restarts_total", lambda v: v == 1)
            await d.said(ingress.process, "worker ended, restarting it")
            await d.logged("degraded", what="worker")
            await d.runs(OUTAGE_S)
            await d.healed()
        assert 0 < lost[0] < 16
        assert len(d.load.failures) <= lost[0], d.load.failures
    finally:
        stack.ingresses.reverse()
        stack.ingresses.pop().process.kill()


async def test_a_killed_engine_fails_only_what_ran_on_it(stack: Stack) -> None:
    victim, discovery = stack.engines[0], stack.discovery
    assert discovery is not None
    async with drill(stack, "engine killed", may_fail=lambda _: True) as d:
        await asyncio.to_thread(stack.sims[0].kill)
        await d.shows("penstock_registry_taking_work", lambda v: v == 2)
        await d.logged("instance", instance=victim, change="unhealthy")
        await d.said(discovery, "instance unhealthy")
        await d.runs(OUTAGE_S)
        await asyncio.to_thread(stack.restart_sim, 0)
        await d.used(victim)
        await d.logged("instance", instance=victim, change="recovered")
    # A client has one request at a time.
    assert len(d.load.failures) <= CLIENTS, d.load.failures
    assert all("upstream_unreachable" in f or "ClientPayloadError" in f for f in d.load.failures)


async def test_requests_stuck_on_a_frozen_engine_end_at_their_timeout_and_no_others(stack: Stack) -> None:
    victim, discovery = stack.engines[1], stack.discovery
    assert discovery is not None

    def stuck(failure: str) -> bool:
        return "upstream_timeout" in failure

    async with drill(stack, "engine frozen", may_fail=stuck) as d:
        with frozen(stack.sims[1]):
            await d.shows("penstock_registry_taking_work", lambda v: v == 2)
            await d.logged("instance", instance=victim, change="unhealthy")
            await d.said(discovery, "instance unhealthy")
            d.phase("out")
            await d.runs(max(OUTAGE_S, REQUEST_TIMEOUT_S))
            d.phase("later")
            await d.runs(OUTAGE_S)
            assert d.load.phases[-1].failures == 0
        await d.used(victim)
        await d.logged("instance", instance=victim, change="recovered")


async def test_a_stream_that_its_engine_broke_off_does_not_cost_the_clients_next_request(
    stack: Stack,
) -> None:
    await stack.ready()
    one_connection = aiohttp.TCPConnector(limit=1)
    async with aiohttp.ClientSession(connector=one_connection) as session:
        for n in range(20):
            fault = {"x-sim-fault": "drop-mid-stream;tokens=2"}
            payloads = [p async for p in stream_chat(session, stack.url, f"stream {n}", headers=fault)]
            assert "upstream_unreachable" in payloads[-1]
            status, _, _ = await chat(session, stack.url, f"next {n}")
            assert status == 200


async def test_no_request_fails_while_an_engine_refuses_connections(stack: Stack) -> None:
    async with drill(stack, "engine refusing") as d:
        fault = {"kind": "refuse", "ms": int(max(OUTAGE_S, 3) * 1000), "count": 1}
        async with d.session.post(f"http://{stack.engines[2]}/sim/fault", json=fault) as response:
            assert response.status < 300, await response.text()
        await d.shows("penstock_registry_taking_work", lambda v: v == 2)
        await d.logged("instance", instance=stack.engines[2], change="unhealthy")
        await d.runs(OUTAGE_S)
        await d.shows("penstock_registry_taking_work", lambda v: v == 3)
        await d.used(stack.engines[2])
        await d.logged("instance", instance=stack.engines[2], change="recovered")


async def test_a_slow_engine_fails_nothing_and_shows_in_the_outcomes(stack: Stack) -> None:
    def slow(line: str) -> bool:
        """The line of a request, which is its outcome event, names the engine and the time it took."""
        said = json.loads(line)
        return bool(said.get("instance") == stack.engines[2] and said.get("ttft_ms", 0) >= 500)

    async with drill(stack, "engine slow") as d:
        async with d.session.post(
            f"http://{stack.engines[2]}/sim/fault", json={"kind": "slow-start", "ms": 500}
        ) as response:
            assert response.status < 300, await response.text()
        await eventually(lambda: any(slow(line) for line in stack.ingresses[0].process.lines))
        await d.runs(OUTAGE_S)
        async with d.session.delete(f"http://{stack.engines[2]}/sim/fault") as response:
            assert response.status < 300, await response.text()
