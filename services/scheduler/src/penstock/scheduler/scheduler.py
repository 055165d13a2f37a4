"""schedule(): one request and the view in, one decision out. Reserving is the caller's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from penstock.common.messages import Mode, Placement, Reason, Rejection, ScheduleRequest
from penstock.common.routing_events import CandidateTerms
from penstock.scheduler.candidates import Candidates, Case
from penstock.scheduler.draws import seed_of
from penstock.scheduler.policies.filters import OwnedBy
from penstock.scheduler.pool import Floats
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.profile import Profile, look_up
from penstock.scheduler.view import ClusterView

# Candidates of a decision that the routing log shows.
SHOWN = 3
HASH_BYTES = 8
_DROPPED_BITS = np.uint64(4)
# Messages quote what clients sent; the wire allows 2,048 characters.
MAX_MESSAGE = 1024


class Decision(msgspec.Struct, frozen=True):
    """What was decided and why. `slot` is -1 for a rejection; `terms` are the best candidates, the chosen
    one first."""

    outcome: Placement | Rejection
    policy: str
    slot: int = -1
    hashes: Sequence[int] = ()
    terms: list[CandidateTerms] = []
    excluded: dict[str, int] = {}
    seed: int = 0


def schedule(
    request: ScheduleRequest,
    view: ClusterView,
    index: PrefixIndex,
    profiles: Mapping[str, Profile],
    *,
    default: str,
    replicas: int,
) -> Decision:
    """Place `request` by the profile it names, else by `default`; nothing is changed by it.

    `replicas` is the number of schedulers alive.
    """
    profile = profiles.get(request.strategy or default)
    if profile is None:
        message = f"unknown routing strategy {request.strategy!r}; one of: {', '.join(profiles)}"
        return _reject(request, "unknown", Reason.BAD_STRATEGY, message)
    if request.mode is not Mode.NEUTRAL:
        message = f"mode {request.mode.value}: disaggregation is not configured"
        return _reject(request, profile.name, Reason.BAD_REQUEST, message)
    if len(request.block_hashes) % HASH_BYTES:
        message = "block_hashes is not a sequence of 64-bit hashes"
        return _reject(request, profile.name, Reason.BAD_REQUEST, message)
    pool = view.pool(request.model)
    if pool is None:
        message = f"no instance serves model {request.model!r}"
        return _reject(request, profile.name, Reason.UNKNOWN_MODEL, message)
    case = Case(request, unpack(request.block_hashes), seed_of(request.decision_id), pool.turn, replicas)
    candidates = profile.candidates(case, pool, view.loads)
    if not len(candidates):
        return _none_left(request, profile, candidates)
    return _choose(case, candidates, index, profile)


def unpack(packed: bytes) -> list[int]:
    """The upper 60 bits of the block hashes on the wire, little-endian u64; the length is a multiple of 8.

    A larger int takes 48 bytes instead of 32, a sixth of the prefix index's memory; among 10**6 blocks two
    agree in 60 bits once in two million indexes.
    """
    return (np.frombuffer(packed, dtype="<u8") >> _DROPPED_BITS).tolist() if packed else []


def _choose(case: Case, candidates: Candidates, index: PrefixIndex, profile: Profile) -> Decision:
    if profile.by_prefix:
        look_up(case, candidates, index)
    scores = profile.scores(case, candidates)
    chosen = profile.picker.pick(case, candidates, scores)
    slot = int(candidates.kept.slots[chosen])
    if profile.by_prefix:
        matched = int(candidates.matched[chosen])
    else:
        steps = index.match(case.hashes, 1 << slot)
        matched = steps[-1][0] if steps else 0
    request = case.request
    placement = Placement(
        request.decision_id, candidates.id(chosen), policy=profile.name, matched_blocks=matched
    )
    terms = _terms(candidates, scores, chosen, matched)
    return Decision(placement, profile.name, slot, case.hashes, terms, candidates.kept.excluded, case.seed)


def _terms(candidates: Candidates, scores: Floats, chosen: int, matched: int) -> list[CandidateTerms]:
    """The chosen one, then the best others. `scores` is used up."""
    requests, lengths = candidates.requests, candidates.matched if candidates.steps else None
    terms = []
    position = chosen
    for _ in range(min(SHOWN, len(scores))):
        blocks = matched if position == chosen else int(lengths[position]) if lengths is not None else 0
        score = scores.item(position)
        terms.append(CandidateTerms(candidates.id(position), score, int(requests[position]), blocks))
        scores[position] = -1.0
        position = int(scores.argmax())
    return terms


def _none_left(request: ScheduleRequest, profile: Profile, candidates: Candidates) -> Decision:
    pool, excluded = candidates.kept.pool, candidates.kept.excluded
    if excluded.get(OwnedBy.name) == len(pool):
        owners = ", ".join(sorted({instance.owner for instance in pool.instances} - {""})) or "none"
        message = f"model {request.model!r} is not served by owner {request.owner!r}; owners: {owners}"
        return _reject(request, profile.name, Reason.UNKNOWN_MODEL, message, excluded)
    dropped = ", ".join(f"{name} {count}" for name, count in excluded.items())
    message = f"none of the {len(pool)} instances of model {request.model!r} can take it: {dropped}"
    return _reject(request, profile.name, Reason.NO_INSTANCE, message, excluded)


def _reject(
    request: ScheduleRequest,
    policy: str,
    reason: Reason,
    message: str,
    excluded: dict[str, int] | None = None,
) -> Decision:
    rejection = Rejection(request.decision_id, reason, message[:MAX_MESSAGE])
    return Decision(rejection, policy, excluded=excluded or {}, seed=seed_of(request.decision_id))
