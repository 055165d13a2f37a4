"""Which of several sources of config profiles counts, and what becomes of those that cannot be used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.common.live_config import Document
from penstock.common.model import Endpoint, Instance
from penstock.common.profile_sources import ProfileSources
from penstock.common.profiles import MAX_TOKENS
from penstock.scheduler.policies.configured import ConfiguredCatalog
from penstock.scheduler.policies.table import Thresholds


@pytest.fixture
def sources() -> ProfileSources:
    return ProfileSources(ConfiguredCatalog(Thresholds()).fault)


def strategy(name: str) -> dict[str, Any]:
    return {"profiles": {"default": {"routing_strategy": name}}}


def annotated(instance: str, config: object, *models: str) -> Instance:
    text = config if isinstance(config, str) else json.dumps(config)
    return Instance(id=instance, endpoint=Endpoint("h", 1), models=models or ("m",), config=text)


def aibrix(name: str, **more: Any) -> dict[str, Any]:
    return {"profiles": {"default": {"routingStrategy": name, **more}}}


def counts(sources: ProfileSources, model: str = "m") -> str | None:
    return sources.models()[model].profiles["default"].routing_strategy


def test_the_live_configuration_counts_before_the_file_before_the_instances(sources: ProfileSources) -> None:
    general = Document(strategy("least-latency"), 1)
    assert sources.take_file(b"'*': {profiles: {default: {routing_strategy: throughput}}}")
    assert counts(sources, "*") == "throughput"
    sources.take_documents({"*": general})
    assert counts(sources, "*") == "least-latency"
    assert sources.take_instances([annotated("a", aibrix("random"))])
    assert (counts(sources), counts(sources, "*")) == ("random", "least-latency")
    sources.take_file(b"m: {profiles: {default: {routing_strategy: round-robin}}}")
    assert counts(sources) == "round-robin"
    sources.take_documents({"*": general, "m": Document(strategy("power-of-two"), 1)})
    assert counts(sources) == "power-of-two"
    sources.take_documents({})
    sources.take_file(b"")
    assert sources.take_instances([])
    assert sources.models() == {}
    assert sources.faults == {}


def test_a_bad_document_leaves_the_last_good_one_and_says_so(sources: ProfileSources) -> None:
    sources.take_documents({"m": Document(strategy("random"), 1)})
    for version, (value, says) in enumerate(
        [
            ({"profiles": {"default": {"imbalance_ratio": 101}}}, "less than or equal to 100, got 101"),
            (strategy("fastest"), "unknown routing strategy 'fastest'"),
            ([], "document"),
        ],
        start=2,
    ):
        sources.take_documents({"m": Document(value, version)})
        assert counts(sources) == "random"
        (fault,) = sources.faults.items()
        assert fault[0] == "profiles of m (admin)"
        assert f"version {version}: " in fault[1]
        assert says in fault[1]
    sources.take_documents({"m": Document(strategy("throughput"), 9)})
    assert (counts(sources), sources.faults) == ("throughput", {})
    sources.take_documents({"m": Document([], 10)})
    sources.take_documents({})
    assert (sources.models(), sources.faults) == ({}, {})


@pytest.mark.parametrize(
    "bad",
    [b"m: [", b"m: {default: 3}", "/profiles.yaml: it is gone", b"m: {locked_routing_strategy: fastest}"],
)
def test_a_bad_file_leaves_the_last_good_one_as_a_whole(sources: ProfileSources, bad: bytes | str) -> None:
    good = b"m: {profiles: {default: {routing_strategy: random}}}"
    assert sources.take_file(good) == [("m", "created")]
    assert sources.take_file(bad) == []
    assert (counts(sources), list(sources.faults)) == ("random", ["the profiles file"])
    assert sources.take_file(good) == []
    assert sources.faults == {}


def test_a_file_tells_which_models_changed(sources: ProfileSources) -> None:
    sources.take_file(b"a: {default: x}\nb: {default: x}\nc: {default: x}")
    changed = sources.take_file(b"b: {default: y}\nc: {default: x}\nd: {}")
    assert changed == [("a", "deleted"), ("b", "updated"), ("d", "created")]


@pytest.mark.parametrize(
    ("says", "counts_for", "disagree"),
    [
        (("random", "random", "random"), "random", ""),
        (
            ("random", "throughput", "throughput"),
            "throughput",
            "1 of 3 instances disagree (i0); what i1 says",
        ),
        (("throughput", "random"), "throughput", "1 of 2 instances disagree (i1); what i0 says"),
    ],
)
def test_of_instances_that_disagree_most_count_then_the_lowest_id(
    sources: ProfileSources, says: tuple[str, ...], counts_for: str, disagree: str
) -> None:
    fleet = [annotated(f"i{number}", aibrix(name)) for number, name in enumerate(says)]
    assert sources.take_instances(reversed(fleet))
    assert counts(sources) == counts_for
    fault = sources.faults.get("profiles of m (instances)", "")
    assert fault.startswith(disagree)
    assert bool(fault) == bool(disagree)
    assert not sources.take_instances(fleet)


def test_prompt_lengths_are_each_instances_own_and_no_disagreement(sources: ProfileSources) -> None:
    short, long = (
        annotated(
            name,
            aibrix(
                "random", routingConfig={"promptLenBucketMinLength": low, "promptLenBucketMaxLength": high}
            ),
        )
        for name, low, high in (("a", 0, 15), ("b", 16, 0))
    )
    sources.take_instances([short, long, annotated("c", "")])
    assert sources.faults == {}
    plain = annotated("c", "")
    lengths = [sources.lengths(one, "default") for one in (short, long, plain)]
    assert lengths == [(0, 15), (16, MAX_TOKENS), None]


@pytest.mark.parametrize(
    "bad", ["{", "[]", '{"profiles": {}}', '{"profiles": {"a": {"requestsPerSecond": "x"}}}']
)
def test_a_broken_annotation_is_told_and_the_others_count(sources: ProfileSources, bad: str) -> None:
    broken = annotated("a", bad, "m", "n")
    assert sources.take_instances([broken, annotated("b", aibrix("random"))])
    assert counts(sources) == "random"
    assert "n" not in sources.models()
    assert sorted(sources.faults) == ["profiles of m (instances)", "profiles of n (instances)"]
    assert all(cause.startswith("instance a: ") for cause in sources.faults.values())
    assert sources.lengths(broken, "default") is None


def test_a_policy_of_aibrix_that_there_is_not_leaves_the_rest_of_the_annotation(
    sources: ProfileSources,
) -> None:
    config = {
        "profiles": {
            "default": {"routingStrategy": "vtc-basic", "requestsPerSecond": 5},
            "b": {"routingStrategy": "random"},
        },
        "lockedRoutingStrategy": "vtc-basic",
    }
    sources.take_instances([annotated("a", config)])
    read = sources.models()["m"]
    assert (counts(sources), read.profiles["b"].routing_strategy) == (None, "random")
    assert (read.profiles["default"].requests_per_second, read.locked_routing_strategy) == (5, None)
    (cause,) = sources.faults.values()
    assert "vtc-basic" in cause
