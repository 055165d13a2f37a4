"""Blocks that outlive their request, and prompts whose keys and values came from another engine."""

import pytest

from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest, EngineSpec

SPEC = EngineSpec(
    max_batch=4,
    prefill_tokens_per_s=100.0,
    step_token_budget=1000,
    decode_step_s=1.0,
    decode_step_per_seq_s=0.0,
    kv_blocks=20,
    block_size=10,
)


def finish(engine: Engine) -> float:
    """Seconds until the engine is idle."""
    now = 0.0
    while (duration := engine.start_step(now)) is not None:
        now += duration
        engine.end_step(now)
    return now


def test_kept_blocks_stay_until_they_are_let_go() -> None:
    engine = Engine(SPEC)
    engine.submit(EngineRequest("a", 95, 1, tuple(range(9)), keeps=True), 0.0)
    finish(engine)
    assert (engine.running, engine.kv_blocks_used, engine.kv_blocks_kept) == (0, 10, 10)
    with pytest.raises(ValueError, match="in use"):
        engine.submit(EngineRequest("a", 5, 1), 0.0)
    assert engine.let_go("a")
    assert not engine.let_go("a")
    assert (engine.kv_blocks_used, engine.kv_blocks_kept) == (0, 0)
    assert engine.prefix_match(tuple(range(9))) == 9


def test_kept_blocks_are_not_evicted_for_others() -> None:
    engine = Engine(SPEC)
    engine.submit(EngineRequest("a", 100, 1, keeps=True), 0.0)
    finish(engine)
    engine.submit(EngineRequest("b", 110, 1), 0.0)
    assert engine.start_step(1.0) is None
    assert engine.waiting == 1
    engine.let_go("a")
    assert engine.start_step(1.0) is not None


def test_an_imported_prompt_costs_the_computation_of_one_token() -> None:
    engine = Engine(SPEC)
    engine.submit(EngineRequest("a", 100, 1, imported_tokens=100), 0.0)
    assert engine.uncomputed_prompt_tokens == 1
    assert finish(engine) == pytest.approx(0.01)
    assert engine.kv_blocks_used == 0


def test_what_was_imported_is_lost_by_preemption() -> None:
    seconds = []
    for imported in (0, 38):
        engine = Engine(
            EngineSpec(prefill_tokens_per_s=10.0, step_token_budget=1000, kv_blocks=8, block_size=10)
        )
        engine.submit(EngineRequest("first", 39, 20), 0.0)
        engine.submit(EngineRequest("second", 39, 20, imported_tokens=imported), 0.0)
        seconds.append(finish(engine))
        assert engine.stats.preemptions > 0
    assert seconds[0] - seconds[1] == pytest.approx(3.8)
