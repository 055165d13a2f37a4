"""schedule(): one request and the view in, one decision out. Reserving is the caller's."""

from __future__ import annotations

import struct
from typing import Final

import msgspec
import numpy as np

from penstock.common.messages import Placement, Reason, Rejection, ScheduleRequest
from penstock.common.routing_events import CandidateTerms
from penstock.scheduler.candidates import Candidates, part_of, share_of
from penstock.scheduler.decisions import Basis, Case, Decision
from penstock.scheduler.draws import seed_of
from penstock.scheduler.policies.catalog import BadStrategy, Catalog
from penstock.scheduler.policies.custom import PolicyFault
from penstock.scheduler.policies.filters import OWNER, SATURATED
from penstock.scheduler.policies.measures import ExpectedTtft
from penstock.scheduler.policies.pickers import Best
from penstock.scheduler.pool import Floats
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.profile import Index, Profile, look_up
from penstock.scheduler.sweep import MAX_TOKENS, Sweep
from penstock.scheduler.view import ClusterView

# Candidates of a decision that the routing log shows.
SHOWN: Final = 3
HASH_BYTES: Final = 8
_DROPPED_BITS = np.uint64(4)
# Up to so many are taken apart one by one; numpy needs 1 us to begin with.
_FEW_BYTES: Final = 16 * HASH_BYTES
# Among so many candidates the best are found by sorting: a third of the time of numpy's maxima.
_FEW_SCORES: Final = 32
# Messages quote what clients sent; the wire allows 2,048 characters.
MAX_MESSAGE: Final = 1024
# A client that finds everything full comes back after so long.
SATURATED_RETRY_S: Final = 1.0
UNKNOWN: Final = "unknown"


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
    case = Case(request, unpack(request.block_hashes), seed_of(request.decision_id), pool.turn, replicas)
    candidates = profile.candidates(case, pool, view.loads)
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


def unpack(packed: bytes) -> list[int]:
    """The upper 60 bits of the block hashes on the wire, little-endian u64; the length is a multiple of 8.

    A larger int takes 48 bytes instead of 32, a sixth of the prefix index's memory; among 10**6 blocks two
    agree in 60 bits once in two million indexes.
    """
    if len(packed) <= _FEW_BYTES:
        return [block >> 4 for block in struct.unpack(f"<{len(packed) // HASH_BYTES}Q", packed)]
    blocks: list[int] = (np.frombuffer(packed, dtype="<u8") >> _DROPPED_BITS).tolist()
    return blocks


def choose(
    case: Case, candidates: Candidates, index: Index, profile: Profile, shown: int = SHOWN
) -> Decision:
    """The choice among the candidates that the filters left, of which there is at least one, with the terms
    of `shown` of them. Raises PolicyFault."""
    if profile.by_prefix:
        look_up(case, candidates, index)
    kept, swept = candidates.kept, profile.swept
    sweep = kept.sweep
    if (
        sweep is not None
        and swept is not None
        and shown == SHOWN
        and case.request.prompt_tokens < MAX_TOKENS
        and candidates.loads.cells.stand_for(candidates.loads)
    ):
        ranked = _sweep(sweep, case, candidates, *swept)
        scores, parts = [sweep.score(position) for position in ranked], None
    else:
        totals, by_scorer = profile.parts(case, candidates)
        ranked = _best(totals, profile.picker.pick(case, candidates, totals), shown)
        scores, parts = [totals.item(position) for position in ranked], by_scorer
    slot = kept.slots.item(ranked[0])
    if profile.by_prefix:
        steps = candidates.steps
        matched = candidates.held_at(ranked[0]) if steps else 0
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
        request.decision_id, candidates.id(ranked[0]), "", profile.name, matched, tokens, profile.config
    )
    terms = _terms(candidates, profile.names, parts, ranked, scores, matched)
    basis = Basis(case, profile, kept, steps)
    return Decision(
        placement, profile.label or profile.name, slot, hashes, terms, kept.excluded, case.seed, None, basis
    )


def _sweep(
    sweep: Sweep, case: Case, candidates: Candidates, picker: Best, measure: ExpectedTtft
) -> list[int]:
    """Positions of the chosen one, then of the best others: what `parts`, `pick` and `_best` come to."""
    tokens = case.request.prompt_tokens
    held = [(share_of(case, blocks, -tokens) + tokens, mask) for blocks, mask in candidates.steps]
    cells = candidates.loads.cells
    sweep.rate(
        cells.ranked_ms_per_token, cells.wait_ms, float(tokens), held, measure.wait_weight, measure.small
    )
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
    parts: list[Floats] | None,
    ranked: list[int],
    scores: list[float],
    matched: int,
) -> list[CandidateTerms]:
    """What spoke for those at the positions `ranked`, which scored `scores`, made of `parts`; None: by a
    single scorer. The first one holds `matched` blocks."""
    requests, kept = candidates.loads.requests, candidates.kept
    ids, rows, slots = kept.pool.ids, kept.rows, kept.slots
    # Of a single scorer in one step: for each candidate its dict costs a third.
    alone = names[0] if len(names) == 1 else ""
    terms: list[CandidateTerms] = []
    for number, position in enumerate(ranked):
        score = scores[number]
        if parts is None:
            values = {alone: score}
        elif alone:
            values = {alone: parts[0].item(position)}
        else:
            values = {name: part.item(position) for name, part in zip(names, parts, strict=True)}
        blocks = candidates.held_at(position) if number else matched
        in_flight = int(requests.item(slots.item(position)))
        terms.append(CandidateTerms(ids[rows.item(position)], score, in_flight, blocks, values))
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
