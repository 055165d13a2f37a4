"""Pickers: the position of one candidate, from the scores. They change neither scores nor state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from penstock.scheduler.candidates import Candidates
from penstock.scheduler.decisions import Case
from penstock.scheduler.draws import draw, rendezvous, rendezvous_few
from penstock.scheduler.pool import FEW, Floats

# Scores this close are equal: sums of products of the same numbers may differ in their last bits.
_ROUNDING = 1e-9


class Picker(Protocol):
    """`pick` is given at least one candidate."""

    def pick(self, case: Case, candidates: Candidates, scores: Floats) -> int:
        """Position of the chosen one."""


@dataclass(frozen=True)
class Best:
    """The highest score; among near-equal ones the first in rendezvous order (DESIGN D3).

    With several replicas alive, near-equal is everything within `band` of the best, since each replica's
    counts lag by the placements that are on their way to it; with one, only what is equal. The order is
    that of the decision, which spreads; or, `by_block`, of the first block that no candidate holds, if
    there is one, so that replicas send equal new prefixes to one instance without talking.
    """

    band: float
    by_block: bool = False

    def pick(self, case: Case, candidates: Candidates, scores: Floats) -> int:
        band = self.width(case)
        if len(scores) <= FEW:
            return self._of_few(case, candidates, scores.tolist(), band)
        best = int(scores.argmax())
        near = (scores >= scores.item(best) - band).nonzero()[0]
        if len(near) == 1:
            return best
        return near.item(rendezvous(candidates.kept.keys[near], self.key(case, candidates)))

    def width(self, case: Case) -> float:
        """Below the best by no more than this is near-equal."""
        return max(self.band, _ROUNDING) if case.replicas > 1 else _ROUNDING

    def _of_few(self, case: Case, candidates: Candidates, scores: list[float], band: float) -> int:
        """The same: a third of the time that numpy takes for a few."""
        floor, kept = max(scores) - band, candidates.kept
        near = [position for position, score in enumerate(scores) if score >= floor]
        if len(near) == 1:
            return near[0]
        keys = kept.few_keys or kept.keys.tolist()
        return near[rendezvous_few([keys[one] for one in near], self.key(case, candidates))]

    def key(self, case: Case, candidates: Candidates) -> int:
        """What the order of near-equal ones is drawn by."""
        if self.by_block and candidates.longest < len(case.hashes):
            return case.hashes[candidates.longest]
        return case.seed


@dataclass(frozen=True)
class Random:
    """Uniform."""

    def pick(self, case: Case, candidates: Candidates, scores: Floats) -> int:
        return draw(case.seed, 0, len(candidates))


@dataclass(frozen=True)
class BestOfTwo:
    """Of two distinct random candidates the one with the higher score, of equals the first drawn."""

    def pick(self, case: Case, candidates: Candidates, scores: Floats) -> int:
        count = len(candidates)
        first = draw(case.seed, 0, count)
        if count == 1:
            return first
        second = (first + 1 + draw(case.seed, 1, count - 1)) % count
        return second if scores[second] > scores[first] else first


@dataclass(frozen=True)
class RoundRobin:
    """One after the other in order of id; the turn is the caller's."""

    def pick(self, case: Case, candidates: Candidates, scores: Floats) -> int:
        return case.turn % len(candidates)
