"""schedule(): one request and the view in, one decision out. Reserving is the caller's."""

from __future__ import annotations

from typing import Final, cast

import msgspec

from penstock.common.messages import Placement, Reason, Rejection, ScheduleRequest
from penstock.common.routing_events import CandidateTerms
from penstock.scheduler.candidates import Candidates, held_by, part_of, share_of
from penstock.scheduler.chain import HASH_BYTES, chain_of
from penstock.scheduler.decisions import Basis, Case, Decision
from penstock.scheduler.draws import seed_of
from penstock.scheduler.policies.catalog import BadStrategy, Catalog
from penstock.scheduler.policies.custom import PolicyFault
from penstock.scheduler.policies.filters import OWNER, SATURATED
from penstock.scheduler.policies.measures import ExpectedTtft
from penstock.scheduler.policies.pickers import Best
from penstock.scheduler.policies.scorers import Headroom, Least, PrefixMatch
from penstock.scheduler.pool import Floats, Kept, Pool
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.profile import Index, Profile, look_up
from penstock.scheduler.sweep import MAX_TOKENS, Sweep
from penstock.scheduler.view import ClusterView

# Candidates of a decision that the routing log shows.
SHOWN: Final = 3
# Among so many candidates the best are found by sorting: a third of the time of numpy's maxima.
_FEW_SCORES: Final = 32
# Messages quote what clients sent; the wire allows 2,048 characters.
MAX_MESSAGE: Final = 1024
# A client that finds everything full comes back after so long.
SATURATED_RETRY_S: Final = 1.0
UNKNOWN: Final = "unknown"
# Who knows the score at a position, by `item`.
Totals = Floats | Sweep


def schedule(
    request: ScheduleRequest,
    view: ClusterView,
    index: PrefixIndex,
    catalog: Catalog,
    *,
    default: str,
    replicas: int,
) -> Decision:
    """Place `request` by the profile it names, else by `default`; nothing is changed by it.

    `replicas` is the number of schedulers alive.
    """
    try:
        profile = catalog.choose(request, default)
    except BadStrategy as exc:
        return reject(request, UNKNOWN, exc.reason, str(exc))
    if len(request.block_hashes) % HASH_BYTES:
        message = "block_hashes is not a sequence of 64-bit hashes"
        return reject(request, profile.name, Reason.BAD_REQUEST, message)
    pool = view.pool(request.model)
    if pool is None:
        message = f"no instance serves model {request.model!r}"
        return reject(request, profile.name, Reason.UNKNOWN_MODEL, message)
    case = Case(request, chain_of(request.block_hashes), seed_of(request.decision_id), pool.turn, replicas)
    kept = _standing(profile, case, pool)
    candidates = (
        Candidates(kept, view.loads) if kept is not None else profile.candidates(case, pool, view.loads)
    )
    if not len(candidates):
        decision = none_left(request, profile, candidates)
        return msgspec.structs.replace(decision, basis=Basis(case, profile, candidates.kept))
    try:
        return choose(case, candidates, index, profile)
    except PolicyFault as fault:
        # What the policy that failed looked up is not the fallback's.
        fresh = Candidates(candidates.kept, view.loads)
        decision = choose(case, fresh, index, catalog.fallback)
        return msgspec.structs.replace(decision, fault=fault)


def _standing(profile: Profile, case: Case, pool: Pool) -> Kept | None:
    """Whom the filters leave, if that is known without asking them."""
    request = case.request
    if request.excluded or pool.limits is not None or not profile.unfiltered:
        return None
    return pool.standing.get((profile.role, request.owner))


def choose(
    case: Case, candidates: Candidates, index: Index, profile: Profile, shown: int = SHOWN
) -> Decision:
    """The choice among the candidates that the filters left, of which there is at least one, with the terms
    of `shown` of them. Raises PolicyFault."""
    if profile.by_prefix:
        look_up(case, candidates, index)
    kept = candidates.kept
    numbers, sweep = kept.numbers, kept.sweep
    if sweep is not None and shown == SHOWN and profile.swept and _can_sweep(case, candidates):
        totals: Totals = sweep
        parts = _score(sweep, case, candidates, profile)
        ranked = _ranked(sweep, case, candidates, profile)
    else:
        sums, parts = profile.parts(case, candidates)
        totals, ranked = sums, _best(sums, profile.picker.pick(case, candidates, sums), shown)
    chosen = ranked[0]
    slot = numbers[chosen] if numbers else kept.slots.item(chosen)
    if profile.by_prefix:
        steps = candidates.steps
        matched = held_by(steps, slot) if steps else 0
    else:
        steps = index.match(case.hashes, 1 << slot)
        matched = steps[-1][0] if steps else 0
    request, hashes = case.request, case.hashes
    tokens = 0
    if matched:
        part, whole = part_of(case, matched)
        tokens = part * request.prompt_tokens // whole
    # In the order of their fields: by name they cost three times as much.
    placement = Placement(
        request.decision_id, candidates.id(chosen), "", profile.name, matched, tokens, profile.config
    )
    terms = _terms(candidates, profile.names, totals, parts, ranked, matched)
    basis = Basis(case, profile, kept, steps)
    return Decision(
        placement, profile.label or profile.name, slot, hashes, terms, kept.excluded, case.seed, None, basis
    )


def _can_sweep(case: Case, candidates: Candidates) -> bool:
    """Whether machine code has the numbers, and they are the same there."""
    loads = candidates.loads
    return 0 <= case.request.prompt_tokens < MAX_TOKENS and loads.cells.stand_for(loads)


