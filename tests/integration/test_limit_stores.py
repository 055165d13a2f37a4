"""Every store of rate limits, held to the same: counts as one process does, exact under a burst of clients of
many workers, told when it is away."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
import pytest

from integration.limit_labs import STORES, StoreLab, asked, counting_ingress, within_a_minute
from integration.redis_lab import RedisServer
from integration.servers import NatsServer, eventually
from integration.stack import Stack, chat
from penstock.ingress.limits import REQUESTS, TOKENS, Correction, LocalCounts, Part, Verdict, window
from penstock.ingress.ports import LimitStore, StoreLost

pytestmark = pytest.mark.integration

SOAK = "PENSTOCK_SOAK_SECONDS" in os.environ
# Each takes two seconds to start on a slow core.
WORKERS = (1, 4, 8) if SOAK else (2,)


@pytest.fixture(params=STORES)
async def lab(request: pytest.FixtureRequest, redis: RedisServer, stack: Stack) -> AsyncIterator[StoreLab]:
    lab = StoreLab(request.param, redis, stack.nats)
    try:
        yield lab
    finally:
        await lab.close()


def part(key: str, amount: int = 1, limit: int = 10, window_s: int = 60) -> Part:
    return Part(key, window_s, amount, limit, REQUESTS, "user")


async def settled(store: LimitStore, *claims: list[Part]) -> list[Verdict]:
    return await asked(store, claims)


async def test_it_counts_as_one_process_does(lab: StoreLab) -> None:
    rng, names = random.Random(7), [f"{lab.kind} {name}" for name in "abc"]
    store, local, number = await lab.store(), LocalCounts(), 0
    for _ in range(200):
        claims = [
            [Part(rng.choice(names), s, rng.randint(1, 9), rng.choice((20, 60)), TOKENS, "") for s in (1, 60)]
            for _ in range(rng.randint(1, 6))
        ]
        corrections = [
            Correction(rng.choice(names), 60, number - rng.randint(0, 1), rng.randint(-20, 9))
            for _ in range(rng.randint(0, 1))
        ]
        verdicts = await asked(store, claims, corrections)
        now = verdicts[0].now
        local.correct(corrections, now)
        assert verdicts == [local.claim(parts, now) for parts in claims]
        number = window(now, 60)
    assert abs(now - time.time()) < 5


async def test_fifty_at_once_of_eight_processes_against_ten(lab: StoreLab) -> None:
    stores = [await lab.store() for _ in range(8)]
    await asyncio.gather(*(asked(store, []) for store in stores))

    async def burst(name: str) -> None:
        # In batches of all sizes, as turns of event loops make them.
        batches = [[[part(name)] for _ in range(size)] for size in (1, 2, 3, 4, 5, 8, 12, 15)]
        asking = (asked(store, claims) for store, claims in zip(stores, batches, strict=True))
        verdicts = [verdict for answer in await asyncio.gather(*asking) for verdict in answer]
        assert Counter(verdict.over for verdict in verdicts) == {-1: 10, 0: 40}
        (after,) = await settled(stores[0], [part(name, 1, 1)])
        assert (after.over, after.used) == (0, (10,))

    await within_a_minute(burst)


async def test_what_is_refused_is_taken_back_from_every_count(lab: StoreLab) -> None:
    one, other = await lab.store(), await lab.store()

    async def refuse(name: str) -> None:
        claim = [part(f"{name} r", 1, 5), part(f"{name} t", 60, 100)]
        assert [verdict.over for verdict in await settled(one, claim, claim)] == [-1, 1]
        (verdict,) = await settled(other, claim)
        assert (verdict.over, verdict.used) == (1, (1, 60))
        (verdict,) = await settled(one, [part(f"{name} r", 4, 5), part(f"{name} t", 40, 100)])
        assert (verdict.over, verdict.used) == (-1, (5, 100))

    await within_a_minute(refuse)


async def test_names_of_any_kind_have_counts_of_their_own(lab: StoreLab) -> None:
    names = ["", "*", ">", "a.b", "a b", "a\r\nb", "\x00", "\ud800", "ä", "x" * 1024, "penstock:limits:"]
    if lab.kind != "nats":
        # Others take UTF-8 only; headers are read with replacements.
        names.remove("\ud800")
    store = await lab.store()

    async def count(run: str) -> None:
        for name in names:
            verdicts = [(await settled(store, [part(f"{run}{name}", limit=1)]))[0] for _ in range(2)]
            assert [verdict.over for verdict in verdicts] == [-1, 0]

    await within_a_minute(count)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", STORES)
async def test_fifty_clients_of_all_workers_against_ten(
    stack: Stack, redis: RedisServer, session: aiohttp.ClientSession, kind: str, workers: int
) -> None:
    ingress = await counting_ingress(stack, redis, kind, workers, "--limits-default-rpm", "10")

    async def burst(user: str) -> None:
        asked = [chat(session, ingress.url, f"{user} {n}", headers={"user": user}) for n in range(50)]
        answers = await asyncio.gather(*asked)
        assert Counter(status for status, _, _ in answers) == {200: 10, 429: 40}
        refused = next(headers for status, headers, _ in answers if status == 429)
        assert 1 <= int(refused["retry-after"]) <= 60
        assert refused["x-error-rpm-exceeded"] == "true"
        left = sorted(int(h["x-ratelimit-remaining-requests"]) for status, h, _ in answers if status == 200)
        assert left == list(range(10))

    await within_a_minute(burst)
    ingress.process.terminate()


@pytest.mark.skipif(not SOAK, reason="long form; the short one is test_leases.py")
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", STORES)
async def test_a_burst_against_a_leased_limit_never_passes_it(
    stack: Stack, redis: RedisServer, session: aiohttp.ClientSession, kind: str, workers: int
) -> None:
    ingress = await counting_ingress(stack, redis, kind, workers, "--limits-default-rpm", "400")

    async def burst(user: str) -> None:
        statuses: Counter[int] = Counter()
        for _ in range(6):
            asked = [
                chat(session, ingress.url, "x", max_tokens=1, headers={"user": user}) for _ in range(100)
            ]
            statuses.update([status for status, _, _ in await asyncio.gather(*asked)])
        assert statuses[200] + statuses[429] == 600
        # What workers hold and do not use is at most 1 % each.
        assert 400 - 4 * workers <= statuses[200] <= 400

    await within_a_minute(burst)
    ingress.process.terminate()


async def test_without_its_server_a_store_is_lost_and_comes_back(redis: RedisServer) -> None:
    with NatsServer() as nats:
        lab = StoreLab("nats", redis, nats)
        store = await lab.store()
        try:
            assert [verdict.over for verdict in await settled(store, [part("a")])] == [-1]
            nats.kill()
            with pytest.raises(StoreLost):
                await settled(store, [part("a")])
            nats.start()

            async def back() -> bool:
                try:
                    return await settled(store, [part("a")]) != []
                except StoreLost:
                    return False

            await eventually(back)
        finally:
            await lab.close()
