"""What the prefix index remembers follows what the engines' KV caches hold."""

from __future__ import annotations

import random

import pytest

from penstock.common.identity import Identity
from penstock.common.messages import MAX_BLOCKS, EngineStatus, ScheduleBatch, ScheduleRequest
from penstock.common.model import EngineLoad
from penstock.scheduler.bench import MODEL, fleet, listing_of
from penstock.scheduler.kv_bound import FADE_BLOCKS, KvBound
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.replica import Replica


@pytest.mark.parametrize(
    ("kv_tokens", "factor", "expected"),
    [(0, 2.0, 1_000_000), (640_000, 0, 1_000_000), (640_000, 2.0, 20_000), (10, 2.0, 2 * MAX_BLOCKS)],
)
def test_the_bound_is_a_multiple_of_what_kv_caches_hold(kv_tokens: int, factor: float, expected: int) -> None:
    bound = KvBound(1_000_000, factor)
    bound.placed(tokens=640, blocks=10)
    assert bound.blocks(kv_tokens) == expected
    assert KvBound(1_000_000, factor).blocks(kv_tokens) == 1_000_000
    assert KvBound(5_000, 1e9).blocks(kv_tokens) == 5_000


def test_the_size_of_a_block_follows_the_traffic() -> None:
    bound = KvBound(10**9, 1.0)
    for tokens in (16, 64):
        for _ in range(20):
            bound.placed(tokens * FADE_BLOCKS // 2, FADE_BLOCKS // 2)
    assert bound.blocks(64 * 10**6) == pytest.approx(10**6, rel=0.01)


def test_an_index_forgets_what_engines_have_evicted() -> None:
    replica = Replica(
        Identity("scheduler", "s1", "1"),
        Catalog(Thresholds()),
        "cache-aware",
        1_000_000,
        prefix_kv_factor=2.0,
    )
    engines, rng = fleet(4), random.Random(1)
    replica.registry(listing_of(engines))
    # A block of 100 tokens: the caches together hold 3,000 blocks of engines that say so, 4,000 in all.
    for engine in engines[:3]:
        replica.status(EngineStatus(engine.id, EngineLoad(kv_blocks=6250, block_size=16)), 0.0)
    prompts = [rng.randbytes(8 * 100) for _ in range(150)]
    for number, prompt in enumerate(prompts):
        wanted = ScheduleRequest(f"d{number}", f"r{number}", MODEL, prompt_tokens=10_000, block_hashes=prompt)
        decision = replica.decide(wanted, number)
        replica.reserve(ScheduleBatch("i", "1", 50.0, (wanted,)), wanted, decision, number)
        replica.expire(number)
    assert replica.index.max_blocks == 8_000
    assert 4_000 <= len(replica.index) <= 8_000
    held = [
        bool(replica.index.match(replica.decide(again, 200.0).hashes, -1))
        for again in (
            ScheduleRequest("again", "again", MODEL, prompt_tokens=10_000, block_hashes=prompt)
            for prompt in prompts
        )
    ]
    assert (any(held[:70]), all(held[-40:])) == (False, True)
