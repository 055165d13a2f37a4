"""Claims that wait for their store while their requests are placed: what may happen before the answer, and
what a refusal, a loss or a client that leaves gives back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from integration.servers import eventually

from penstock.common.messages import Placement, Reason, Rejection, ScheduleRequest
from penstock.ingress.limit_settings import UserRecord
from penstock.ingress.limiter import Limiter
from penstock.ingress.limits import Correction, LocalCounts, Parts
from penstock.ingress.ports import Settled, StoreLost

from .ingress_lab import BODY, Lab

NOW = 1_700_000_040.0


class Store:
    """Counts when it is told to."""

    def __init__(self) -> None:
        self.counts, self.claims = LocalCounts(), 0
        self._asked: list[tuple[Sequence[Parts], Sequence[Correction], Settled]] = []

    def settle(self, claims: Sequence[Parts], corrections: Sequence[Correction], settled: Settled) -> None:
        self.claims += len(claims)
        self._asked.append((claims, corrections, settled))

    async def answer(self, lost: str = "") -> None:
        """To the call that is under way, or comes."""
        await eventually(lambda: self._asked)
        claims, corrections, settled = self._asked.pop()
        self.counts.correct(corrections, NOW)
        settled(StoreLost(lost) if lost else [self.counts.claim(parts, NOW) for parts in claims])

    async def close(self) -> None:
        """Nothing is held."""


@asynccontextmanager
async def counting(lab: Lab, record: UserRecord) -> AsyncIterator[tuple[Limiter, Store]]:
    """User `u` is limited in the lab's ingress, at a store."""
    store = Store()
    limiter = Limiter(lab.settings, lab.metrics, lab.gateway.degraded, lambda: NOW, store)
    limiter.allowances.put("u", record)
    lab.gateway.limits = limiter.if_active
    loop = asyncio.create_task(limiter.run())
    try:
        yield limiter, store
    finally:
        loop.cancel()
        await asyncio.gather(loop, return_exceptions=True)


async def placed(lab: Lab, count: int = 1) -> None:
    """Wait until so many placements are held for requests that may not follow them yet."""
    await eventually(lambda: len(lab.account) == count)


@pytest.mark.parametrize("first", ["store", "scheduler"])
async def test_a_request_goes_to_its_instance_once_it_is_granted_and_placed(lab: Lab, first: str) -> None:
    engine, client = await lab.engine(), await lab.client()
    async with counting(lab, UserRecord(rpm=10)) as (_, store):
        if first == "store":
            lab.bus.open.clear()
        client.post(user="u")
        if first == "scheduler":
            await placed(lab)
        await store.answer()
        await eventually(lambda: len(lab.scheduler.requests) == 1)
        if first == "store":
            assert engine.connections == 0
            lab.bus.open.set()
        peer = await engine.accept()
        await peer.request()
        peer.answer()
        response = await client.response()
        assert response.headers["x-ratelimit-remaining-requests"] == "9"
        outcome = await lab.outcome()
        assert (outcome["outcome"], outcome["status"]) == ("completed", 200)


@pytest.mark.parametrize("first", ["store", "scheduler"])
async def test_a_refusal_gives_the_placement_back_and_no_instance_hears_of_it(lab: Lab, first: str) -> None:
    engine, client = await lab.engine(), await lab.client()
    async with counting(lab, UserRecord(rpm=10)) as (limiter, store):
        store.counts.claim([p._replace(amount=10) for p in limiter.allowances.parts("u", "m", 1)], NOW)
        if first == "store":
            lab.bus.open.clear()
        client.post(user="u")
        await eventually(lambda: len(lab.scheduler.requests) == 1)
        if first == "scheduler":
            await placed(lab)
        assert engine.connections == 0
        await store.answer()
        refused = await client.response()
        assert (refused.status, refused.headers["x-error-rpm-exceeded"]) == (429, "true")
        lab.bus.open.set()
        await eventually(lambda: lab.reports() or lab.released)
        outcome = await lab.outcome()
        decision = lab.scheduler.requests[0].decision_id
        assert (outcome["outcome"], outcome["status"], outcome["decisions"]) == ("rejected", 429, [decision])
        assert outcome.get("undecided", False) is (first == "store")
        # The next one asks the store alone: its count is known to be at the limit.
        client.post(user="u")
        await store.answer()
        assert (await client.response()).status == 429
        assert len(lab.scheduler.requests) == 1
        assert (engine.connections, lab.metric("penstock_ingress_limits_total", "requests")) == (0, 2)


async def test_who_is_over_a_limit_hears_of_that_before_anything_else(lab: Lab) -> None:
    client = await lab.client()
    async with counting(lab, UserRecord(rpm=1)) as (_, store):
        # There is no instance.
        for status in (404, 429):
            client.post(user="u")
            await store.answer()
            assert (await client.response()).status == status


async def test_a_client_that_leaves_before_the_answer_gets_everything_back(lab: Lab) -> None:
    await lab.engine()
    client = await lab.client()
    async with counting(lab, UserRecord(tpm=1000)) as (limiter, store):
        client.post(BODY[:-1] + b',"max_tokens":90}', user="u")
        await placed(lab)
        client.close()
        outcome = await lab.outcome()
        assert outcome["outcome"] == "client_gone"
        await store.answer()
        await store.answer()
        (tokens,) = limiter.allowances.parts("u", "m", 1)
        assert store.counts.claim([tokens], NOW).used == (1,)


async def test_what_a_scheduler_rejects_is_told_after_the_claim(lab: Lab) -> None:
    client = await lab.client()
    engine = await lab.engine()

    def saturated(request: ScheduleRequest) -> Placement | Rejection:
        lab.scheduler.decide = lab.scheduler.first
        return Rejection(request.decision_id, Reason.SATURATED, "full", 1.0)

    async with counting(lab, UserRecord(rpm=10)) as (_, store):
        lab.scheduler.decide = saturated
        client.post(user="u")
        await eventually(lambda: lab.scheduler.requests)
        assert not lab.gateway.waiting.busy
        await store.answer()
        # It waited for capacity, and got some.
        peer = await engine.accept()
        await peer.request()
        peer.answer()
        assert (await client.response()).status == 200
        assert len(lab.scheduler.requests) == 2


async def test_while_the_store_is_lost_the_placement_is_used(lab: Lab) -> None:
    engine, client = await lab.engine(), await lab.client()
    async with counting(lab, UserRecord(rpm=10)) as (_, store):
        client.post(user="u")
        await placed(lab)
        await store.answer("away")
        peer = await engine.accept()
        await peer.request()
        peer.answer()
        assert (await client.response()).headers["x-ratelimit-remaining-requests"] == "9"
        await lab.settled()
        assert len(lab.scheduler.requests) == 1


async def test_what_is_placed_here_meanwhile_is_spread_over_the_instances(lab: Lab) -> None:
    await lab.stop_scheduler()
    engines = [await lab.engine(name) for name in ("e1", "e2")]
    clients = [await lab.client() for _ in range(8)]
    async with counting(lab, UserRecord(rpm=100)) as (_, store):
        for client in clients:
            client.post(user="u")
        await placed(lab, 8)
        while store.claims < 8:
            await store.answer()
        await store.answer()
        for engine in engines:
            for _ in range(4):
                peer = await engine.accept()
                await peer.request()
                peer.answer()
        assert [(await client.response()).status for client in clients] == [200] * 8
