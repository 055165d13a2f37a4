"""The formulas of other gateways, on worked cases, and the index that reads true caches."""

from collections.abc import Sequence
from random import Random

import pytest

from penstock.cli.replay.oracle import TrueCaches
from penstock.cli.replay.references import AibrixPrefixCache, LlumnixLoadBalance
from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest, EngineSpec, TokenEvent

SPEC = EngineSpec(kv_blocks=1000, block_size=100)
PROMPT = (1, 2, 3, 4)


def fleet(count: int) -> list[Engine]:
    return [Engine(SPEC) for _ in range(count)]


def request(name: str, hashes: Sequence[int] = PROMPT, tokens: int = 400) -> EngineRequest:
    return EngineRequest(name, tokens, 1, tuple(hashes))


def warm(engine: Engine, hashes: Sequence[int]) -> None:
    """Let an engine have computed a prompt of these blocks, and finish it."""
    engine.submit(EngineRequest("warm", 100 * len(hashes), 1, tuple(hashes)), 0.0)
    while engine.start_step(0.0) is not None:
        engine.end_step(0.0)


def aibrix(instances: int = 3) -> AibrixPrefixCache:
    return AibrixPrefixCache(Random(1), instances, 100)


def test_aibrix_follows_the_longest_match_within_its_bounds() -> None:
    policy = aibrix()
    chosen = policy.decide(request("a"), 0.0, [])
    assert policy.decide(request("b"), 1.0, []) == chosen
    # A difference of eight is below the guard, and 8 <= mean 2.7 + 2 x 4.6.
    policy.running = [8 if one == chosen else 0 for one in range(3)]
    assert policy.decide(request("c"), 2.0, []) == chosen


def test_aibrix_leaves_the_match_when_it_has_twenty_requests_more() -> None:
    policy = aibrix()
    chosen = policy.decide(request("a"), 0.0, [])
    policy.running = [20 if one == chosen else 0 for one in range(3)]
    assert policy.decide(request("b"), 1.0, []) != chosen


def test_aibrix_leaves_a_match_far_above_the_mean() -> None:
    policy = aibrix(10)
    chosen = policy.decide(request("a"), 0.0, [])
    # Mean 1.6, deviation 5.06: twelve are within the guard, and 16 above 1.6 + 2 x 5.06.
    policy.running = [16 if one == chosen else 0 for one in range(10)]
    assert policy.decide(request("b"), 1.0, []) != chosen


def test_aibrix_forgets_after_twenty_minutes_and_beyond_its_table() -> None:
    policy = aibrix()
    policy.running = [5, 0, 5]
    assert policy.decide(request("a"), 0.0, []) == 1
    policy.running = [5, 2, 1]
    assert policy.decide(request("b"), 1300.0, []) == 2
    for number in range(200):
        policy.decide(request("x", range(1000 * number, 1000 * number + 400)), 1301.0, [])
    assert len(policy.table) == 64_000


def test_aibrix_counts_running_requests_down_when_they_end() -> None:
    policy = aibrix(1)
    policy.decide(request("a"), 0.0, [])
    policy.observe(TokenEvent("a", 1, finished=False, cached_tokens=0), 0, 1.0)
    assert policy.running == [1]
    policy.observe(TokenEvent("a", 2, finished=True, cached_tokens=0), 0, 2.0)
    assert policy.running == [0]


@pytest.mark.parametrize(("as_coded", "chosen"), [(False, "the best cache"), (True, "one without any")])
def test_llumnix_prefers_the_instance_that_misses_least(as_coded: bool, chosen: str) -> None:
    engines = fleet(3)
    warm(engines[0], PROMPT[:2])
    warm(engines[1], PROMPT[:3])
    policy = LlumnixLoadBalance(Random(1), cache_aware=True, as_coded=as_coded, min_tokens=100)
    names = {0: "a worse cache", 1: "the best cache", 2: "one without any"}
    assert names[policy.decide(request("a"), 1.0, engines)] == chosen


def test_llumnix_leaves_out_the_overloaded_while_there_are_others() -> None:
    engines = fleet(2)
    warm(engines[0], PROMPT)
    engines[0].submit(request("ahead", (), 8192), 0.0)
    policy = LlumnixLoadBalance(Random(1), cache_aware=True, min_tokens=100)
    assert policy.decide(request("a"), 1.0, engines) == 1
    engines[1].submit(request("ahead", (), 9000), 0.0)
    assert policy.decide(request("a"), 1.0, engines) == 0


def test_uncomputed_tokens_are_those_of_waiting_and_running_prompts_less_the_cached() -> None:
    (engine,) = fleet(1)
    warm(engine, PROMPT)
    assert engine.uncomputed_prompt_tokens == 0
    engine.submit(request("a", (1, 2, 3, 9), 2000), 0.0)
    assert engine.uncomputed_prompt_tokens == 1700
    engine.start_step(0.0)
    engine.end_step(0.1)
    assert engine.uncomputed_prompt_tokens == 1700 - SPEC.step_token_budget


def test_true_caches_tell_what_each_engine_holds_now() -> None:
    engines = fleet(4)
    warm(engines[0], PROMPT[:2])
    warm(engines[1], PROMPT)
    warm(engines[3], PROMPT[:2])
    index = TrueCaches(engines)
    assert index.match(PROMPT, 0b1111) == [(2, 0b1011), (4, 0b0010)]
    assert index.match(PROMPT, 0b1001) == [(2, 0b1001)]
    assert index.match((7, 8), 0b1111) == []
    index.insert((7, 8), 2)
    assert index.match((7, 8), 0b1111) == []
