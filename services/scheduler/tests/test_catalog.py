"""From the text of a strategy to its profile: names, aliases, lists, and what is wrong with the rest."""

from __future__ import annotations

import pytest

from penstock.scheduler.policies.catalog import MAX_PROFILES, WEIGHTED, BadStrategy, Catalog
from penstock.scheduler.policies.table import ALIASES, STRATEGIES, Thresholds

CATALOG = Catalog(Thresholds())


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_policy_goes_by_its_name_in_any_spelling(name: str) -> None:
    for text in (name, f" {name} ", name.upper(), name.replace("-", "_"), f"{name}:7", f"{name},random:0"):
        assert CATALOG.find(text).name == name
        assert not CATALOG.find(text).label


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_other_gateways_names_are_understood(alias: str, name: str) -> None:
    assert CATALOG.find(alias).name == name


def test_a_list_is_named_in_one_spelling_and_counted_under_one_label() -> None:
    profile = CATALOG.find("prefix_cache:6, least-request")
    assert (profile.name, profile.label) == ("prefix-cache:6,least-request:1", WEIGHTED)
    assert profile.by_prefix
    assert [weight for _, weight in profile.scorers] == pytest.approx([6 / 7, 1 / 7])
    assert not CATALOG.find("least-request,throughput").by_prefix


def test_a_member_named_twice_counts_twice() -> None:
    profile = CATALOG.find("least-request:2,throughput:1,least-request:1")
    assert [weight for _, weight in profile.scorers] == pytest.approx([1 / 2, 1 / 4, 1 / 4])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("bogus", "unknown routing strategy 'bogus'; one of: cache-aware, prefix-cache"),
        ("", "unknown routing strategy ''"),
        ("least-request,", "unknown routing strategy ''"),
        ("pd", "unknown routing strategy 'pd'"),
        ("slo-least-load:1,least-request:1", "unknown routing strategy 'slo-least-load:1'"),
        ("a:-1", "unknown routing strategy 'a:-1'"),
        ("least-request:-1", "whole number from 0 to 1000000, got '-1'"),
        ("least-request:1.5", "got '1.5'"),
        ("least-request:", "got ''"),
        ("least-request:1:2", "got '1:2'"),
        ("least-request:1000001", "got '1000001'"),
        ("least-request:٣", "got '٣'"),
        ("least-request:" + "9" * 5000, "whole number"),
        ("least-request:0", "every coefficient in 'least-request:0' is 0"),
        (
            "random:1,least-request:1",
            "random chooses by itself and cannot stand in a list; these can: cache",
        ),
        ("round-robin,least-request", "round-robin chooses by itself"),
        ("least-request,power-of-two", "power-of-two chooses by itself"),
        (",".join(["throughput"] * 17), "at most 16 policies, got 17"),
    ],
)
def test_what_is_wrong_is_said_and_what_is_right_is_listed(text: str, says: str) -> None:
    with pytest.raises(BadStrategy) as bad:
        CATALOG.find(text)
    assert says in str(bad.value)
    assert len(str(bad.value)) < 600


def test_lists_made_up_by_clients_are_not_kept_without_bound() -> None:
    catalog = Catalog(Thresholds())
    for number in range(3 * MAX_PROFILES):
        catalog.find(f"least-request:{number + 1},throughput:1")
    assert len(catalog._profiles) <= MAX_PROFILES
    assert catalog.find("least-request") == catalog.fallback
