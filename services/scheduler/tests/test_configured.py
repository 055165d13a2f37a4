"""Config profiles at a decision: which one, what it changes, what a client may override."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.common.messages import Placement, Reason, Rejection, ScheduleRequest
from penstock.common.model import Endpoint, Instance
from penstock.common.profile_sources import ProfileSources
from penstock.common.profiles import read_document
from penstock.scheduler.bench import table_of
from penstock.scheduler.policies.configured import ConfiguredCatalog
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.scheduler import schedule
from penstock.scheduler.view import ClusterView


class Desk:
    """Instances, one short, one long and one without a label, and the profiles of models."""

    def __init__(self, **models: Any) -> None:
        self.view, self.index = ClusterView(), PrefixIndex(1000)
        tiers = {"a": "short", "b": "long", "c": ""}
        self.view.refresh(
            table_of(
                Instance(id=name, endpoint=Endpoint("h", 1), models=("m", "n"), labels={"tier": tier})
                for name, tier in tiers.items()
            ),
            self.index.forget,
        )
        self.catalog = ConfiguredCatalog(Thresholds())
        self.configure(**models)

    def configure(self, **models: Any) -> None:
        read = {"*" if name == "any" else name: read_document(value) for name, value in models.items()}
        self.catalog.configure(read, ProfileSources(self.catalog.fault))

    def outcome(self, profile: str = "", strategy: str = "", **more: Any) -> Placement | Rejection:
        asked = ScheduleRequest("d", "r", more.pop("model", "m"), profile=profile, strategy=strategy, **more)
        decided = schedule(asked, self.view, self.index, self.catalog, default="least-request", replicas=1)
        return decided.outcome

    def by(self, profile: str = "", strategy: str = "", **more: Any) -> tuple[str, str]:
        """(policy, profile) of a request's placement."""
        outcome = self.outcome(profile, strategy, **more)
        assert isinstance(outcome, Placement), outcome
        return outcome.policy, outcome.profile


TWO = {
    "default": "calm",
    "profiles": {
        "calm": {"routing_strategy": "throughput"},
        "fast": {"routing_strategy": "least-latency"},
        "bare": {},
    },
}
LOCKED = {"profiles": {"default": {"routing_strategy": "throughput", "locked": True}, "free": {}}}


@pytest.mark.parametrize(
    ("config", "profile", "strategy", "decided"),
    [
        (TWO, "", "", ("throughput", "calm")),
        (TWO, "default", "", ("throughput", "calm")),
        (TWO, "fast", "", ("least-latency", "fast")),
        (TWO, "bare", "", ("least-request", "bare")),
        (TWO, "fast", "random", ("random", "fast")),
        (TWO, "AUTO", "", ("throughput", "calm")),
        (LOCKED, "", "random", ("throughput", "default")),
        (LOCKED, "free", "random", ("random", "free")),
        ({"profiles": {"default": {"locked": True}}}, "", "random", ("least-request", "default")),
        ({**TWO, "locked_routing_strategy": "random"}, "fast", "throughput", ("random", "fast")),
        ({"locked_routing_strategy": "random"}, "", "throughput", ("random", "")),
        ({"default": "gone"}, "", "", ("least-request", "")),
    ],
)
def test_lock_then_header_then_profile_then_default(
    config: dict[str, Any], profile: str, strategy: str, decided: tuple[str, str]
) -> None:
    assert Desk(m=config).by(profile, strategy) == decided


def test_models_without_profiles_take_those_of_any_model() -> None:
    desk = Desk(any=LOCKED, m=TWO)
    assert desk.by(model="m") == ("throughput", "calm")
    assert desk.by(model="n", strategy="random") == ("throughput", "default")


@pytest.mark.parametrize(
    ("models", "names"),
    [({"m": TWO}, "auto, bare, calm, default, fast"), ({}, "auto, default"), ({"n": TWO}, "auto, default")],
)
def test_an_unknown_profile_is_refused_with_those_there_are(models: dict[str, Any], names: str) -> None:
    outcome = Desk(**models).outcome("fastest" * 100)
    assert isinstance(outcome, Rejection)
    assert outcome.reason is Reason.BAD_PROFILE
    assert outcome.message.endswith(f"one of: {names}")
    assert len(outcome.message) < 300


def test_profiles_change_from_one_request_to_the_next() -> None:
    desk = Desk(m=TWO)
    assert desk.by() == ("throughput", "calm")
    desk.configure(m=LOCKED)
    assert desk.by() == ("throughput", "default")
    desk.configure()
    assert desk.by() == ("least-request", "")


