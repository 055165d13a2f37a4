"""An audit's view of requests: admitted, decided, ended once; in any order, and with witnesses."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import pytest

from penstock.cli.audit import reconcile as bounds
from penstock.cli.audit.chains import Fault, Name
from penstock.cli.audit.reconcile import Ended, Numbers, Requests

NOW, SETTLE_S = 1000.0, 15.0


def ended(
    *decisions: str,
    outcome: str = "completed",
    request: str = "r",
    undecided: bool = False,
    started: float = 10.0,
) -> Ended:
    return Ended(request, "i", decisions, outcome, undecided, started, started + 1)


@dataclass
class Writers:
    """All of them are dead, or alive with something missing since a moment."""

    dead: bool = True
    gap_at: float = 0.0

    def gone(self, name: Name) -> str:
        assert name[0] == "ingress/i"
        return "it was killed" if self.dead else ""

    def holed(self, name: Name, since: float) -> bool:
        return self.gap_at >= since

    def unsent(self, service: str) -> list[str]:
        return ["scheduler/s1 run x"] if self.dead else []


def judged(requests: Requests, *, dead: bool = True, whole: bool = True, since: float = 0.0) -> list[Fault]:
    return list(requests.faults(NOW, since, SETTLE_S, Writers(dead), whole))


def kinds(requests: Requests, *, dead: bool = True) -> list[tuple[str, tuple[str, ...]]]:
    return [(fault.kind, fault.ids) for fault in judged(requests, dead=dead)]


STEPS = {
    "admit": lambda r: r.admit("a.1", "r", "i", 10.0),
    "decide": lambda r: r.decide("a.1", "r", "i", 10.0),
    "decide again": lambda r: r.decide("a.1", "r", "i", 10.2),
    "end": lambda r: r.end(ended("a.1"), "e1", routed=False),
}


@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)))
def test_a_request_that_was_admitted_decided_and_ended_is_whole_in_any_order(order: tuple[str, ...]) -> None:
    requests = Requests()
    for step in order:
        STEPS[step](requests)
    assert judged(requests) == []
    assert (requests.decided, requests.finished, requests.lost) == (1, 1, 0)


def test_a_decision_without_an_outcome_is_open_while_its_ingress_lives_then_unfinished() -> None:
    requests = Requests()
    requests.decide("a.1", "r", "i", 10.0)
    requests.admit("a.2", "s", "i", 11.0)
    assert kinds(requests, dead=False) == []
    assert requests.open_requests(SETTLE_S, NOW, Writers(dead=False)) == 2
    (fault,) = judged(requests)
    assert (fault.kind, fault.writer, fault.incarnation, fault.ids) == (
        "unfinished",
        "ingress/i",
        "a",
        ("a.1", "a.2"),
    )
    assert (fault.first, fault.last, fault.count) == (1, 2, 2)
    assert fault.cause == "it has no outcome; it was killed"


def test_what_is_young_is_not_judged() -> None:
    requests = Requests()
    requests.decide("a.1", "r", "i", NOW - SETTLE_S + 1)
    assert kinds(requests) == []
    assert requests.open_requests(SETTLE_S, NOW, Writers()) == 1


def test_an_outcome_whose_decision_is_not_there_names_it() -> None:
    requests = Requests()
    requests.decide("a.1", "r", "i", 10.0)
    requests.end(ended("a.1", "a.2"), "e", routed=False)
    assert kinds(requests, dead=False) == [("undecided", ("a.2",))]
    assert judged(requests)[0].cause.endswith("; scheduler/s1 run x may have taken it along")


def test_a_request_that_ended_while_it_was_asked_for_need_not_be_decided() -> None:
    requests = Requests()
    requests.decide("a.1", "r", "i", 10.0)
    requests.end(ended("a.1", "a.2", outcome="client_gone", undecided=True), "e", routed=False)
    requests.end(ended("a.3", outcome="client_gone", undecided=True), "e", routed=False)
    assert kinds(requests) == []


def test_what_began_before_the_range_is_not_judged_unless_the_whole_log_was_read() -> None:
    requests = Requests()
    requests.end(ended("a.1", started=10.0), "e", routed=False)
    assert judged(requests, whole=False, since=20.0) == []
    assert [fault.kind for fault in judged(requests, whole=True, since=20.0)] == ["undecided"]


def test_two_witnesses_of_a_lost_request_are_one_and_it_is_whole() -> None:
    requests = Requests()
    requests.admit("a.1", "r", "i", 10.0)
    requests.decide("a.1", "r", "i", 10.0)
    for _ in range(2):
        requests.end(ended("a.1", outcome="lost", request=""), "lost/a.1", routed=False)
    assert judged(requests) == []
    assert (requests.lost, requests.finished) == (1, 0)


def test_a_lost_request_covers_its_earlier_attempts_and_need_not_be_decided() -> None:
    requests = Requests()
    requests.decide("a.1", "r", "i", 10.0)
    requests.admit("a.2", "r", "i", 11.0)
    requests.end(ended("a.2", outcome="lost"), "lost/a.2", routed=False)
    assert judged(requests) == []


@pytest.mark.parametrize("first", ["lost", "completed"])
def test_a_real_outcome_takes_the_place_of_lost_whichever_comes_first(first: str) -> None:
    requests = Requests()
    requests.decide("a.1", "r", "i", 10.0)
    second = "completed" if first == "lost" else "lost"
    for outcome in (first, second):
        requests.end(ended("a.1", outcome=outcome), outcome, routed=False)
    assert judged(requests) == []
    assert (requests.lost, requests.finished) == (0, 1)


def test_two_outcomes_of_one_request_are_a_fault() -> None:
    requests = Requests()
    requests.decide("a.1", "r", "i", 10.0)
    requests.end(ended("a.1"), "e1", routed=False)
    requests.end(ended("a.1"), "e2", routed=False)
    assert kinds(requests) == [("twice", ("a.1",))]


def test_a_request_with_a_route_of_its_own_ends_too() -> None:
    requests = Requests()
    requests.route("x", "i", 10.0)
    requests.route("y", "i", 10.0)
    requests.end(ended(request="x"), "e", routed=True)
    (fault,) = judged(requests)
    assert (fault.kind, fault.ids, fault.count) == ("unfinished", ("y",), 1)


def test_numbers_that_are_over_take_little_room() -> None:
    numbers, rng = Numbers(), random.Random(3)
    over = list(range(1, 2000))
    rng.shuffle(over)
    for number in over[:1500]:
        numbers.add(f"a.{number:x}")
        numbers.add(f"a.{number:x}")
    assert all(f"a.{number:x}" in numbers for number in over[:1500])
    assert not any(f"a.{number:x}" in numbers for number in over[1500:])
    for number in over[1500:]:
        numbers.add(f"a.{number:x}")
    assert numbers.intervals == 1
    numbers.add("of another make")
    assert "of another make" in numbers
    assert "b.1" not in numbers


def test_memory_is_bounded_and_what_gives_way_is_still_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_OPEN", 10)
    requests = Requests()
    for number in range(1, 51):
        requests.decide(f"a.{number:x}", f"r{number}", "i", 10.0)
    (fault,) = judged(requests)
    assert (fault.count, fault.first, fault.last) == (50, 1, 50)


def test_an_outcome_may_be_among_what_is_missing_of_a_living_ingress() -> None:
    requests = Requests()
    requests.decide("a.1", "r", "i", 10.0)
    requests.decide("a.2", "s", "i", 30.0)
    writers = Writers(dead=False, gap_at=20.0)
    (fault,) = requests.faults(NOW, 0.0, SETTLE_S, writers, True)
    assert (fault.ids, "may be among" in fault.cause) == (("a.1",), True)
    assert requests.open_requests(SETTLE_S, NOW, writers) == 1
