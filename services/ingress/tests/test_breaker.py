"""The breaker opens after three failures in a row and lets one probe through per interval."""

import pytest

from penstock.ingress.breaker import PROBE_EVERY_S, TRIP_AFTER, BusBreaker


def tripped(now: float = 10.0) -> BusBreaker:
    breaker = BusBreaker()
    for _ in range(TRIP_AFTER):
        breaker.failed(now)
    return breaker


def test_it_starts_closed_and_asks_every_time() -> None:
    breaker = BusBreaker()
    assert not breaker.open
    assert [breaker.may_ask(now) for now in (0.0, 0.0, 0.0)] == [True] * 3


@pytest.mark.parametrize(
    ("attempts", "opens"),
    [("", False), ("ff", False), ("fff", True), ("ffaff", False), ("ffafff", True), ("fffff", True)],
)
def test_only_failures_in_a_row_open_it(attempts: str, opens: bool) -> None:
    breaker = BusBreaker()
    for attempt in attempts:
        breaker.failed(0.0) if attempt == "f" else breaker.answered()
    assert breaker.open is opens


def test_the_failure_that_opens_it_and_the_answer_that_closes_it_say_so_once() -> None:
    breaker = BusBreaker()
    assert [breaker.failed(0.0) for _ in range(5)] == [False, False, True, False, False]
    assert [breaker.answered() for _ in range(2)] == [True, False]


def test_while_open_one_attempt_is_let_through_per_interval() -> None:
    breaker = tripped(10.0)
    moments = [10.0, 10.0 + PROBE_EVERY_S - 0.01, 10.0 + PROBE_EVERY_S, 10.0 + PROBE_EVERY_S]
    assert [breaker.may_ask(now) for now in moments] == [False, False, True, False]
    later = 10.0 + 5 * PROBE_EVERY_S
    assert [breaker.may_ask(later), breaker.may_ask(later + 0.01)] == [True, False]


def test_a_failed_probe_leaves_it_open_and_an_answered_one_closes_it() -> None:
    breaker = tripped(10.0)
    assert breaker.may_ask(11.0)
    breaker.failed(11.05)
    assert breaker.open
    assert not breaker.may_ask(11.1)
    assert breaker.may_ask(11.0 + PROBE_EVERY_S)
    breaker.answered()
    assert [breaker.may_ask(11.3), breaker.may_ask(11.3)] == [True, True]