def test_auto_goes_by_the_size_of_a_request() -> None:
    long = {"routing_strategy": "random", "auto": {"prompt_tokens_gte": 1000}}
    desk = Desk(m={"profiles": {"default": {}, "long": long}})
    assert desk.by("auto", prompt_tokens=1000) == ("random", "long")
    assert desk.by("auto", prompt_tokens=999) == ("least-request", "default")


@pytest.mark.parametrize(
    ("field", "value", "read"),
    [
        ("imbalance_requests", 3.0, lambda p: p.scorers[0][0].requests),
        ("imbalance_ratio", 0.75, lambda p: p.scorers[0][0].ratio),
        ("prefix_weight", 0.9, lambda p: p.scorers[0][1]),
        ("max_requests_per_instance", 7, lambda p: p.filters[-1].max_requests),
    ],
)
def test_a_profile_has_its_own_parameters(field: str, value: float, read: Any) -> None:
    own = {"routing_strategy": "prefix-cache", field: value}
    desk = Desk(m={"profiles": {"default": {"routing_strategy": "prefix-cache"}, "own": own}})
    default, changed = (
        desk.catalog.choose(ScheduleRequest("d", "r", "m", profile=name), "random") for name in ("", "own")
    )
    assert read(changed) == value != read(default)


def test_waiting_counts_as_much_as_the_profile_says() -> None:
    patient = {"routing_strategy": "cache-aware", "wait_weight": 0}
    desk = Desk(m={"profiles": {"default": {"routing_strategy": "cache-aware"}, "patient": patient}})
    desk.view.pool("m")
    desk.view.loads.ranked_ms_per_token[:3] = [0.1, 0.2, 0.2]
    desk.view.loads.wait_ms[:3] = [5000, 0, 0]
    chosen = [desk.outcome(name, prompt_tokens=1000) for name in ("", "patient")]
    assert [one.instance == "a" for one in chosen if isinstance(one, Placement)] == [False, True]


BUCKETS = [
    {"labels": {"tier": "short"}, "max_tokens": 15},
    {"labels": {"tier": "long"}, "min_tokens": 32},
]


@pytest.mark.parametrize(
    ("tokens", "taken"),
    [(0, "abc"), (1, "ac"), (15, "ac"), (16, "c"), (31, "c"), (32, "bc"), (10**6, "bc")],
)
def test_prompts_go_to_instances_that_take_their_length(tokens: int, taken: str) -> None:
    desk = Desk(m={"profiles": {"default": {"routing_strategy": "round-robin", "prompt_buckets": BUCKETS}}})
    pool = desk.view.pool("m")
    assert pool is not None
    placed = set()
    for turn in range(6):
        pool.turn = turn
        outcome = desk.outcome(prompt_tokens=tokens)
        assert isinstance(outcome, Placement)
        placed.add(outcome.instance)
    assert placed == set(taken)


def test_a_length_that_nobody_takes_is_said() -> None:
    short = [{"max_tokens": 15}]
    outcome = Desk(m={"profiles": {"default": {"prompt_buckets": short}}}).outcome(prompt_tokens=16)
    assert isinstance(outcome, Rejection)
    assert (outcome.reason, "prompt-length 3" in outcome.message) == (Reason.NO_INSTANCE, True)


def test_a_policy_that_there_is_not_is_a_fault_of_its_document() -> None:
    catalog = ConfiguredCatalog(Thresholds())
    assert catalog.fault(read_document(TWO)) == ""
    bad = read_document({"profiles": {"a": {"routing_strategy": "fastest"}}})
    assert catalog.fault(bad).startswith(
        "profiles.a.routing_strategy: unknown routing strategy 'fastest'; one"
    )
    assert catalog.fault(read_document({"locked_routing_strategy": "xx"})).startswith("locked_routing_strat")


def test_asking_for_disaggregation_leaves_the_policy_to_the_profile() -> None:
    assert Desk(m=TWO).by(strategy="pd") == ("throughput", "calm")
    assert Desk().by(strategy="pd") == ("least-request", "")


@pytest.mark.parametrize(
    ("config", "strategy", "decided"),
    [
        ({"profiles": {"default": {"routing_strategy": "pd"}}}, "", "least-request"),
        ({"profiles": {"default": {"routing_strategy": "pd"}}}, "random", "random"),
        ({"locked_routing_strategy": "pd"}, "random", "least-request"),
        (
            {"locked_routing_strategy": "pd", "profiles": {"default": {"routing_strategy": "throughput"}}},
            "random",
            "throughput",
        ),
    ],
)
def test_a_profile_that_asks_for_disaggregation_names_no_policy(
    config: Any, strategy: str, decided: str
) -> None:
    assert ConfiguredCatalog(Thresholds()).fault(read_document(config)) == ""
    assert Desk(m=config).by(strategy=strategy)[0] == decided
