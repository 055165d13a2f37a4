"""Clusters on a virtual clock."""

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from penstock.sim.cluster import Arrival, Cluster, Outcome
from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest, EngineSpec, TokenEvent

SPEC = EngineSpec(
    max_batch=2,
    prefill_tokens_per_s=100.0,
    step_token_budget=100,
    decode_step_s=1.0,
    decode_step_per_seq_s=0.1,
    kv_blocks=20,
    block_size=10,
)


# Typed so that outcomes may hold it in place of a number.
approx: Any = pytest.approx


def engines(count: int) -> list[Engine]:
    return [Engine(SPEC) for _ in range(count)]


def load(engine: Engine) -> int:
    return engine.running + engine.waiting


def least_loaded(request: EngineRequest, now: float, candidates: Sequence[Engine]) -> int:
    return min(range(len(candidates)), key=lambda i: load(candidates[i]))


def best_match(request: EngineRequest, now: float, candidates: Sequence[Engine]) -> int:
    def rank(i: int) -> tuple[int, int]:
        return candidates[i].prefix_match(request.block_hashes), -load(candidates[i])

    return max(range(len(candidates)), key=rank)


def arrival(
    at_s: float, name: str, prompt: int = 50, output: int = 3, hashes: tuple[int, ...] = ()
) -> Arrival:
    return Arrival(at_s, EngineRequest(name, prompt, output, hashes))


def test_one_request_takes_the_modelled_times() -> None:
    (outcome,) = Cluster(engines(1), least_loaded).run([arrival(10.0, "a")])
    assert outcome == Outcome("a", 0, ttft_s=approx(0.5), tpot_s=approx(1.1), e2e_s=approx(2.7))


def test_requests_of_one_instant_share_a_batch() -> None:
    outcomes = Cluster(engines(1), least_loaded).run([arrival(0.0, "a"), arrival(0.0, "b")])
    # 100 prompt tokens in one step, then two steps of 1 + 2 * 0.1 s.
    assert [o.ttft_s for o in outcomes] == [approx(1.0)] * 2
    assert [o.e2e_s for o in outcomes] == [approx(3.4)] * 2


def test_a_request_that_arrives_in_a_step_waits_for_its_end() -> None:
    outcomes = Cluster(engines(1), least_loaded).run(
        [arrival(0.0, "a", output=1), arrival(0.1, "b", output=1)]
    )
    assert [(o.request_id, o.ttft_s) for o in outcomes] == [
        ("a", approx(0.5)),
        ("b", approx(0.9)),
    ]


def test_the_decision_sees_the_engines_as_they_are_at_arrival() -> None:
    outcomes = Cluster(engines(2), least_loaded).run(
        [arrival(0.0, "a"), arrival(0.1, "b"), arrival(5.0, "c"), arrival(5.0, "d")]
    )
    assert {o.request_id: o.engine for o in outcomes} == {"a": 0, "b": 1, "c": 0, "d": 1}


def test_a_step_that_ends_as_a_request_arrives_is_over_for_its_placement() -> None:
    outcomes = Cluster(engines(2), least_loaded).run([arrival(0.0, "a", output=1), arrival(0.5, "b")])
    assert [o.engine for o in outcomes] == [0, 0]


def test_a_placement_by_prefix_finds_cached_tokens_that_one_by_load_misses() -> None:
    arrivals = [
        arrival(0.0, "x", hashes=(1, 2, 3, 4, 5)),
        arrival(0.0, "y", hashes=(6, 7, 8, 9, 10)),
        arrival(10.0, "y again", hashes=(6, 7, 8, 9, 11)),
    ]
    by_prefix = Cluster(engines(2), best_match).run(arrivals)
    by_load = Cluster(engines(2), least_loaded).run(arrivals)
    assert [by_prefix[-1].cached_tokens, by_load[-1].cached_tokens] == [40, 0]
    assert by_prefix[-1].ttft_s < by_load[-1].ttft_s


def test_a_request_that_no_engine_can_hold_is_refused_and_the_run_goes_on() -> None:
    outcomes = Cluster(engines(1), least_loaded).run([arrival(0.0, "huge", prompt=1000), arrival(0.0, "a")])
    assert [(o.request_id, bool(o.refused)) for o in outcomes] == [("huge", True), ("a", False)]


def random_arrivals(count: int) -> list[Arrival]:
    draw = Random(7)
    hashes = [tuple(range(start, start + 8)) for start in range(0, 64, 8)]
    return [
        arrival(
            draw.uniform(0.0, 200.0), str(i), draw.randint(1, 90), draw.randint(0, 20), draw.choice(hashes)
        )
        for i in range(count)
    ]


