"""Waits, budget and queue of retries, on values."""

from datetime import UTC, datetime

import pytest

from penstock.ingress.backoff import delay_s, retry_after_s
from penstock.ingress.retry_budget import RetryBudget
from penstock.ingress.retry_queue import RetryQueue

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("attempt", "draw", "wait"),
    [(0, 0.0, 0.5), (1, 0.0, 1.0), (2, 0.0, 2.0), (9, 0.0, 5.0), (10**6, 0.0, 5.0), (0, 0.5, 0.375)],
)
def test_waits_double_up_to_the_most_and_are_spread(attempt: int, draw: float, wait: float) -> None:
    assert delay_s(attempt, 0.5, 5.0, draw) == pytest.approx(wait)


@pytest.mark.parametrize(
    ("line", "wait"),
    [
        (b"Retry-After: 7\r\n", 7.0),
        (b"retry-after:Fri, 02 Jan 2026 03:04:15 GMT\r\n", 10.0),
        (b"retry-after: Fri, 02 Jan 2026 03:04:00 GMT\r\n", 0.0),
        (b"retry-after: Fri, 02 Jan 2026 03:04:15\r\n", 0.0),
        (b"retry-after: -1\r\n", 0.0),
        (b"retry-after: 1.5\r\n", 0.0),
        (b"retry-after: soon\r\n", 0.0),
        (b"retry-after: " + b"9" * 40 + b"\r\n", 0.0),
        (b"retry-after: \xff\r\n", 0.0),
        (b"x: y\r\n", 0.0),
        (b"", 0.0),
    ],
)
def test_what_retry_after_asks(line: bytes, wait: float) -> None:
    assert retry_after_s(b"a: b\r\n" + line, NOW) == pytest.approx(wait)


def spent(budget: RetryBudget, requests: int, now: float, most: int = 10_000) -> int:
    for count in range(most):
        if not budget.spend(requests, now):
            return count
    return most


def test_retries_are_a_share_of_the_requests() -> None:
    budget = RetryBudget(20, 0)
    assert spent(budget, 0, 1.0) == 0
    assert spent(budget, 100, 2.0) == 20
    assert spent(budget, 150, 3.0) == 10


def test_a_few_retries_per_second_are_always_allowed_and_quiet_times_add_up_to_a_bound() -> None:
    budget = RetryBudget(0, 2)
    assert spent(budget, 0, 1.0) == 20
    assert spent(budget, 0, 3.0) == 4
    assert spent(budget, 10**9, 10**6) == 100


def test_an_outage_of_everything_is_amplified_by_the_share_alone() -> None:
    budget, sent = RetryBudget(20, 0), 0
    for request in range(1, 10_001):
        sent += sum(budget.spend(request, request / 1000) for _ in range(3))
    assert sent <= 2000


def test_those_whose_time_has_come_go_in_order_as_far_as_there_are_workers() -> None:
    queue: RetryQueue[str] = RetryQueue(size=4, workers=2)
    assert [queue.enter(who, due) for who, due in (("b", 2.0), ("a", 1.0), ("d", 9.0), ("c", 3.0))] == [
        True
    ] * 4
    assert not queue.enter("e", 0.0)
    assert (queue.take(0.5), queue.next_due()) == ([], 1.0)
    assert queue.take(5.0) == ["a", "b"]
    assert (len(queue), queue.working, queue.take(5.0), queue.next_due()) == (2, 2, [], 9.0)
    assert queue.enter("e", 4.0)
    queue.leave("a")
    assert queue.take(5.0) == ["c"]
    queue.leave("b")
    queue.leave("c")
    assert (queue.take(5.0), queue.take(10.0)) == (["e"], ["d"])


def test_who_left_is_not_sent_and_makes_room() -> None:
    queue: RetryQueue[str] = RetryQueue(size=1, workers=1)
    assert queue.enter("a", 1.0)
    queue.leave("a")
    queue.leave("nobody")
    assert queue.enter("b", 2.0)
    assert (queue.next_due(), queue.take(3.0)) == (2.0, ["b"])


def test_one_that_comes_back_counts_by_its_last_time() -> None:
    queue: RetryQueue[str] = RetryQueue(size=9, workers=9)
    queue.enter("a", 1.0)
    queue.leave("a")
    queue.enter("a", 5.0)
    assert (queue.take(2.0), queue.take(6.0)) == ([], ["a"])


def test_coming_and_leaving_for_ever_holds_no_memory() -> None:
    queue: RetryQueue[int] = RetryQueue(size=10, workers=1)
    for who in range(10_000):
        assert queue.enter(who, 1e9)
        queue.leave(who)
    assert len(queue._heap) < 200
