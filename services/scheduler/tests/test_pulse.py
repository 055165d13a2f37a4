"""When an event loop lags, when it keeps up again, and when it stood still."""

from __future__ import annotations

from penstock.scheduler.pulse import CALM_S, LATE_TURNS, Pulse


def turns(pulse: Pulse, now: float, late_s: float, count: int) -> float:
    for _ in range(count):
        now += 0.1 + late_s
        pulse.turn(now)
    return now


def test_a_loop_lags_after_late_turns_in_a_row_and_not_after_one() -> None:
    pulse = Pulse(0.1, 0.25, 0.0)
    now = 0.0
    for _ in range(10):
        now = turns(pulse, now, 0.9, LATE_TURNS - 1)
        now = turns(pulse, now, 0.0, 1)
        assert not pulse.lags
    turns(pulse, now, 0.3, LATE_TURNS)
    assert pulse.lags


def test_it_keeps_up_again_after_a_while_below_half_the_limit() -> None:
    pulse = Pulse(0.1, 0.25, 0.0)
    now = turns(pulse, 0.0, 0.3, LATE_TURNS)
    now = turns(pulse, now, 0.2, 100)
    assert pulse.lags
    now = turns(pulse, now, 0.0, int(CALM_S / 0.1) - 2)
    assert pulse.lags
    turns(pulse, now, 0.0, 4)
    assert not pulse.lags


def test_no_limit_never_lags() -> None:
    pulse = Pulse(0.1, 0.0, 0.0)
    turns(pulse, 0.0, 10.0, 10)
    assert not pulse.lags


def test_standing_still_is_told_until_it_is_dealt_with() -> None:
    pulse = Pulse(0.1, 0.25, 0.0)
    assert pulse.stalled_s(0.9) == 0.0
    assert pulse.stalled_s(7.0) == 7.0
    pulse.forgive(7.0)
    assert pulse.stalled_s(7.1) == 0.0
