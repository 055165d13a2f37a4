"""Where prefill and decode of one request go: a pair of one group, or one after the other.

A group is what may exchange KV: instances with the same `group`, or, without one, of the same engine. Prefill
goes where the request's policy sends it, among groups that have room to decode; decode by `decode-balance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from penstock.common.messages import Mode, Placement, ScheduleRequest, Stage
from penstock.common.model import Instance, Role
from penstock.scheduler.candidates import Candidates, part_of
from penstock.scheduler.chain import HASH_BYTES, chain_of
from penstock.scheduler.decisions import Case, Decision
from penstock.scheduler.draws import seed_of
from penstock.scheduler.policies.catalog import BadStrategy, Catalog
from penstock.scheduler.policies.custom import PolicyFault
from penstock.scheduler.policies.table import DECODE_BALANCE
from penstock.scheduler.pool import Pool
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.profile import Division, Profile
from penstock.scheduler.scheduler import (
    UNKNOWN,
    choose,
    none_left,
    reject,
    schedule,
)
from penstock.scheduler.view import ClusterView

# Of prefill's part in a placement of two, beside the decision's own id.
PREFILL_SUFFIX = "+p"
NO_PARTNER, OTHER_GROUP, IMBALANCE = "no-partner", "other-group", "imbalance"

Group = tuple[str, str]


def schedule_divided(
    request: ScheduleRequest,
    view: ClusterView,
    index: PrefixIndex,
    catalog: Catalog,
    division: Division,
    *,
    default: str,
    replicas: int,
) -> Decision:
    """Place one stage of `request`, or both; what its config profile says counts before `division`. A
    placement without `prefill_instance` is not divided: one instance does all of it. Nothing is changed by
    it."""
    try:
        asked, by_decode = catalog.choose(request, default), catalog.find(DECODE_BALANCE)
    except BadStrategy as exc:
        return reject(request, UNKNOWN, exc.reason, str(exc))
    # Limits and prompt lengths of the config profile are those of both.
    by_decode = replace(by_decode, role=Role.DECODE, filters=asked.filters, config=asked.config)
    pool = view.pool(request.model)
    if pool is None or len(request.block_hashes) % HASH_BYTES:
        return schedule(request, view, index, catalog, default=default, replicas=replicas)
    hashes, seed = chain_of(request.block_hashes), seed_of(request.decision_id)
    own = division if asked.division is None else asked.division.over(division)
    case, ratio = Case(request, hashes, seed, pool.turn, replicas), asked.thresholds.imbalance_ratio
    divider = _Divider(case, pool, view, index, catalog, own, ratio)
    if request.stage is Stage.DECODE:
        return divider.second(by_decode)
    decision = divider.first(replace(asked, role=Role.PREFILL), by_decode)
    if decision is not None:
        return decision
    return schedule(request, view, index, catalog, default=default, replicas=replicas)


@dataclass(frozen=True)
class _Divider:
    case: Case
    pool: Pool
    view: ClusterView
    index: PrefixIndex
    catalog: Catalog
    division: Division
    imbalance_ratio: float

    def first(self, by_prefill: Profile, by_decode: Profile) -> Decision | None:
        """Both instances, or prefill's; None if one instance is to do all of it."""
        case, loads, division = self.case, self.view.loads, self.division
        decodes = by_decode.candidates(case, self.pool, loads)
        prefills = _in_groups(by_prefill.candidates(case, self.pool, loads), _groups(decodes), NO_PARTNER)
        if not len(prefills):
            return None
        if division.skip_below_tokens and self._lacks(decodes) < division.skip_below_tokens:
            return self._whole(by_prefill, decodes)
        prefills, decodes = self._evened(prefills, decodes)
        prefill = self._choose(prefills, by_prefill)
        placed = prefill.outcome
        assert isinstance(placed, Placement)
        partner = self.pool.instances[self.pool.ids.index(placed.instance)]
        partners = _in_groups(decodes, {_group(partner)}, OTHER_GROUP)
        if division.neutral and (alone := self._neutral(by_prefill, prefill, partners)) is not None:
            return alone
        if case.request.mode is Mode.PD_STAGED:
            return msgspec.structs.replace(
                prefill, outcome=msgspec.structs.replace(placed, prefill_instance=placed.instance)
            )
        decode = self._choose(partners, by_decode)
        assert isinstance(decode.outcome, Placement)
        both = Placement(
            placed.decision_id,
            decode.outcome.instance,
            placed.instance,
            placed.policy,
            placed.matched_blocks,
            placed.matched_tokens,
            placed.profile,
        )
        # Both choices are told in one event.
        excluded = {**decode.excluded, **{f"prefill-{name}": n for name, n in prefill.excluded.items()}}
        return msgspec.structs.replace(
            decode, outcome=both, policy=prefill.policy, excluded=excluded, prefill=prefill
        )

    def _evened(self, prefills: Candidates, decodes: Candidates) -> tuple[Candidates, Candidates]:
        """Without those that are no choice while loads differ too much: prefill first, then decode among its
        partners, then prefill among decode's."""
        least = self._least_prefills(prefills)
        if least is not prefills:
            prefills, decodes = least, _in_groups(decodes, _groups(least), OTHER_GROUP)
        even = self._least_decodes(decodes)
        if even is not decodes:
            # Those without a partner do not count.
            decodes = self._least_decodes(_in_groups(decodes, _groups(prefills), OTHER_GROUP))
            prefills = _in_groups(prefills, _groups(decodes), OTHER_GROUP)
        return prefills, decodes

    def _least_prefills(self, prefills: Candidates) -> Candidates:
        # A difference of `bound` is none yet here, and one among decodes, as in AIBrix.
        bound = self.division.prefill_imbalance
        return self._least_loaded(prefills) if bound and _spread(prefills) > bound else prefills

    def _least_decodes(self, decodes: Candidates) -> Candidates:
        bound = self.division.decode_imbalance
        return self._least_loaded(decodes) if bound and _spread(decodes) >= bound else decodes

    def _least_loaded(self, candidates: Candidates) -> Candidates:
        """Those with the fewest requests alone, if the most are above the mean by the ratio too: what is much
        among tens is noise among hundreds."""
        if candidates.most <= (1.0 + self.imbalance_ratio) * candidates.mean:
            return candidates
        flags = candidates.requests <= candidates.least
        return Candidates(candidates.kept.keep(flags, IMBALANCE), candidates.loads)

    def _neutral(self, asked: Profile, prefill: Decision, partners: Candidates) -> Decision | None:
        """All of it on a neutral instance, if that one would answer sooner than prefill's is expected to,
        and holds no more requests than the emptiest that would decode."""
        everybody = replace(asked, role=Role.NEUTRAL).candidates(self.case, self.pool, self.view.loads)
        neutral = _kept(everybody, lambda one: one.role is Role.NEUTRAL, NO_PARTNER)
        if not len(neutral):
            return None
        alone = self._choose(neutral, asked)
        if self._ttft_ms(alone) >= self._ttft_ms(prefill):
            return None
        return alone if self.view.loads.queued[alone.slot] <= partners.least else None

    def _ttft_ms(self, decision: Decision) -> float:
        """As `cache-aware` expects it."""
        placed, loads = decision.outcome, self.view.loads
        assert isinstance(placed, Placement)
        uncached = self.case.request.prompt_tokens - placed.matched_tokens
        return float(loads.wait_ms[decision.slot] + uncached * loads.ms_per_token[decision.slot])

    def second(self, by_decode: Profile) -> Decision:
        """The instance that decodes what another one has computed, known by the request alone."""
        request = self.case.request
        decodes = by_decode.candidates(self.case, self.pool, self.view.loads)
        known = {instance.id: instance for instance in self.pool.instances}.get(request.prefill_instance)
        group = _group(known) if known is not None else (request.prefill_group, "")
        if group != ("", ""):
            decodes = _in_groups(decodes, {group}, OTHER_GROUP)
        if not len(decodes):
            return none_left(request, by_decode, decodes)
        return self._choose(self._least_decodes(decodes), by_decode)

    def _lacks(self, decodes: Candidates) -> int:
        """Prompt tokens that the decode candidate which holds most of them does not."""
        request, hashes = self.case.request, self.case.hashes
        steps = self.index.match(hashes, decodes.kept.mask) if len(hashes) else []
        if not steps:
            return request.prompt_tokens
        part, whole = part_of(self.case, steps[-1][0])
        return request.prompt_tokens - part * request.prompt_tokens // whole

    def _whole(self, asked: Profile, decodes: Candidates) -> Decision:
        return self._choose(decodes, asked)

    def _choose(self, candidates: Candidates, profile: Profile) -> Decision:
        try:
            return choose(self.case, candidates, self.index, profile)
        except PolicyFault as fault:
            fresh = Candidates(candidates.kept, candidates.loads)
            decision = choose(self.case, fresh, self.index, self.catalog.fallback)
            return msgspec.structs.replace(decision, fault=fault)


def _group(instance: Instance) -> Group:
    return (instance.group, "") if instance.group else ("", instance.engine)


def _groups(candidates: Candidates) -> set[Group]:
    kept = candidates.kept
    return {_group(kept.pool.instances[row]) for row in kept.rows}


def _spread(candidates: Candidates) -> float:
    """Requests in flight by which the most loaded is above the least."""
    return candidates.most - candidates.least if len(candidates) > 1 else 0.0


def _in_groups(candidates: Candidates, groups: Iterable[Group], reason: str) -> Candidates:
    return _kept(candidates, lambda one: _group(one) in groups, reason)


def _kept(candidates: Candidates, wanted: Callable[[Instance], bool], reason: str) -> Candidates:
    kept = candidates.kept
    if not len(candidates):
        return candidates
    flags = np.fromiter((wanted(kept.pool.instances[row]) for row in kept.rows), dtype=np.bool_)
    return Candidates(kept.keep(flags, reason), candidates.loads)
