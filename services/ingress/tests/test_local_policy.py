"""Placement without a scheduler keeps sessions together, within a bound, and spreads the rest."""

from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.messages import ScheduleRequest
from penstock.common.model import Endpoint, Instance
from penstock.common.profiles import ModelProfiles
from penstock.ingress.local_policy import SLACK_REQUESTS, place_locally
from penstock.ingress.local_profiles import LocalProfiles

FLEET = [Instance(id=f"i{n}", endpoint=Endpoint("127.0.0.1", 9000 + n), models=("m",)) for n in range(8)]


def place(
    loads: Mapping[str, int], affinity: bytes = b"", decision: str = "d", fleet: list[Instance] = FLEET
) -> str:
    instance = place_locally(fleet, lambda name: loads.get(name, 0), affinity, decision)
    assert instance is not None
    return instance.id


def test_without_candidates_there_is_no_placement() -> None:
    assert place_locally([], lambda name: 0, b"", "d") is None


@pytest.mark.parametrize("affinity", [b"", b"session"])
def test_a_lone_candidate_is_taken_however_loaded(affinity: bytes) -> None:
    assert place({"i0": 1000}, affinity, fleet=FLEET[:1]) == "i0"


@given(st.binary(min_size=1, max_size=20), st.lists(st.text(max_size=9), min_size=2, max_size=9))
def test_requests_of_one_session_stay_together_whatever_their_decision(
    session: bytes, decisions: list[str]
) -> None:
    assert len({place({}, session, decision) for decision in decisions}) == 1


@pytest.mark.parametrize(
    ("ahead", "sticks"), [(0, True), (SLACK_REQUESTS, True), (SLACK_REQUESTS + 1, False)]
)
def test_a_session_stays_until_its_instance_is_too_far_above_the_least_loaded(
    ahead: int, sticks: bool
) -> None:
    home = place({}, b"session")
    loads = {instance.id: 3 for instance in FLEET} | {home: 3 + ahead}
    assert (place(loads, b"session") == home) is sticks


def test_a_session_that_moves_goes_to_one_of_the_least_loaded_and_always_the_same() -> None:
    home = place({}, b"session")
    loads = {"i1": 2, "i2": 2, "i3": 2, home: 50}
    second = {place(loads, b"session", str(n)) for n in range(20)}
    assert len(second) == 1
    assert loads.get(second.pop(), 0) == 0


def test_a_session_stays_when_other_instances_come_or_go() -> None:
    home = place({}, b"session")
    others = [instance for instance in FLEET if instance.id != home]
    for gone in others:
        fleet = [instance for instance in FLEET if instance is not gone]
        assert place({}, b"session", fleet=fleet) == home


@given(st.dictionaries(st.sampled_from([i.id for i in FLEET]), st.integers(0, 50)), st.text(max_size=9))
def test_without_affinity_the_least_loaded_is_taken(loads: dict[str, int], decision: str) -> None:
    assert loads.get(place(loads, decision=decision), 0) == min(loads.get(i.id, 0) for i in FLEET)


@pytest.mark.parametrize("by", ["decision", "session"])
def test_equal_loads_are_spread_evenly(by: str) -> None:
    counts = Counter(
        place({}, decision=f"d{n}") if by == "decision" else place({}, b"s%d" % n) for n in range(800)
    )
    assert set(counts) == {instance.id for instance in FLEET}
    assert max(counts.values()) < 150


@pytest.mark.parametrize(
    ("profile", "strategy", "kept_by", "most"),
    [
        ("", "", b"12345678", 7),
        ("", "prefix-cache", b"12345678", 7),
        ("", "Least-Request", b"", 7),
        ("", "of-my-own", b"12345678", 7),
        ("", "prefix-cache:6,least-request:1", b"12345678", 7),
        ("batch", "", b"", 64),
        ("batch", "cache-aware", b"12345678", 64),
        ("strict", "cache-aware", b"", 0),
        ("none such", "", b"12345678", 7),
    ],
)
def test_profiles_and_strategies_are_honoured_as_far_as_an_ingress_can(
    profile: str, strategy: str, kept_by: bytes, most: int
) -> None:
    profiles = LocalProfiles(7)
    request = ScheduleRequest(
        "d", "r", "m", strategy=strategy, profile=profile, prompt_tokens=9, block_hashes=b"1234567890123456"
    )
    if not profile:
        assert profiles.of(request) == (kept_by, most)
    document = {
        "profiles": {
            "batch": {"routing_strategy": "throughput", "max_requests_per_instance": 64},
            "strict": {"routing_strategy": "random", "locked": True, "max_requests_per_instance": 0},
        }
    }
    profiles.configure({"m": ModelProfiles.model_validate(document)})
    assert profiles.of(request) == (kept_by, most)
    other = ScheduleRequest("d", "r", "other", strategy=strategy, session="s")
    assert profiles.of(other)[1] == 7
    assert profiles.of(other)[0] in (b"s", b"")
