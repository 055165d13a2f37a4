"""AIBrix's annotation: what each example of it means, and what cannot be used."""

from __future__ import annotations

import json
from typing import Any

import pytest

from penstock.common.aibrix_config import read_annotation
from penstock.common.profiles import MAX_TOKENS, ProfileError


def annotation(profiles: dict[str, Any], **rest: Any) -> str:
    return json.dumps({"profiles": profiles, **rest})


# The annotation of qwen3-8b in AIBrix's own end-to-end tests.
QWEN = annotation(
    {
        "least-request": {"routingStrategy": "least-request"},
        "throughput": {"routingStrategy": "throughput"},
        "cache-friendly": {"routingStrategy": "least-kv-cache"},
        "long-generation": {"routingStrategy": "throughput", "routingConfig": {"maxTokensGte": 2048}},
        "rps-limited": {"routingStrategy": "least-request", "requestsPerSecond": 1},
    },
    defaultProfile="least-request",
)


def test_the_profiles_of_aibrix_own_example_are_all_there() -> None:
    read = read_annotation(QWEN).profiles
    assert read.named("") == "least-request"
    strategies = {name: one.routing_strategy for name, one in read.profiles.items()}
    assert strategies == {
        "least-request": "least-request",
        "throughput": "throughput",
        "cache-friendly": "least-kv-cache",
        "long-generation": "throughput",
        "rps-limited": "least-request",
    }
    assert read.profiles["rps-limited"].requests_per_second == 1
    assert (read.auto(10, 2048), read.auto(10, 100), read.auto(10, 0)) == ("long-generation", "", "")


def test_without_a_default_the_profile_called_default_is_it() -> None:
    read = read_annotation(annotation({"default": {"routingStrategy": "random"}, "b": {}}))
    assert read.profiles.named("") == "default"


@pytest.mark.parametrize("lock", ["least-request", " least-request "])
def test_a_lock_is_the_models(lock: str) -> None:
    read = read_annotation(annotation({"a": {}}, lockedRoutingStrategy=lock))
    assert read.profiles.locked_routing_strategy == "least-request"


@pytest.mark.parametrize(
    ("config", "takes"),
    [
        ({"promptLenBucketMinLength": 0, "promptLenBucketMaxLength": 15}, (0, 15)),
        ({"promptLenBucketMinLength": 16, "promptLenBucketMaxLength": 32, "combined": False}, (16, 32)),
        ({"promptLenBucketMinLength": 33, "promptLenBucketMaxLength": 0}, (33, MAX_TOKENS)),
        ({"promptLenBucketMinLength": -5, "promptLenBucketMaxLength": 9}, (0, 9)),
        ({"promptLenBucketMinLength": 9, "promptLenBucketMaxLength": 5}, (9, 5)),
        ({"promptLenBucketMinLength": 0, "combined": True}, None),
        ({"prefillScorePolicy": "prefix_cache"}, None),
    ],
)
def test_prompt_lengths_are_the_instances_own(config: dict[str, Any], takes: tuple[int, int] | None) -> None:
    read = read_annotation(annotation({"default": {"routingStrategy": "pd", "routingConfig": config}}))
    assert read.takes("default") == takes
    assert read.takes("no-such-profile") == takes
    assert read.profiles.profiles["default"].prompt_buckets is None


@pytest.mark.parametrize("rate", [0, -3, None])
def test_a_rate_that_is_no_rate_is_no_limit(rate: int | None) -> None:
    read = read_annotation(annotation({"a": {"requestsPerSecond": rate}}))
    assert read.profiles.profiles["a"].requests_per_second is None


def test_a_profile_called_auto_cannot_be_chosen() -> None:
    assert list(read_annotation(annotation({"Auto": {}, "b": {}})).profiles.profiles) == ["b"]


def test_keys_that_are_not_known_are_passed_over() -> None:
    read = read_annotation(annotation({"a": {"routingStrategy": "random", "color": 1}}, later=[1]))
    assert read.profiles.profiles["a"].routing_strategy == "random"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Invalid JSON"),
        ("{", "Invalid JSON"),
        ("[" * 5000, "Invalid JSON"),
        ("[]", "document"),
        ("null", "document"),
        ('{"lockedRoutingStrategy": "random"}', "profiles: Field required"),
        (annotation({}, lockedRoutingStrategy="random"), "profiles"),
        (annotation({"a": "random"}), "profiles.a"),
        (annotation({"a": {"routingStrategy": 7}}), "profiles.a.routingStrategy"),
        (annotation({"a": {"requestsPerSecond": "many"}}), "profiles.a.requestsPerSecond"),
        (annotation({"a": {"routingConfig": {"promptTokensGte": 1e300}}}), "promptTokensGte"),
        (annotation({"a": {"routingConfig": {"promptLenBucketMinLength": []}}}), "promptLenBucketMinLength"),
        (annotation({"a\r\nb": {}}), "profiles.a\r\nb"),
        (annotation({"a": {}}, defaultProfile="a b"), "default"),
        ('{"profiles": {"a": {"routingStrategy": "\\ud800"}}}', "JSON"),
    ],
)
def test_what_cannot_be_used_is_said_with_its_field(text: str, says: str) -> None:
    with pytest.raises(ProfileError, match=says.replace(".", r"\.")):
        read_annotation(text)


def test_the_narrowest_of_several_that_fit_is_chosen() -> None:
    def hints(**given: int) -> dict[str, Any]:
        return {"routingConfig": given}

    read = read_annotation(
        annotation(
            {
                "long": hints(promptTokensGte=1000),
                "longer": hints(promptTokensGte=4000),
                "long-and-much": hints(promptTokensGte=1000, maxTokensGte=500),
                "short-b": hints(promptTokensLt=100),
                "short-a": hints(promptTokensLt=100),
                "plain": {},
            }
        )
    ).profiles
    cases = {
        (5000, 0): "longer",
        (2000, 100): "long",
        (5000, 500): "long-and-much",
        (50, 0): "short-a",
        (100, 0): "",
        (0, 0): "",
    }
    assert {size: read.auto(*size) for size in cases} == cases