def _score(sweep: Sweep, case: Case, candidates: Candidates, profile: Profile) -> list[Floats]:
    """What `Profile.parts` comes to; the scores of several scorers, one by one."""
    cells, (scorer, weight) = candidates.loads.cells, profile.scorers[0]
    if isinstance(scorer, Least):
        measure, tokens = cast("ExpectedTtft", scorer.measure), case.request.prompt_tokens
        held = [(share_of(case, blocks, -tokens) + tokens, mask) for blocks, mask in candidates.steps]
        prefill, wait_ms = cells.ranked_ms_per_token, cells.wait_ms
        sweep.by_cost(prefill, wait_ms, float(tokens), held, measure.wait_weight, measure.small)
        return []
    if isinstance(scorer, PrefixMatch):
        headroom, room_weight = cast("tuple[Headroom, float]", profile.scorers[1])
        shares = [(share_of(case, blocks, 1.0), mask) for blocks, mask in candidates.steps]
        guard, room = (scorer.requests, scorer.ratio), (headroom.requests, headroom.ratio)
        sweep.by_prefix(cells.queued, shares, candidates.mean, guard, room, (weight, room_weight))
        return [sweep.held.array, sweep.room.array]
    # FewestRequests: (1 + least) / (1 + requests).
    sweep.by_cost(cells.ranked_ms_per_token, cells.queued, 0.0, (), 1.0, 1.0)
    return []


def _ranked(sweep: Sweep, case: Case, candidates: Candidates, profile: Profile) -> list[int]:
    """Positions of the chosen one, then of the best others: what `Best.pick` and `_best` come to."""
    picker = cast("Best", profile.picker)
    band = picker.width(case)
    chosen = sweep.only(band)
    if chosen < 0:
        chosen = sweep.drawn(band, picker.key(case, candidates))
    return sweep.ranked(chosen)


def _best(scores: Floats, chosen: int, shown: int) -> list[int]:
    """Positions of the chosen one, then of the best others; of equals the first."""
    if len(scores) <= _FEW_SCORES:
        ranked = sorted(range(len(scores)), key=scores.tolist().__getitem__, reverse=True)
        ranked.remove(chosen)
        return [chosen, *ranked[: shown - 1]]
    left, ranked = scores.copy(), [chosen]
    for _ in range(min(shown, len(scores)) - 1):
        left[ranked[-1]] = -1.0
        ranked.append(int(left.argmax()))
    return ranked


def _terms(
    candidates: Candidates,
    names: tuple[str, ...],
    totals: Totals,
    parts: list[Floats],
    ranked: list[int],
    matched: int,
) -> list[CandidateTerms]:
    """What spoke for those at the positions `ranked`; the first one holds `matched` blocks. A Sweep's scores
    are those of a single scorer."""
    requests, kept, steps = candidates.loads.requests, candidates.kept, candidates.steps
    ids, rows, slots, numbers = kept.pool.ids, kept.rows, kept.slots, kept.numbers
    own, lengths = kept.ids, candidates.matched if steps and kept.sweep is None else None
    # Of a single scorer in one step: for each candidate its dict costs a third.
    alone = names[0] if len(names) == 1 else ""
    terms: list[CandidateTerms] = []
    blocks = matched
    for position in ranked:
        score = totals.item(position)
        if not alone:
            values = {name: part.item(position) for name, part in zip(names, parts, strict=True)}
        elif not parts or parts[0] is totals:
            values = {alone: score}
        else:
            values = {alone: parts[0].item(position)}
        if numbers:
            slot, instance = numbers[position], own[position]
        else:
            slot, instance = slots.item(position), ids[rows.item(position)]
        if terms:
            blocks = held_by(steps, slot) if lengths is None else int(lengths.item(position))
        terms.append(CandidateTerms(instance, score, int(requests.item(slot)), blocks, values))
    return terms


def none_left(request: ScheduleRequest, profile: Profile, candidates: Candidates) -> Decision:
    """Why no instance is left, for people and by its code."""
    pool, excluded = candidates.kept.pool, candidates.kept.excluded
    if excluded.get(OWNER) == len(pool):
        known = {instance.owned_by(request.model) for instance in pool.instances} - {""}
        owners = ", ".join(sorted(known)) or "none"
        message = f"model {request.model!r} is not served by owner {request.owner!r}; owners: {owners}"
        return reject(request, profile.name, Reason.UNKNOWN_MODEL, message, excluded)
    dropped = ", ".join(f"{name} {count}" for name, count in excluded.items())
    if SATURATED in excluded:
        message = f"every instance of model {request.model!r} that can take it is at its limit: {dropped}"
        return reject(request, profile.name, Reason.SATURATED, message, excluded, SATURATED_RETRY_S)
    message = f"none of the {len(pool)} instances of model {request.model!r} can take it: {dropped}"
    return reject(request, profile.name, Reason.NO_INSTANCE, message, excluded)


def reject(
    request: ScheduleRequest,
    policy: str,
    reason: Reason,
    message: str,
    excluded: dict[str, int] | None = None,
    retry_after_s: float = 0.0,
) -> Decision:
    """A refusal; `policy` is its label in metrics, `excluded` counts instances by the filter that dropped."""
    rejection = Rejection(request.decision_id, reason, message[:MAX_MESSAGE], retry_after_s)
    return Decision(rejection, policy, excluded=excluded or {}, seed=seed_of(request.decision_id))
