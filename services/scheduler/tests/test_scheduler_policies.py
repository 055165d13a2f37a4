"""Every policy of the table, and each by plain values."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from penstock.common.messages import ScheduleRequest
from penstock.common.model import Endpoint, Instance
from penstock.scheduler.bench import table_of
from penstock.scheduler.candidates import Candidates
from penstock.scheduler.decisions import Case
from penstock.scheduler.draws import draw, seed_of
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.pickers import Best, BestOfTwo
from penstock.scheduler.policies.scorers import FewestRequests, Headroom, PrefixMatch, Scorer
from penstock.scheduler.policies.table import STRATEGIES, Thresholds
from penstock.scheduler.pool import Floats, whole
from penstock.scheduler.view import ClusterView

CATALOG = Catalog(Thresholds())
IDS = "abcdefghijklmnopqrst"


def candidates(in_flight: Sequence[int], matched: Sequence[int] = ()) -> Candidates:
    """Instances a, b, c, ... with these requests in flight, holding so many leading blocks each."""
    view = ClusterView()
    instances = [Instance(id=i, endpoint=Endpoint("h", 1), models=("m",)) for i in IDS[: len(in_flight)]]
    view.refresh(table_of(instances), lambda slots: None)
    view.take((i.id, count, 0, 0) for i, count in zip(instances, in_flight, strict=True))
    pool = view.pool("m")
    assert pool is not None
    slots = pool.slots.tolist()
    steps = [
        (blocks, sum(1 << slot for slot, held in zip(slots, matched, strict=True) if held >= blocks))
        for blocks in sorted({*matched} - {0})
    ]
    return Candidates(whole(pool).indexed(), view.loads, steps)


def case(decision: str = "d", blocks: int = 0, *, turn: int = 0, replicas: int = 1) -> Case:
    hashes = [seed_of(f"block {number}") for number in range(blocks)]
    return Case(ScheduleRequest(decision, "r", "m"), hashes, seed_of(decision), turn, replicas)


def chosen(policy: str, one: Case, among: Candidates) -> str:
    profile = CATALOG.find(policy)
    return among.id(profile.picker.pick(one, among, profile.scores(one, among)))


def numbers_of(among: Candidates) -> dict[str, Floats]:
    return {name: getattr(among.loads, name).copy() for name in among.loads.NAMES}


LOADS: list[tuple[list[int], list[int]]] = [
    ([0], [0]),
    ([7], [4]),
    ([0, 0, 0], [0, 0, 0]),
    ([3, 1, 2], [0, 8, 4]),
    ([100, 0, 50, 50], [8, 0, 8, 0]),
    ([1_000_000, 0], [8, 1]),
    (list(range(20)), [number % 9 for number in range(20)]),
]


@pytest.mark.parametrize("policy", STRATEGIES)
@pytest.mark.parametrize(("in_flight", "matched"), LOADS)
def test_every_policy_scores_everybody_in_range_and_chooses_one_without_a_trace(
    policy: str, in_flight: list[int], matched: list[int]
) -> None:
    among, one = candidates(in_flight, matched), case(blocks=8)
    loads, steps = numbers_of(among), copy.deepcopy(among.steps)
    scores = CATALOG.find(policy).scores(one, among)
    assert scores.shape == (len(in_flight),)
    assert np.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1 + 1e-9)).all()
    before = scores.copy()
    position = CATALOG.find(policy).picker.pick(one, among, scores)
    assert 0 <= position < len(in_flight)
    assert (scores == before).all()
    assert among.steps == steps
    assert among.requests.tolist() == in_flight
    assert all((loads[name] == numbers).all() for name, numbers in numbers_of(among).items())


@pytest.mark.parametrize("policy", STRATEGIES)
@pytest.mark.parametrize("replicas", [1, 3])
def test_the_same_decision_on_the_same_numbers_is_the_same_choice(policy: str, replicas: int) -> None:
    for number in range(20):
        one = case(f"d{number}", blocks=8, replicas=replicas)
        among = ([4, 4, 5, 4, 9], [0, 8, 0, 3, 8])
        assert chosen(policy, one, candidates(*among)) == chosen(policy, one, candidates(*among))


@pytest.mark.parametrize("policy", ["random", "least-request", "power-of-two", "prefix-cache"])
def test_equal_candidates_all_get_their_share(policy: str) -> None:
    among = candidates([2, 2, 2, 2])
    counts = Counter(chosen(policy, case(f"d{number}"), among) for number in range(400))
    assert set(counts) == set("abcd")
    assert min(counts.values()) > 60


@pytest.mark.parametrize(
    ("scorer", "in_flight", "matched", "expected"),
    [
        (FewestRequests(), [5, 5], [0, 0], [1, 1]),
        (FewestRequests(), [0, 1, 3], [0, 0, 0], [1, 1 / 2, 1 / 4]),
        (FewestRequests(), [19, 20], [0, 0], [1, 20 / 21]),
        (Headroom(16, 0.25), [0, 0], [0, 0], [1, 1]),
        (Headroom(16, 0.25), [0, 8], [0, 0], [1, 1 - 8 / 17]),
        (Headroom(16, 0.25), [0, 100], [0, 0], [1, 0]),
        (Headroom(10, 0), [5, 10, 15, 20], [0, 0, 0, 0], [1, 0.5, 0, 0]),
        (PrefixMatch(16, 0.25), [0, 0, 0], [8, 4, 0], [1, 0.5, 0]),
        (PrefixMatch(16, 0.25), [0, 8], [0, 8], [0, 1]),
        (PrefixMatch(16, 0.25), [0, 16], [0, 8], [0, 1]),
        (PrefixMatch(16, 0.25), [0, 17], [4, 8], [0.5, 0]),
        # Ninety-five more than the idle one that just joined, but no more than the rest.
        (PrefixMatch(16, 0.25), [0, 95, 100, 100, 100], [0, 8, 0, 0, 0], [0, 1, 0, 0, 0]),
    ],
)
def test_scorers_by_values(
    scorer: Scorer, in_flight: list[int], matched: list[int], expected: list[float]
) -> None:
    scores = scorer.score(case(blocks=8), candidates(in_flight, matched))
    assert scores.tolist() == pytest.approx(expected)


def test_without_block_hashes_no_prefix_matches() -> None:
    assert PrefixMatch(16, 0.25).score(case(), candidates([0, 1])).tolist() == [0, 0]


@pytest.mark.parametrize("in_flight", [[3, 1, 2], [9, 1, 1000], [2, 1, 2]])
def test_least_request_takes_the_least_loaded(in_flight: list[int]) -> None:
    assert {chosen("least-request", case(f"d{n}"), candidates(in_flight)) for n in range(20)} == {"b"}


def test_with_several_replicas_least_request_spreads_over_what_is_nearly_the_least() -> None:
    among = candidates([100, 103, 120])
    assert {chosen("least-request", case(f"d{n}"), among) for n in range(40)} == {"a"}
    assert {chosen("least-request", case(f"d{n}", replicas=2), among) for n in range(40)} == {"a", "b"}


def test_round_robin_takes_turns_in_order_of_id() -> None:
    among = candidates([9, 0, 5])
    assert [chosen("round-robin", case(turn=turn), among) for turn in range(5)] == list("abcab")


def test_random_ignores_load() -> None:
    counts = Counter(chosen("random", case(f"d{n}"), candidates([0, 500, 500])) for n in range(300))
    assert min(counts["a"], counts["b"], counts["c"]) > 60


def test_power_of_two_never_takes_the_most_loaded_and_takes_any_other() -> None:
    counts = Counter(chosen("power-of-two", case(f"d{n}"), candidates([0, 1, 2])) for n in range(300))
    # The least loaded is in two of three pairs.
    assert set(counts) == {"a", "b"}
    assert counts["a"] == pytest.approx(200, abs=30)


def test_of_two_equal_ones_power_of_two_takes_the_first_drawn() -> None:
    among = candidates([1, 1, 1])
    for number in range(50):
        one = case(f"d{number}")
        assert BestOfTwo().pick(one, among, np.zeros(3)) == draw(one.seed, 0, 3)


def test_equal_prompts_are_kept_together_by_prefix_cache_alone() -> None:
    among = candidates([1, 1, 1, 1])
    for policy, count in (("prefix-cache", 1), ("least-request", 4), ("power-of-two", 4), ("random", 4)):
        assert len({chosen(policy, case(f"d{n}", 8), among) for n in range(60)}) == count, policy


@pytest.mark.parametrize(
    ("why", "in_flight", "matched", "expected"),
    [
        ("a full match outweighs load within the guard", [0, 16, 0], [0, 8, 0], "b"),
        ("an overloaded match does not count", [0, 20, 0], [0, 8, 0], "ac"),
        ("hundreds in flight, the same difference is noise", [200, 220, 200], [0, 8, 0], "b"),
        ("the longer match of equals", [3, 3, 3], [2, 8, 4], "b"),
        ("the less loaded of equal matches", [9, 4, 0], [8, 8, 0], "b"),
        ("a short match yields to idle capacity", [12, 0, 0], [2, 0, 0], "bc"),
        ("a short match decides among equals", [1, 1, 1], [2, 0, 0], "a"),
        ("no match at all: the least loaded", [3, 2, 3], [0, 0, 0], "b"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_prefix_cache_weighs_match_against_load(
    why: str, in_flight: list[int], matched: list[int], expected: str
) -> None:
    among = candidates(in_flight, matched)
    assert {chosen("prefix-cache", case(f"d{n}", 8), among) for n in range(30)} <= set(expected), why


def test_replicas_send_an_unknown_prefix_to_one_instance_though_their_counts_differ() -> None:
    views = [candidates([5, 5, 5, 5]), candidates([5, 6, 5, 5]), candidates([6, 5, 6, 6])]
    places = {chosen("prefix-cache", case(f"d{n}", 8, replicas=3), views[n % 3]) for n in range(30)}
    assert len(places) == 1
    spread = set()
    for number in range(30):
        other = [seed_of(f"prompt {number}")]
        one = Case(ScheduleRequest("d", "r", "m"), other, seed_of("d"), 0, 3)
        spread.add(chosen("prefix-cache", one, views[0]))
    assert spread == set("abcd")


def test_a_hot_prefix_spreads_before_one_instance_drowns() -> None:
    in_flight, matched = [0, 0, 0, 0], [8, 0, 0, 0]
    for number in range(200):
        position = IDS.index(chosen("prefix-cache", case(f"d{number}", 8), candidates(in_flight, matched)))
        in_flight[position] += 1
        matched[position] = 8
    assert max(in_flight) - min(in_flight) <= 17


def test_fully_held_prompts_spread_by_decision() -> None:
    among = candidates([1, 1, 1], [8, 8, 8])
    picker = Best(0.0, by_block=True)
    assert {picker.pick(case(f"d{n}", 8), among, np.ones(3)) for n in range(40)} == {0, 1, 2}
