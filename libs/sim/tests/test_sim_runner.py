"""The runner's use of the clock, on a loop whose time the test moves."""

from collections.abc import Callable
from typing import Any

import pytest

from penstock.sim.engine import Engine
from penstock.sim.runner import EngineRunner
from penstock.sim.spec import EngineRequest, EngineSpec

SPEC = EngineSpec(
    max_batch=4,
    prefill_tokens_per_s=1000.0,
    decode_step_s=0.020,
    decode_step_per_seq_s=0.0,
    step_token_budget=100,
)


class Handle:
    def __init__(self, at_s: float, callback: Callable[[], None]) -> None:
        self.at_s = at_s
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class ManualLoop:
    """The part of an event loop that the runner uses."""

    def __init__(self) -> None:
        self.now = 100.0
        self.handles: list[Handle] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> Handle:
        return self.call_later(0.0, callback)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Handle:
        self.handles.append(Handle(self.now + delay_s, callback))
        return self.handles[-1]

    def fire(self, late_s: float = 0.0) -> None:
        """Let the one handle come due, `late_s` after its time."""
        (handle,) = self.handles
        self.handles.clear()
        self.now = max(self.now, handle.at_s) + late_s
        if not handle.cancelled:
            handle.callback()


class Run:
    """A runner and what its listeners heard."""

    def __init__(self, spec: EngineSpec = SPEC) -> None:
        self.loop = ManualLoop()
        loop: Any = self.loop
        self.runner = EngineRunner(Engine(spec), loop)
        self.heard: list[tuple[str, int]] = []

    def submit(self, name: str, prompt: int, output: int) -> None:
        request = EngineRequest(name, prompt, output)
        self.runner.submit(request, lambda event: self.heard.append((event.request_id, event.generated)))


def test_requests_of_one_tick_start_in_one_batch() -> None:
    run = Run()
    run.submit("a", 10, 1)
    run.submit("b", 20, 1)
    run.loop.fire()
    assert run.loop.handles[0].at_s == pytest.approx(100.030)
    run.loop.fire()
    assert run.heard == [("a", 1), ("b", 1)]


def test_late_timers_do_not_add_up() -> None:
    run = Run()
    run.submit("a", 10, 50)
    run.loop.fire()
    for _ in range(49):
        run.loop.fire(late_s=0.004)
    # 10 ms for the prompt and 49 steps of 20 ms.
    assert run.loop.handles[0].at_s == pytest.approx(100.010 + 49 * 0.020)
    assert run.runner.engine.stats.itl.sum_s == pytest.approx(48 * 0.020)


def test_a_request_that_comes_while_a_timer_is_late_does_not_wait_less_than_no_time() -> None:
    run = Run()
    run.submit("a", 10, 2)
    run.loop.fire()
    run.loop.now = run.loop.handles[0].at_s + 0.050
    run.submit("b", 10, 1)
    run.loop.fire()
    assert run.runner.engine.stats.queue.sum_s == pytest.approx(0.0, abs=1e-9)


def test_after_a_long_stop_tokens_go_on_at_their_pace_instead_of_all_at_once() -> None:
    run = Run()
    run.submit("a", 10, 50)
    run.loop.fire()
    run.loop.fire(late_s=30.0)
    assert run.heard == [("a", 1)]
    assert run.loop.handles[0].at_s == pytest.approx(run.loop.now + 0.020)


def test_a_short_delay_is_made_up_for() -> None:
    run = Run()
    run.submit("a", 10, 50)
    run.loop.fire()
    run.loop.fire(late_s=0.050)
    # Steps that ended 30 and 10 ms ago are told at once.
    assert run.heard == [("a", 1), ("a", 2), ("a", 3)]
    assert run.loop.handles[0].at_s == pytest.approx(100.010 + 3 * 0.020)


def test_steps_without_duration_leave_the_loop_its_turn() -> None:
    run = Run(EngineSpec(prefill_tokens_per_s=1e15, decode_step_s=0.0, decode_step_per_seq_s=0.0))
    run.submit("a", 10, 1000)
    ticks = 0
    while run.loop.handles:
        run.loop.fire()
        ticks += 1
    assert len(run.heard) == 1000
    assert ticks > 10


def test_an_idle_engine_uses_no_timer() -> None:
    run = Run()
    run.submit("a", 10, 1)
    run.loop.fire()
    run.loop.fire()
    assert run.loop.handles == []
    run.loop.now += 1000.0
    run.submit("b", 10, 1)
    run.loop.fire()
    assert run.loop.handles[0].at_s == pytest.approx(run.loop.now + 0.010)


def test_an_aborted_request_is_not_heard_of_again() -> None:
    run = Run()
    run.submit("a", 10, 2)
    run.submit("b", 10, 2)
    run.loop.fire()
    assert run.runner.abort("a")
    assert not run.runner.abort("a")
    while run.loop.handles:
        run.loop.fire()
    assert run.heard == [("b", 1), ("b", 2)]


def test_a_closed_runner_does_nothing_more() -> None:
    run = Run()
    run.submit("a", 10, 2)
    run.runner.close()
    run.loop.fire()
    assert run.heard == []
    assert run.loop.handles == []
