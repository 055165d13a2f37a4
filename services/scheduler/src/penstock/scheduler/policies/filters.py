"""Filters: which candidates stay. `keep` returns flags aligned with the candidates, or None for all.

That an instance serves the request's model is what makes it a member of the pool; no filter asks again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from penstock.common.model import Instance, Role
from penstock.scheduler.candidates import Candidates
from penstock.scheduler.decisions import Case
from penstock.scheduler.pool import Flags, Floats, Pool

SATURATED, OWNER = "saturated", "owner"
# A filter is made for each profile and strategy that is asked for: past so many, lengths are looked up again.
MAX_LENGTHS = 256


class Filter(Protocol):
    """Keep or drop; `name` stands in the log for what was dropped."""

    @property
    def name(self) -> str: ...

    def keep(self, case: Case, candidates: Candidates) -> Flags | None:
        """True for each candidate that stays."""


@dataclass(frozen=True)
class TakesWork:
    """Drops instances that are draining or unhealthy by the registry."""

    name: str = "not-taking-work"

    def keep(self, case: Case, candidates: Candidates) -> Flags | None:
        instances = candidates.kept.pool.instances
        return _flags(instances[row].takes_work for row in candidates.kept.rows)


@dataclass(frozen=True)
class HasRole:
    """Drops instances of another role. Where none is neutral, those that decode do all of a request: they
    compute prompts too, if they must."""

    role: Role
    name: str = "role"

    def keep(self, case: Case, candidates: Candidates) -> Flags | None:
        instances, role = candidates.kept.pool.instances, self.role
        roles = [instances[row].role for row in candidates.kept.rows]
        if role is Role.NEUTRAL and role not in roles:
            role = Role.DECODE
        return _flags(one is role for one in roles)


@dataclass(frozen=True)
class OwnedBy:
    """Drops instances of another owner than the request names, if it names one."""

    name: str = OWNER

    def keep(self, case: Case, candidates: Candidates) -> Flags | None:
        owner, instances = case.request.owner, candidates.kept.pool.instances
        if not owner:
            return None
        model = case.request.model
        return _flags(instances[row].owned_by(model) == owner for row in candidates.kept.rows)


@dataclass(frozen=True)
class NotExcluded:
    """Drops the instances that the request names as tried and failed."""

    name: str = "excluded"

    def keep(self, case: Case, candidates: Candidates) -> Flags | None:
        excluded = case.request.excluded
        if not excluded:
            return None
        return _flags(candidates.id(position) not in excluded for position in range(len(candidates)))


@dataclass(frozen=True)
class InSoundDomain:
    """Drops instances whose failover domain (one host, one unit) has an unhealthy one, as far as others are
    left: the domain is a guess about what fails next, and a guess does not refuse requests."""

    name: str = "failover-domain"

    def keep(self, case: Case, candidates: Candidates) -> Flags | None:
        pool = candidates.kept.pool
        if not pool.in_failed_domains:
            return None
        flags = _flags(pool.ids[row] not in pool.in_failed_domains for row in candidates.kept.rows)
        return flags if flags.any() else None


@dataclass(frozen=True)
class NotSaturated:
    """Drops instances with as many requests in flight as their label `penstock/max-requests` allows, else
    `max_requests` (0: no limit); and those whose tokens in flight would, with the request's own, be more than
    `kv_ratio` (0: no limit) of the KV cache that the engine reports. One that has nothing in flight takes any
    request. In flight is the ledger's: an engine's own count is seconds old."""

    max_requests: int = 0
    kv_ratio: float = 0.0
    name: str = SATURATED

    def keep(self, case: Case, candidates: Candidates) -> Flags | None:
        fewer = self._fewer(candidates)
        if not self.kv_ratio:
            return fewer
        loads, slots = candidates.loads, candidates.kept.slots
        sizes, tokens = loads.kv_tokens.take(slots), loads.tokens.take(slots) + case.request.prompt_tokens
        room: Flags = (sizes == 0) | (tokens <= self.kv_ratio * sizes) | (loads.requests.take(slots) == 0)
        return room if fewer is None else fewer & room

    def _fewer(self, candidates: Candidates) -> Flags | None:
        kept, limits = candidates.kept, candidates.kept.pool.limits
        if limits is None:
            if not self.max_requests:
                return None
            return candidates.loads.requests[kept.slots] < self.max_requests
        if self.max_requests:
            limits = np.where(np.isfinite(limits), limits, self.max_requests)
        return candidates.loads.requests[kept.slots] < limits[kept.rows]


class Lengths(Protocol):
    """Prompt lengths that instances take."""

    def of(self, instance: Instance) -> tuple[int, int] | None:
        """Least and most tokens, both included; None for any. A least above the most: none."""


@dataclass(frozen=True, eq=False)
class FittingPrompt:
    """Drops instances that take shorter or longer prompts only. A request of unknown length fits all."""

    lengths: Lengths
    name: str = "prompt-length"

    def keep(self, case: Case, candidates: Candidates) -> Flags | None:
        kept, tokens = candidates.kept, case.request.prompt_tokens
        bounds = kept.pool.lengths.get(self, ...)
        if bounds is ...:
            bounds = self._remembered(kept.pool)
        if bounds is None or not tokens:
            return None
        least, most = bounds
        return (least.take(kept.rows) <= tokens) & (most.take(kept.rows) >= tokens)

    def _remembered(self, pool: Pool) -> tuple[Floats, Floats] | None:
        """Aligned with the pool; None if everybody takes all."""
        pairs = [self.lengths.of(instance) for instance in pool.instances]
        bounds = None
        if any(pairs):
            least = np.array([pair[0] if pair else 0.0 for pair in pairs])
            most = np.array([pair[1] if pair else np.inf for pair in pairs])
            bounds = least, most
        if len(pool.lengths) >= MAX_LENGTHS:
            pool.lengths.clear()
        pool.lengths[self] = bounds
        return bounds


def _flags(values: Iterable[bool]) -> Flags:
    return np.fromiter(values, dtype=np.bool_)
