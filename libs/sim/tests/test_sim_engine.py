"""The engine model: times, batching, prefix cache, preemption, aborts; random histories as properties."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sim.engine import Engine
from penstock.sim.spec import DoesNotFit, EngineRequest, EngineSpec, QueueFull, TokenEvent

SPEC = EngineSpec(
    max_batch=4,
    prefill_tokens_per_s=100.0,
    step_token_budget=50,
    decode_step_s=1.0,
    decode_step_per_seq_s=0.1,
    kv_blocks=100,
    block_size=10,
)


# Typed so that tuples and events may hold it in place of a number.
approx: Any = pytest.approx


def spec(**changes: Any) -> EngineSpec:
    return EngineSpec(**{name: getattr(SPEC, name) for name in EngineSpec.__slots__} | changes)


def request(name: str, prompt: int, output: int, hashes: tuple[int, ...] = (), **more: Any) -> EngineRequest:
    return EngineRequest(name, prompt, output, hashes, **more)


def step(engine: Engine, now: float) -> tuple[float, list[TokenEvent]]:
    """Time after one step, and its events."""
    duration = engine.start_step(now)
    assert duration is not None
    return now + duration, engine.end_step(now + duration)


def drain(engine: Engine, now: float = 0.0) -> list[tuple[float, TokenEvent]]:
    """Every event until the engine is idle; an engine that does not get there fails the test."""
    events: list[tuple[float, TokenEvent]] = []
    for _ in range(20_000):
        duration = engine.start_step(now)
        if duration is None:
            return events
        now += duration
        events += [(now, event) for event in engine.end_step(now)]
    raise AssertionError(f"still {engine.running} running and {engine.waiting} waiting")


def ends(events: list[tuple[float, TokenEvent]]) -> dict[str, float]:
    return {event.request_id: approx(at) for at, event in events if event.finished}


def test_a_prompt_is_computed_in_chunks_and_then_decoded_token_by_token() -> None:
    engine = Engine(SPEC)
    engine.submit(request("a", 80, 3), 0.0)
    # 50 + 30 prompt tokens at 100/s, then two steps of 1 + 0.1 s.
    assert [(at, e.generated) for at, e in drain(engine)] == [
        (approx(0.8), 1),
        (approx(1.9), 2),
        (approx(3.0), 3),
    ]


@pytest.mark.parametrize(
    ("prefill_tokens", "decodes", "duration"), [(0, 1, 1.1), (0, 10, 2.0), (40, 0, 0.4), (40, 10, 2.4)]
)
def test_a_step_lasts_longer_with_more_prompt_and_more_sequences(
    prefill_tokens: int, decodes: int, duration: float
) -> None:
    assert SPEC.step_duration_s(prefill_tokens, decodes) == approx(duration)


def test_prompts_are_computed_beside_decoding_requests_within_the_step_budget() -> None:
    engine = Engine(SPEC)
    engine.submit(request("a", 10, 9), 0.0)
    now, _ = step(engine, 0.0)
    engine.submit(request("b", 60, 1), now)
    # One token for a, 49 of the budget's 50 for b.
    assert engine.start_step(now) == approx(1.1 + 0.49)
    engine.end_step(now)
    assert engine.start_step(now) == approx(1.1 + 0.11)
    assert [e.request_id for e in engine.end_step(now)] == ["a", "b"]


def test_requests_above_the_batch_wait_their_turn() -> None:
    engine = Engine(spec(max_batch=2))
    for name in "abc":
        engine.submit(request(name, 10, 2), 0.0)
    now, _ = step(engine, 0.0)
    assert (engine.running, engine.waiting) == (2, 1)
    assert list(ends(drain(engine, now))) == ["a", "b", "c"]


def test_a_request_that_lacks_blocks_is_not_overtaken() -> None:
    engine = Engine(spec(kv_blocks=4))
    engine.submit(request("a", 30, 2), 0.0)
    engine.submit(request("large", 30, 1), 0.0)
    engine.submit(request("small", 5, 1), 0.0)
    now, _ = step(engine, 0.0)
    assert (engine.running, engine.waiting) == (1, 2)
    assert list(ends(drain(engine, now))) == ["a", "large", "small"]


def test_a_request_without_output_ends_with_its_prompt() -> None:
    engine = Engine(SPEC)
    engine.submit(request("a", 20, 0), 0.0)
    assert drain(engine) == [(approx(0.2), TokenEvent("a", 0, True, 0))]
    assert engine.stats.generation_tokens == 0


def test_a_second_request_with_the_same_prefix_skips_its_cached_blocks() -> None:
    engine = Engine(SPEC)
    engine.submit(request("a", 45, 1, (1, 2, 3, 4)), 0.0)
    drain(engine)
    engine.submit(request("b", 45, 1, (1, 2, 9, 10)), 10.0)
    events = drain(engine, 10.0)
    # 20 of 45 tokens cached, 25 computed.
    assert events == [(approx(10.25), TokenEvent("b", 1, True, 20))]
    assert (engine.stats.prefix_queries, engine.stats.prefix_hits) == (90, 20)


def test_at_least_one_prompt_token_is_computed_even_if_all_blocks_are_cached() -> None:
    engine = Engine(SPEC)
    for name in "ab":
        engine.submit(request(name, 40, 1, (1, 2, 3, 4)), 0.0)
        events = drain(engine)
    assert events[-1][1].cached_tokens == 30


def test_a_burst_of_equal_prompts_computes_the_prefix_once() -> None:
    engine = Engine(SPEC)
    for name in "abc":
        engine.submit(request(name, 25, 1, (1, 2)), 0.0)
    assert {e.request_id: e.cached_tokens for _, e in drain(engine)} == {"a": 0, "b": 20, "c": 20}


def test_blocks_filled_by_decoding_serve_the_next_turn() -> None:
    engine = Engine(SPEC)
    engine.submit(request("turn 1", 15, 16, (1, 2, 3)), 0.0)
    drain(engine)
    engine.submit(request("turn 2", 40, 1, (1, 2, 3, 4)), 0.0)
    assert drain(engine)[-1][1].cached_tokens == 30


def test_cached_blocks_give_way_to_requests_that_need_their_room() -> None:
    engine = Engine(spec(kv_blocks=4))
    for name, hashes in (("a", (1, 2, 3)), ("b", (4, 5, 6)), ("a again", (1, 2, 3))):
        engine.submit(request(name, 30, 1, hashes), 0.0)
        events = drain(engine)
    assert events[-1][1].cached_tokens == 10


def test_when_blocks_run_out_the_request_admitted_last_starts_over() -> None:
    engine = Engine(spec(kv_blocks=5))
    engine.submit(request("a", 20, 15), 0.0)
    engine.submit(request("b", 20, 15), 0.0)
    events = drain(engine)
    assert engine.stats.preemptions > 0
    assert list(ends(events)) == ["a", "b"]
    for name in "ab":
        assert [e.generated for _, e in events if e.request_id == name] == list(range(1, 16))
    assert engine.kv_blocks_used == 0


def test_a_preempted_request_is_admitted_again_before_those_that_waited() -> None:
    engine = Engine(spec(kv_blocks=5, max_batch=2))
    for name in ("a", "preempted"):
        engine.submit(request(name, 20, 15), 0.0)
    engine.submit(request("waited", 5, 1), 0.0)
    now = 0.0
    while not engine.stats.preemptions:
        now, _ = step(engine, now)
    engine.abort("a")
    _, events = step(engine, now)
    assert [e.request_id for e in events] == ["preempted", "waited"]


def test_a_request_can_be_aborted_while_it_waits_runs_or_is_in_a_step() -> None:
    engine = Engine(spec(max_batch=2))
    for name in "abc":
        engine.submit(request(name, 20, 5), 0.0)
    now, _ = step(engine, 0.0)
    assert engine.abort("c")
    assert engine.abort("b")
    assert (engine.running, engine.waiting, engine.kv_blocks_used) == (1, 0, 2)
    duration = engine.start_step(now)
    assert duration is not None
    assert engine.abort("a")
    assert (engine.running, engine.kv_blocks_used) == (0, 0)
    assert engine.end_step(now + duration) == []
    assert engine.start_step(now + duration) is None
    assert engine.stats.finished == {"stop": 0, "length": 0, "abort": 3}


def test_aborting_what_is_not_there_changes_nothing() -> None:
    engine = Engine(SPEC)
    engine.submit(request("a", 10, 1), 0.0)
    drain(engine)
    assert not engine.abort("a")
    assert not engine.abort("never seen")
    assert engine.stats.finished["abort"] == 0


def test_a_request_aborted_in_a_step_and_submitted_again_starts_from_nothing() -> None:
    engine = Engine(SPEC)
    engine.submit(request("a", 10, 2), 0.0)
    engine.start_step(0.0)
    engine.abort("a")
    engine.submit(request("a", 10, 2), 0.0)
    assert engine.end_step(0.1) == []
    assert [e.generated for _, e in drain(engine)] == [1, 2]


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_stalled_request_holds_its_place_until_it_is_aborted(after: int) -> None:
    engine = Engine(spec(max_batch=1))
    engine.submit(request("hung", 20, 5, stall_after=after), 0.0)
    engine.submit(request("next", 20, 1), 0.0)
    events = drain(engine)
    assert [e.generated for _, e in events] == list(range(1, after + 1))
    assert (engine.running, engine.waiting) == (1, 1)
    assert engine.abort("hung")
    assert list(ends(drain(engine))) == ["next"]
    assert (engine.running, engine.kv_blocks_used) == (0, 0)


def test_what_can_never_be_computed_is_refused() -> None:
    engine = Engine(spec(kv_blocks=4, max_waiting=1))
    with pytest.raises(DoesNotFit, match="needs 5 KV blocks, the engine has 4"):
        engine.submit(request("a", 40, 2), 0.0)
    # The last output token is never fed back: 40 tokens fit.
    engine.submit(request("a", 40, 1), 0.0)
    with pytest.raises(QueueFull):
        engine.submit(request("b", 10, 1), 0.0)
    step(engine, 0.0)
    assert engine.stats.finished["stop"] == 1


@pytest.mark.parametrize(("prompt", "output"), [(0, 1), (1, -1)])
def test_a_request_without_prompt_or_with_negative_output_is_an_error(prompt: int, output: int) -> None:
    with pytest.raises(ValueError):
        Engine(SPEC).submit(request("a", prompt, output), 0.0)


def test_an_id_is_used_by_one_request_at_a_time() -> None:
    engine = Engine(SPEC)
    engine.submit(request("a", 10, 1), 0.0)
    with pytest.raises(ValueError, match="in use"):
        engine.submit(request("a", 10, 1), 0.0)


def test_steps_do_not_overlap() -> None:
    engine = Engine(SPEC)
    with pytest.raises(RuntimeError):
        engine.end_step(0.0)
    engine.submit(request("a", 10, 1), 0.0)
    engine.start_step(0.0)
    with pytest.raises(RuntimeError):
        engine.start_step(0.0)


@pytest.mark.parametrize(
    "wrong",
    [{"max_batch": 0}, {"step_token_budget": 3}, {"prefill_tokens_per_s": 0.0}, {"decode_step_s": -1.0}],
)
def test_an_impossible_engine_cannot_be_specified(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        spec(**wrong)


def test_histograms_hold_the_modelled_times() -> None:
    engine = Engine(SPEC)
    engine.submit(request("a", 50, 3, finish_reason="length"), 1.0)
    drain(engine, 2.0)
    stats = engine.stats
    assert stats.queue.sum_s == approx(1.0)
    assert stats.ttft.sum_s == approx(1.5)
    assert stats.prefill.sum_s == approx(0.5)
    assert (stats.itl.sum_s, stats.itl.count) == (approx(2.2), 2)
    assert stats.decode.sum_s == approx(2.2)
    assert stats.inference.sum_s == approx(2.7)
    assert stats.e2e.sum_s == approx(3.7)
    assert (stats.prompt_tokens, stats.generation_tokens) == (50, 3)
    assert stats.finished == {"stop": 0, "length": 1, "abort": 0}


def hashes_of(path: list[int]) -> tuple[int, ...]:
    """Chained: equal for equal leading blocks only."""
    return tuple(hash((1, *path[: end + 1])) for end in range(len(path)))


SUBMIT = st.tuples(
    st.just("submit"),
    st.integers(1, 30),
    st.integers(0, 12),
    st.lists(st.integers(0, 1), max_size=10),
    st.sampled_from([None, None, None, 0, 2]),
)
ABORT = st.tuples(st.just("abort"), st.integers(0, 20))
HALF_STEP = st.tuples(st.just("half step"))
SMALL = st.builds(
    EngineSpec,
    max_batch=st.integers(1, 4),
    step_token_budget=st.integers(4, 16),
    kv_blocks=st.integers(11, 24),
    block_size=st.just(4),
    max_waiting=st.integers(1, 8),
)


class History:
    """Applies operations to an engine and keeps what became of every request."""

    def __init__(self, engine_spec: EngineSpec) -> None:
        self.engine = Engine(engine_spec)
        self.now = 0.0
        self.outputs: list[int] = []
        self.tokens: dict[str, list[int]] = {}
        self.ended: list[str] = []
        self.events: list[tuple[float, TokenEvent]] = []

    def apply(self, operation: Any) -> None:
        match operation:
            case ("submit", prompt, output, path, stall_after):
                self._submit(prompt, output, path, stall_after)
            case ("abort", number):
                self.abort(str(number))
            case _:
                self.half_step()
        self.check()

    def _submit(self, prompt: int, output: int, path: list[int], stall_after: int | None) -> None:
        name = str(len(self.outputs))
        wanted = EngineRequest(name, prompt, output, hashes_of(path), stall_after=stall_after)
        try:
            self.engine.submit(wanted, self.now)
        except QueueFull:
            return
        self.outputs.append(output)
        self.tokens[name] = []

    def abort(self, name: str) -> None:
        if self.engine.abort(name):
            self.ended.append(name)

    def half_step(self) -> bool:
        """Start a step or end the open one; False if there is nothing to do."""
        if self.engine.in_step:
            for event in self.engine.end_step(self.now):
                self.events.append((self.now, event))
                self.tokens[event.request_id].append(event.generated)
                if event.finished:
                    self.ended.append(event.request_id)
            return True
        duration = self.engine.start_step(self.now)
        self.now += duration or 0.0
        return duration is not None

    def check(self) -> None:
        engine = self.engine
        assert 0 <= engine.kv_blocks_used <= engine.spec.kv_blocks
        assert engine.waiting <= engine.spec.max_waiting + engine.spec.max_batch
        assert engine.running + engine.waiting + len(self.ended) == len(self.outputs)

    def finish(self) -> None:
        """Compute what can be, then abort what stalls and what waits behind it."""
        for _ in range(5000):
            if not self.half_step():
                break
        else:
            raise AssertionError("the engine does not come to an end")
        while self.engine.running + self.engine.waiting:
            for number in range(len(self.outputs)):
                self.abort(str(number))


@given(SMALL, st.lists(st.one_of(SUBMIT, ABORT, HALF_STEP, HALF_STEP, HALF_STEP), max_size=60))
def test_every_history_ends_with_every_request_ended_once_and_no_block_lost(
    engine_spec: EngineSpec, operations: list[Any]
) -> None:
    history = History(engine_spec)
    for operation in operations:
        history.apply(operation)
    history.finish()
    engine = history.engine
    assert sorted(history.ended, key=int) == [str(number) for number in range(len(history.outputs))]
    for name, generated in history.tokens.items():
        output = history.outputs[int(name)]
        assert generated in ([0], list(range(1, len(generated) + 1)))
        assert len(generated) <= max(output, 1)
    assert (engine.running, engine.waiting, engine.kv_blocks_used) == (0, 0, 0)
    # No block is lost: a request that needs all of them is computed.
    engine.submit(EngineRequest("all", engine_spec.kv_blocks * 4, 1), history.now)
    assert drain(engine, history.now)[-1][1].finished


@given(SMALL, st.lists(st.one_of(SUBMIT, HALF_STEP, HALF_STEP), max_size=40))
def test_requests_nobody_aborts_get_all_their_tokens(engine_spec: EngineSpec, operations: list[Any]) -> None:
    history = History(engine_spec)
    for operation in operations:
        history.apply((*operation[:4], None) if operation[0] == "submit" else operation)
    history.finish()
    assert history.engine.stats.finished["abort"] == 0
    for name, generated in history.tokens.items():
        assert len(generated) == max(history.outputs[int(name)], 1)


@given(SMALL, st.lists(st.one_of(SUBMIT, ABORT, HALF_STEP, HALF_STEP), max_size=40))
def test_the_same_history_gives_the_same_events(engine_spec: EngineSpec, operations: list[Any]) -> None:
    first, second = History(engine_spec), History(engine_spec)
    for history in (first, second):
        for operation in operations:
            history.apply(operation)
        history.finish()
    assert first.events == second.events
