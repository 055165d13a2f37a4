"""Replicas that decide at the same moment keep out of each other's way."""

from __future__ import annotations

import random

import pytest

from penstock.common.messages import InFlight, LoadReport
from penstock.common.model import Endpoint, Instance
from penstock.scheduler.bench import table_of
from penstock.scheduler.echo import MAX_ECHOES, WINDOW_S, Echo
from penstock.scheduler.view import ClusterView
from penstock.sim.spec import EngineSpec

from .scheduler_lab import Lab, burst

INSTANCES = 32


def echo() -> tuple[Echo, ClusterView]:
    view = ClusterView()
    instances = [Instance(id=name, endpoint=Endpoint("h", 1), models=("m",)) for name in "abcd"]
    view.refresh(table_of(instances), lambda slots: None)
    return Echo(view.loads), view


def test_placements_of_a_second_message_count_for_the_siblings_until_they_come_back() -> None:
    one, view = echo()
    one.rank(range(4), 0, 3)
    first, second = object(), object()
    one.placed_here(first, 0, 1000, 1.0)
    one.placed_here(first, 1, 1000, 1.0)
    assert view.loads.echo.sum() == 0
    one.placed_here(second, 2, 1000, 1.001)
    assert view.loads.echo[:4].tolist() == [0, 0, 2, 0]
    assert view.loads.echo_ms[2] == pytest.approx(2 * 125)
    # Two replicas times two placements under way, on four instances.
    assert view.loads.rank[:4].tolist() == [0, 1, 2, 0]
    assert view.loads.ranked_ms_per_token[:4].tolist() == [0.125, 0.25, 0.375, 0.125]
    one.came_back(2)
    assert view.loads.echo[2] == 2
    one.came_back(5)
    assert (view.loads.echo.sum(), view.loads.echo_ms.sum(), view.loads.rank.sum()) == (0, 0, 0)
    assert view.loads.ranked_ms_per_token[:4].tolist() == [0.125] * 4
    assert (view.loads.queued == 0).all()


def test_a_placement_that_a_prefix_draws_says_nothing_of_the_siblings() -> None:
    one, view = echo()
    one.rank(range(4), 0, 3)
    for message in range(3):
        one.placed_here(message, 1, 1000, 1.0, by_prefix=True)
    assert view.loads.echo.sum() == 0


def test_what_siblings_usually_place_unseen_is_expected_before_it_is_heard() -> None:
    one, view = echo()
    one.rank(range(4), 0, 3)
    for message in range(200):
        one.placed_here(message, 0, 1000, float(message))
        one.heard(2)
        one.came_back(1)
    assert view.loads.rank[:4] == pytest.approx([0, 0.5, 1, 0], rel=0.25)
    for message in range(300):
        one.placed_here(message, 0, 1000, 300.0 + message)
        one.came_back(1)
        one.heard(2)
    assert view.loads.rank.sum() == 0


def test_a_flood_of_siblings_placements_is_not_expected_for_long() -> None:
    one, view = echo()
    one.rank(range(4), 0, 3)
    one.placed_here(0, 0, 1000, 0.0)
    one.heard(100_000)
    one.came_back(1)
    for message in range(1, 100):
        one.placed_here(message, 0, 1000, float(message))
        one.came_back(1)
    assert view.loads.rank.sum() == 0


def test_what_does_not_come_back_is_given_up() -> None:
    one, view = echo()
    one.rank(range(4), 1, 2)
    for message in range(5):
        one.placed_here(message, 0, 10, 1.0 + message / 1000)
    assert view.loads.echo[0] == 4
    one.expire(1.005 + WINDOW_S)
    assert (view.loads.echo.sum(), view.loads.rank.sum(), view.loads.wait_ms.sum()) == (0, 0, 0)


def test_a_slot_that_changes_hands_and_a_flood_leave_no_trace() -> None:
    one, view = echo()
    one.rank(range(4), 1, 2)
    for message in range(2 * MAX_ECHOES):
        one.placed_here(message, message % 4, 10, 1.0 + message * 1e-6)
    assert view.loads.echo.sum() <= MAX_ECHOES
    one.forget(2)
    view.loads.reset(2)
    one.expire(9.0)
    assert (view.loads.echo == 0).all()


def test_a_single_replica_expects_nobody() -> None:
    one, view = echo()
    one.rank(range(4), 0, 1)
    for message in range(5):
        one.placed_here(message, 0, 10, 1.0)
    assert (view.loads.echo.sum(), view.loads.rank.sum()) == (0, 0)


def most_on_one(policy: str, replicas: int, feed_s: float, *, size: int, skewed: bool) -> int:
    """Of a burst of new prompts within 4 ms, on a fleet with work in flight."""
    lab = Lab([EngineSpec()] * INSTANCES, policy, replicas=replicas, feed_s=feed_s)
    rng = random.Random(3)
    counts = [rng.randrange(16) if skewed else 8 for _ in lab.names]
    work = tuple(
        InFlight(f"{name} {number}", name, 1000, 1)
        for name, count in zip(lab.names, counts, strict=True)
        for number in range(count)
    )
    lab.beat(0.0)
    for replica in lab.replicas:
        replica.report(LoadReport("other", "1", 1, work, (), 0, 1), 0.0)
    return max(burst(lab, size, within_s=0.004, at_s=0.2).values())


@pytest.mark.parametrize("policy", ["cache-aware", "least-request"])
@pytest.mark.parametrize("skewed", [True, False])
def test_the_herd_factor_of_a_burst_is_bounded(policy: str, skewed: bool) -> None:
    alone = most_on_one(policy, 1, 0.005, size=128, skewed=skewed)
    for replicas, bound in ((2, 1.5), (4, 1.5), (8, 2.0)):
        for feed_s in (0.001, 0.005, 0.05):
            most = most_on_one(policy, replicas, feed_s, size=128, skewed=skewed)
            assert most <= bound * alone, (replicas, feed_s, most, alone)


def test_requests_of_one_instant_at_several_replicas_keep_apart_once_they_are_expected() -> None:
    """Nothing tells a replica of the others' requests before its own are placed, but their habit."""
    alone, several = (_instants(replicas) for replicas in (1, 4))
    assert several <= 1.5 * alone


def _instants(replicas: int) -> float:
    """Most requests on an instance, mean of the later ones of 60 bursts of 10 requests, each a message."""
    lab = Lab([EngineSpec()] * 16, "cache-aware", replicas=replicas, feed_s=0.005)
    lab.beat(0.0)
    most = [
        max(burst(lab, 10, within_s=1e-6, at_s=3.0 * number, first=10 * number).values())
        for number in range(1, 61)
    ]
    return sum(most[20:]) / 40
