"""Scorers: one number in 0..1 per candidate, 1 the best, from the request and the arrays alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from penstock.scheduler.candidates import Candidates
from penstock.scheduler.decisions import Case
from penstock.scheduler.policies.measures import Measure
from penstock.scheduler.pool import Floats


class Scorer(Protocol):
    """`score` returns an array of its own, aligned with the candidates, of which there is at least one.
    `name` is what the log calls it, `reads` the arrays of Loads that it reads."""

    @property
    def name(self) -> str: ...

    @property
    def reads(self) -> tuple[str, ...]: ...

    def score(self, case: Case, candidates: Candidates) -> Floats:
        """A number in 0..1 for each."""


@dataclass(frozen=True)
class FewestRequests:
    """(1 + fewest in-flight requests of any candidate) / (1 + in-flight requests), from the ledger: strictly
    falling, 1 for the least loaded, and a difference of a twentieth is as much at every load."""

    name: ClassVar[str] = "fewest-requests"
    reads: ClassVar[tuple[str, ...]] = ("queued",)

    def score(self, case: Case, candidates: Candidates) -> Floats:
        return (1.0 + candidates.least) / (1.0 + candidates.requests)


@dataclass(frozen=True)
class Least:
    """(small + least) / (small + number), in the unit of the measure: 1 for the least, falling to 0."""

    measure: Measure

    @property
    def name(self) -> str:
        """The measure's."""
        return words(type(self.measure).__name__)

    @property
    def reads(self) -> tuple[str, ...]:
        """The measure's."""
        return self.measure.reads

    def score(self, case: Case, candidates: Candidates) -> Floats:
        numbers = self.measure.of(case, candidates)
        small = self.measure.small
        least = numbers.item(numbers.argmin())
        numbers += small
        return np.divide(small + least, numbers, out=numbers)


@dataclass(frozen=True)
class Spread:
    """(most - number) / (most - least): the range of the measure drawn out to 0..1, 1 for all when equal.

    AIBrix's normalisation in weighted lists: what the candidates differ in counts, not by how much.
    """

    measure: Measure

    @property
    def name(self) -> str:
        """The measure's."""
        return words(type(self.measure).__name__)

    @property
    def reads(self) -> tuple[str, ...]:
        """The measure's."""
        return self.measure.reads

    def score(self, case: Case, candidates: Candidates) -> Floats:
        numbers = self.measure.of(case, candidates)
        most, least = numbers.item(numbers.argmax()), numbers.item(numbers.argmin())
        if most - least <= 1e-9 * most:
            return np.ones(len(numbers))
        np.subtract(most, numbers, out=numbers)
        numbers *= 1.0 / (most - least)
        return numbers


@dataclass(frozen=True)
class Headroom:
    """1 - (requests above the least) / (`requests` + `ratio` x mean requests), not below 0.

    Linear in in-flight requests, so that it can be weighed against a prefix match. The scale grows with
    the mean: a difference of five requests is much among ten and noise among hundreds.
    """

    requests: float
    ratio: float
    name: ClassVar[str] = "headroom"
    reads: ClassVar[tuple[str, ...]] = ("queued",)

    def score(self, case: Case, candidates: Candidates) -> Floats:
        scale = self.requests + self.ratio * candidates.mean
        score = candidates.requests * (-1.0 / scale)
        score += 1.0 + candidates.least / scale
        if candidates.most - candidates.least > scale:
            np.maximum(score, 0.0, out=score)
        return score


@dataclass(frozen=True)
class PrefixMatch:
    """Share of the prompt held, from the prefix index; 0 for all without block hashes,
    and for overloaded candidates, so that a hot prefix does not pile up on the instance that holds it.

    Overloaded: more than `requests` in flight above the least loaded, and more than (1 + `ratio`) times the
    mean. The first bound is the guard AIBrix's prefix routing has; alone it fires on noise once hundreds
    are in flight, and on every instance but one when an idle one joins.
    """

    requests: float
    ratio: float
    name: ClassVar[str] = "prefix-match"
    reads: ClassVar[tuple[str, ...]] = ("queued",)

    def score(self, case: Case, candidates: Candidates) -> Floats:
        score = candidates.shares(case)
        bound = candidates.least + self.requests
        if candidates.most > bound:
            score *= candidates.requests <= max(bound, (1.0 + self.ratio) * candidates.mean)
        return score


def words(name: str) -> str:
    """`expected-ttft` of `ExpectedTtft`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
