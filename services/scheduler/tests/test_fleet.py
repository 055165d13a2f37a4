"""The default on simulated fleets: mixed speeds, several replicas, real reports with their delays."""

from __future__ import annotations

import random
from statistics import fmean

from penstock.sim.cluster import Arrival, Outcome
from penstock.sim.spec import EngineRequest, EngineSpec

from .scheduler_lab import Lab

FAST = EngineSpec(kv_blocks=16_384, max_batch=64)
SLOW = EngineSpec(
    kv_blocks=8192,
    max_batch=32,
    prefill_tokens_per_s=2500,
    decode_step_s=0.045,
    decode_step_per_seq_s=0.0008,
)


def sessions(count: int, rate_rps: float) -> list[Arrival]:
    """Requests of which three in five go on with an earlier one's prompt."""
    rng, arrivals, at_s = random.Random(1), list[Arrival](), 1.0
    open_prompts: list[tuple[int, ...]] = []
    fresh = iter(range(1, 10**9))
    for number in range(count):
        at_s += rng.expovariate(rate_rps)
        if open_prompts and rng.random() < 0.6:
            prompt = open_prompts.pop(rng.randrange(len(open_prompts)))
        else:
            prompt = tuple(next(fresh) for _ in range(rng.randrange(5, 60)))
        prompt += tuple(next(fresh) for _ in range(rng.randrange(2, 20)))
        request = EngineRequest(f"r{number}", len(prompt) * 16 + 5, rng.randrange(20, 200), prompt)
        arrivals.append(Arrival(at_s, request))
        if len(prompt) < 200:
            open_prompts.append(prompt)
    return arrivals


def hit_ratio(outcomes: list[Outcome], arrivals: list[Arrival]) -> float:
    return sum(one.cached_tokens for one in outcomes) / sum(one.request.prompt_tokens for one in arrivals)


def test_on_a_mixed_fleet_the_default_beats_least_request_by_far() -> None:
    arrivals = sessions(700, 25.0)
    ttft, e2e = {}, {}
    for policy in ("cache-aware", "least-request"):
        outcomes = Lab([FAST] * 4 + [SLOW] * 4, policy).run(arrivals)
        assert not any(one.refused for one in outcomes)
        ttft[policy] = fmean(one.ttft_s for one in outcomes)
        e2e[policy] = fmean(one.e2e_s for one in outcomes)
    assert ttft["cache-aware"] < 0.6 * ttft["least-request"]
    assert e2e["cache-aware"] < 0.9 * e2e["least-request"]


def test_speeds_are_learned_from_what_ingresses_measure() -> None:
    lab = Lab([FAST] * 2 + [SLOW] * 2, "cache-aware")
    lab.run(sessions(300, 10.0))
    loads = lab.replicas[0].view.loads
    fast, slow = loads.ms_per_token[:2].mean(), loads.ms_per_token[2:4].mean()
    # 8,000 against 2,500 tokens a second, both seen through the decode steps they share.
    assert 2.0 < slow / fast < 4.5
    assert 1.5 < loads.tpot_ms[2:4].mean() / loads.tpot_ms[:2].mean() < 4.0


def test_four_replicas_keep_the_hits_of_one() -> None:
    arrivals = sessions(700, 40.0)
    alone = hit_ratio(Lab([FAST] * 8, "cache-aware").run(arrivals), arrivals)
    four = hit_ratio(Lab([FAST] * 8, "cache-aware", replicas=4, feed_s=0.005).run(arrivals), arrivals)
    assert alone > 0.5
    assert four >= 0.97 * alone
