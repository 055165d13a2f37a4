"""The closed table of policies: what a `routing-strategy` may name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from penstock.scheduler.policies.pickers import Best, BestOfTwo, Random, RoundRobin
from penstock.scheduler.policies.scorers import FewestRequests, Headroom, PrefixMatch
from penstock.scheduler.profile import Profile

LEAST_REQUEST = "least-request"


@dataclass(frozen=True)
class Thresholds:
    """When prefix-cache takes an instance for overloaded; see PrefixMatch and Headroom."""

    imbalance_requests: float = 16.0
    imbalance_ratio: float = 0.25


def _random(thresholds: Thresholds) -> Profile:
    return Profile("random", Random())


def _round_robin(thresholds: Thresholds) -> Profile:
    return Profile("round-robin", RoundRobin())


def _least_request(thresholds: Thresholds) -> Profile:
    return Profile(LEAST_REQUEST, Best(band=0.05), ((FewestRequests(), 1.0),))


def _power_of_two(thresholds: Thresholds) -> Profile:
    return Profile("power-of-two", BestOfTwo(), ((FewestRequests(), 1.0),))


def _prefix_cache(thresholds: Thresholds) -> Profile:
    """2/3 prefix match (of those not overloaded) + 1/3 headroom.

    A full match outweighs any difference in load that the guard lets pass; a match of a quarter of the
    prompt, say a shared system prompt, is outweighed by half the headroom, so that such requests spread.
    The band is one request's worth of headroom by the default thresholds.
    """
    requests, ratio = thresholds.imbalance_requests, thresholds.imbalance_ratio
    return Profile(
        "prefix-cache",
        Best(band=0.02, by_block=True),
        ((PrefixMatch(requests, ratio), 2 / 3), (Headroom(requests, ratio), 1 / 3)),
        by_prefix=True,
    )


POLICIES: Mapping[str, Callable[[Thresholds], Profile]] = {
    "random": _random,
    "round-robin": _round_robin,
    LEAST_REQUEST: _least_request,
    "power-of-two": _power_of_two,
    "prefix-cache": _prefix_cache,
}


def build(thresholds: Thresholds) -> dict[str, Profile]:
    """Every policy by name."""
    return {name: make(thresholds) for name, make in POLICIES.items()}
