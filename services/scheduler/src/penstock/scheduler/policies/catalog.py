"""Catalog: from the text of a `routing-strategy` to the profile it stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from penstock.common.messages import Reason, ScheduleRequest
from penstock.common.profiles import AUTO, DEFAULT, DISAGGREGATED
from penstock.scheduler.policies.custom import Custom, Policy
from penstock.scheduler.policies.filters import NotExcluded, NotSaturated
from penstock.scheduler.policies.pickers import Best
from penstock.scheduler.policies.scorers import Spread
from penstock.scheduler.policies.table import (
    ALIASES,
    LEAST_REQUEST,
    STRATEGIES,
    Shortfall,
    Strategy,
    Thresholds,
)
from penstock.scheduler.profile import Profile

MAX_COEFFICIENT = 1_000_000
MAX_MEMBERS = 16
# Clients name what they like: past so many, profiles made for them are made again.
MAX_PROFILES = 256
_QUOTED = 120
# The label of weighted lists in metrics.
WEIGHTED = "weighted-list"


class BadStrategy(ValueError):
    """The text names no policy; the message lists what it may name."""

    reason = Reason.BAD_STRATEGY


class BadProfile(BadStrategy):
    """A model has no config profile of this name; the message lists those it has."""

    reason = Reason.BAD_PROFILE

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = ", ".join(sorted({*known, DEFAULT, AUTO}))
        super().__init__(f"unknown config profile {name[:_QUOTED]!r}; one of: {names}")


class Catalog:
    """The policies there are: the closed table, and the operator's own."""

    def __init__(self, thresholds: Thresholds, custom: Mapping[str, Policy] | None = None) -> None:
        self._thresholds = thresholds
        self._strategies = {name: make(thresholds) for name, make in STRATEGIES.items()}
        for name, policy in (custom or {}).items():
            scorers = ((Custom(name, policy), 1.0),)
            member = Shortfall(scorers, by_prefix=True)
            self._strategies[name] = Strategy(Best(0.02, by_block=True), scorers, member, by_prefix=True)
        self._filters = NotExcluded(), NotSaturated(thresholds.max_requests, thresholds.max_kv_ratio)
        self._profiles: dict[str, Profile] = {}
        # Takes the decisions that one of the operator's own policies cannot.
        self.fallback = self.find(LEAST_REQUEST)

    @property
    def names(self) -> tuple[str, ...]:
        """Every policy by its own name."""
        return tuple(self._strategies)

    def choose(self, request: ScheduleRequest, default: str) -> Profile:
        """What decides a request: the policy that it names, else `default`.

        Raises:
            BadStrategy: it names a policy, or a config profile, that there is not.
        """
        if request.profile and request.profile.lower() not in (DEFAULT, AUTO):
            raise BadProfile(request.profile, ())
        return self.find(strategy_of(request) or default)

    def find(self, text: str) -> Profile:
        """The profile of a name, an alias, or a weighted list like `prefix-cache:6,least-request:1`.

        Raises:
            BadStrategy: with what was wrong and what there is.
        """
        profile = self._profiles.get(text)
        if profile is None:
            profile = self._make(text)
            if len(self._profiles) >= MAX_PROFILES:
                self._profiles.clear()
            self._profiles[text] = profile
        return profile

    def _make(self, text: str) -> Profile:
        members = self._parse(text)
        if len(members) == 1:
            ((name, _),) = members
            one = self._strategies[name]
            return Profile(
                name,
                one.picker,
                one.scorers,
                self._filters,
                by_prefix=one.by_prefix,
                names=tuple(scorer.name for scorer, _ in one.scorers),
                thresholds=self._thresholds,
            )
        total = sum(coefficient for _, coefficient in members)
        scorers = []
        for name, coefficient in members:
            member = self._strategies[name].member
            if member is None:
                able = ", ".join(name for name, one in self._strategies.items() if one.member)
                raise BadStrategy(f"{name} chooses by itself and cannot stand in a list; these can: {able}")
            scorers.append((Spread(member), coefficient / total))
        by_prefix = any(scorer.measure.by_prefix for scorer, _ in scorers)
        picker = Best(0.02, by_block=by_prefix)
        name = ",".join(f"{name}:{coefficient}" for name, coefficient in members)
        return Profile(
            name,
            picker,
            tuple(scorers),
            self._filters,
            by_prefix=by_prefix,
            label=WEIGHTED,
            names=tuple(_distinct(name for name, _ in members)),
            thresholds=self._thresholds,
        )

    def _parse(self, text: str) -> list[tuple[str, int]]:
        """(name, coefficient above 0) of each entry."""
        entries = text.split(",")
        if len(entries) > MAX_MEMBERS:
            raise BadStrategy(f"a routing strategy lists at most {MAX_MEMBERS} policies, got {len(entries)}")
        members = [self._entry(entry) for entry in entries]
        members = [member for member in members if member[1]]
        if not members:
            raise BadStrategy(f"every coefficient in {text[:_QUOTED]!r} is 0: give at least one above it")
        return members

    def _entry(self, entry: str) -> tuple[str, int]:
        name, colon, coefficient = entry.partition(":")
        name = name.strip().lower().replace("_", "-")
        name = ALIASES.get(name, name)
        if name not in self._strategies:
            raise BadStrategy(
                f"unknown routing strategy {entry.strip()[:_QUOTED]!r}; one of: {', '.join(self.names)}; "
                "or a weighted list of them such as prefix-cache:6,least-request:1"
            )
        digits = coefficient.strip()
        if not colon:
            return name, 1
        if not (
            digits.isascii() and digits.isdigit() and len(digits) < 10 and int(digits) <= MAX_COEFFICIENT
        ):
            raise BadStrategy(
                f"{name}: the coefficient is a whole number from 0 to {MAX_COEFFICIENT}, "
                f"got {digits[:_QUOTED]!r}; as in prefix-cache:6,least-request:1"
            )
        return name, int(digits)


def _distinct(names: Iterable[str]) -> Iterator[str]:
    """`a`, `a#2` of a list that has an entry twice."""
    seen: Counter[str] = Counter()
    for name in names:
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name}#{seen[name]}"


def strategy_of(request: ScheduleRequest) -> str:
    """The text of the policy that a request names; empty if it leaves that to others, as one does that asks
    for disaggregation (its ingress sets the mode)."""
    return "" if request.strategy == DISAGGREGATED else request.strategy
