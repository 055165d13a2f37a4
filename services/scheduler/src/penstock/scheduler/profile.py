"""Profile: standing filters, filters, weighted scorers, picker - one policy, put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from penstock.common.model import Role
from penstock.scheduler.candidates import Candidates
from penstock.scheduler.chain import Hashes
from penstock.scheduler.decisions import Case
from penstock.scheduler.loads import Loads
from penstock.scheduler.policies.filters import (
    Filter,
    HasRole,
    InSoundDomain,
    NotExcluded,
    NotSaturated,
    OwnedBy,
    TakesWork,
)
from penstock.scheduler.policies.measures import ExpectedTtft
from penstock.scheduler.policies.pickers import Best, Picker
from penstock.scheduler.policies.scorers import FewestRequests, Headroom, Least, PrefixMatch, Scorer
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.pool import Floats, Kept, Pool, whole

# Owners come from a request header: past so many, what was worked out for them goes.
MAX_STANDING = 256


@dataclass(frozen=True)
class Division:
    """When to divide, and how far loads may differ; None is as elsewhere.

    Not if the instance that would decode lacks fewer prompt tokens than `skip_below_tokens`, whose computing
    costs less than a transfer. `neutral`: an instance that does all of a request takes it where it answers
    sooner than a pair. Where requests in flight differ among prefill instances by more than
    `prefill_imbalance`, or among those that decode by `decode_imbalance` or more, the least loaded alone are
    left to choose from; 0: never (AIBrix: its minimal spreads of prefill and decode load imbalance)."""

    skip_below_tokens: int | None = None
    neutral: bool = False
    prefill_imbalance: int | None = None
    decode_imbalance: int | None = None

    def over(self, base: Division) -> Division:
        """The same with what it leaves open from `base`."""
        return Division(
            base.skip_below_tokens if self.skip_below_tokens is None else self.skip_below_tokens,
            self.neutral or base.neutral,
            base.prefill_imbalance if self.prefill_imbalance is None else self.prefill_imbalance,
            base.decode_imbalance if self.decode_imbalance is None else self.decode_imbalance,
        )


@dataclass(frozen=True)
class Profile:
    """`scorers` come with weights that sum to 1, so that totals stay in 0..1; none scores everybody 0.
    `by_prefix`: whether the prefix index is asked."""

    name: str
    picker: Picker
    scorers: tuple[tuple[Scorer, float], ...] = ()
    filters: tuple[Filter, ...] = (NotExcluded(), NotSaturated())
    role: Role = Role.NEUTRAL
    by_prefix: bool = False
    # In metrics, whose labels clients must not multiply; empty: `name`.
    label: str = ""
    # What the log calls the scorers, one by one.
    names: tuple[str, ...] = ()
    # What the policy was built with.
    thresholds: Thresholds = Thresholds()  # noqa: RUF009  # frozen
    # The config profile that it was made for, if any.
    config: str = ""
    # What the config profile says of disaggregation, if anything.
    division: Division | None = None

    @cached_property
    def weights(self) -> dict[str, float]:
        """The scorers' weights by name."""
        weights = (weight for _, weight in self.scorers)
        return dict(zip(self.names, weights, strict=True))

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """What of Loads a decision cannot be computed again without; `requests` is for its readers."""
        names = (name for scorer, _ in self.scorers for name in scorer.reads)
        return tuple(dict.fromkeys(("requests", *names)))

    @cached_property
    def arrays(self) -> tuple[str, ...]:
        """`reads` without the instances' records."""
        return tuple(name for name in self.reads if name in Loads.NAMES)

    @cached_property
    def swept(self) -> bool:
        """Whether a Sweep can do all of the choice."""
        if type(self.picker) is not Best:
            return False
        if tuple(type(scorer) for scorer, _ in self.scorers) == (PrefixMatch, Headroom):
            return True
        if len(self.scorers) != 1 or self.scorers[0][1] != 1.0:
            return False
        scorer = self.scorers[0][0]
        return type(scorer) is FewestRequests or (
            type(scorer) is Least and type(scorer.measure) is ExpectedTtft
        )

    @cached_property
    def unfiltered(self) -> bool:
        """Whether its filters drop those alone that the request or the instances' own limits exclude."""
        return self.filters == (NotExcluded(), NotSaturated())

    def candidates(self, case: Case, pool: Pool, loads: Loads) -> Candidates:
        """Whom the filters leave."""
        key = self.role, case.request.owner
        kept = pool.standing.get(key)
        if kept is None:
            if len(pool.standing) >= MAX_STANDING:
                pool.standing.clear()
            kept = pool.standing[key] = self._standing(case, pool, loads)
        return _apply(self.filters, case, Candidates(kept, loads))

    def _standing(self, case: Case, pool: Pool, loads: Loads) -> Kept:
        """What depends on the registry and the owner alone; kept until the registry changes."""
        filters = OwnedBy(), HasRole(self.role), TakesWork(), InSoundDomain()
        return _apply(filters, case, Candidates(whole(pool), loads)).kept.indexed()

    def scores(self, case: Case, candidates: Candidates) -> Floats:
        """The weighted sum, aligned with the candidates."""
        return self.parts(case, candidates)[0]

    def parts(self, case: Case, candidates: Candidates) -> tuple[Floats, list[Floats]]:
        """(weighted sum, each scorer's scores); of a single scorer of weight 1 both are the same array."""
        if not self.scorers:
            return np.zeros(len(candidates)), []
        scorer, weight = self.scorers[0]
        total = scorer.score(case, candidates)
        parts = [total]
        if weight != 1.0 or len(self.scorers) > 1:
            total = total * weight
        for scorer, weight in self.scorers[1:]:
            part = scorer.score(case, candidates)
            parts.append(part)
            total += part * weight
        return total, parts


class Index(Protocol):
    """What is asked of a prefix index."""

    def match(self, hashes: Hashes, candidates: int) -> Sequence[tuple[int, int]]:
        """See PrefixIndex."""


def look_up(case: Case, candidates: Candidates, index: Index) -> None:
    """Let the candidates know what each holds of the prompt."""
    if len(case.hashes):
        candidates.steps = index.match(case.hashes, candidates.kept.mask)


def _apply(filters: Iterable[Filter], case: Case, candidates: Candidates) -> Candidates:
    if not len(candidates):
        return candidates
    for one in filters:
        flags = one.keep(case, candidates)
        if flags is not None:
            candidates = Candidates(candidates.kept.keep(flags, one.name), candidates.loads)
            if not len(candidates):
                break
    return candidates