def test_the_same_arrivals_give_the_same_outcomes_in_any_order() -> None:
    arrivals = random_arrivals(300)
    first = Cluster(engines(3), least_loaded).run(arrivals)
    second = Cluster(engines(3), least_loaded).run(list(reversed(arrivals)))
    assert first == second
    assert sorted(int(o.request_id) for o in first) == list(range(300))
    assert not any(o.refused for o in first)


def test_after_a_run_every_engine_is_empty() -> None:
    fleet = engines(3)
    Cluster(fleet, best_match).run(random_arrivals(300))
    assert [(e.running, e.waiting, e.kv_blocks_used) for e in fleet] == [(0, 0, 0)] * 3


def test_more_engines_shorten_the_wait() -> None:
    def mean_ttft(count: int) -> float:
        outcomes = Cluster(engines(count), least_loaded).run(random_arrivals(300))
        return sum(o.ttft_s for o in outcomes) / len(outcomes)

    assert mean_ttft(1) > mean_ttft(2) > mean_ttft(4)


class SingleSteps(Engine):
    """Takes one step at a time, whatever the steps are like."""

    def steps_alike(self) -> int:
        return 1


@pytest.mark.parametrize(
    ("max_batch", "kv_blocks", "block_size"), [(2, 20, 10), (8, 20, 10), (8, 60, 3), (8, 400, 1), (4, 8, 100)]
)
def test_steps_taken_at_once_do_what_single_steps_do(max_batch: int, kv_blocks: int, block_size: int) -> None:
    spec = replace(SPEC, max_batch=max_batch, kv_blocks=kv_blocks, block_size=block_size)
    at_once, one_by_one = [Engine(spec) for _ in range(3)], [SingleSteps(spec) for _ in range(3)]
    outcomes = Cluster(at_once, best_match).run(random_arrivals(300))
    expected = Cluster(one_by_one, best_match).run(random_arrivals(300))
    assert [close(outcome) for outcome in outcomes] == [close(outcome) for outcome in expected]
    for engine, single in zip(at_once, one_by_one, strict=True):
        assert engine.stats.preemptions == single.stats.preemptions
        assert engine.stats.generation_tokens == single.stats.generation_tokens
        assert engine.stats.itl.counts == single.stats.itl.counts
        assert engine.stats.itl.sum_s == approx(single.stats.itl.sum_s)


def close(outcome: Outcome) -> Outcome:
    """Without what float rounding may change."""
    times = {name: round(getattr(outcome, name), 6) for name in ("ttft_s", "tpot_s", "e2e_s")}
    return replace(outcome, **times)


def test_steps_of_a_known_output_are_taken_at_once_up_to_an_arrival() -> None:
    told: list[tuple[float, int]] = []
    cluster = Cluster(engines(1), least_loaded, lambda event, _, now: told.append((now, event.generated)))
    cluster.run([arrival(0.0, "a", output=10), arrival(4.0, "b", prompt=10, output=1)])
    # The prompt ends at 0.5, steps of 1.1 s at 1.6, 2.7, 3.8 and 4.9; b is computed in the next one.
    assert told == [
        *[(approx(0.5), 1), (approx(4.9), 5), (approx(6.1), 6), (approx(6.1), 1)],
        (approx(10.5), 10),
    ]


def test_an_output_that_stalls_is_not_run_past_that() -> None:
    engine = Engine(SPEC)
    engine.submit(EngineRequest("a", 10, 15, stall_after=4), 0.0)
    engine.start_step(0.0)
    assert engine.steps_alike() == 1
    engine.end_step(0.1)
    engine.start_step(0.1)
    assert engine.steps_alike() == 3
    (event,) = engine.end_step(3.4, 3)
    assert (event.generated, event.finished, engine.start_step(3.4)) == (4, False, None)


def test_what_is_observed_may_bring_further_requests() -> None:
    def observe(event: TokenEvent, engine: int, now: float) -> None:
        if event.finished and event.request_id == "a":
            cluster.add(arrival(now, "b", prompt=100, output=1))
            cluster.add(arrival(now + 5.0, "c"))

    cluster = Cluster(engines(1), least_loaded, observe)
    ends = {one.request_id: one for one in cluster.run([arrival(0.0, "a", output=1), arrival(1.0, "d")])}
    assert ends["a"].e2e_s == approx(0.5)
    # Before that of 1.0 s, whose prompt waits for this one's.
    assert ends["b"].e2e_s == approx(1.0)
    assert ends["d"].ttft_s == approx(1.0)
    assert ends["c"].ttft_s == approx(0.5)
