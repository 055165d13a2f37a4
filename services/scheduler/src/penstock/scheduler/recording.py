"""Recordings: what decisions were made on, kept as it stood, and decided again from it."""

from __future__ import annotations

import dataclasses
import struct
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from penstock.common.messages import Placement, Rejection, ScheduleRequest
from penstock.common.model import Endpoint, Instance
from penstock.common.routing_events import Inputs, ViewAge
from penstock.scheduler.candidates import Candidates
from penstock.scheduler.decisions import RECORDING_BYTES, Case, Decision, Recording
from penstock.scheduler.draws import seed_of
from penstock.scheduler.loads import Loads
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.custom import RECORDS, Policy
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.pool import Floats, Pool, Rows, whole
from penstock.scheduler.scheduler import SHOWN, choose, unpack

RING_DECISIONS = 10_000
# With cache-aware, 10,000 decisions of up to 500 instances; past that as many as fit.
RING_BYTES = 128 * 1024 * 1024
ARRAY_BYTES = 48
_ENDPOINT = Endpoint("unknown", 1)
# Has no number at any slot.
_MISSING = np.empty(0)


class BadInputs(ValueError):
    """The inputs do not fit together: they are not what a scheduler wrote."""


def record(
    request: ScheduleRequest, decision: Decision, ingress: str, view: ViewAge, loads: Loads
) -> Recording:
    """To be called before anything of the decision is reserved."""
    if decision.prefill is not None:
        of_prefill = record(request, decision.prefill, ingress, view, loads)
        both = record(request, msgspec.structs.replace(decision, prefill=None), ingress, view, loads)
        held_bytes = both.held_bytes + of_prefill.held_bytes
        return msgspec.structs.replace(both, prefill=of_prefill, held_bytes=held_bytes)
    fault = str(decision.fault) if decision.fault is not None else ""
    # Unpacked hashes are not kept: they take eight times as much. Positional, in the order of the fields: by
    # name they cost three times as much.
    basis, outcome, held = decision.basis, decision.outcome, RECORDING_BYTES + len(request.block_hashes)
    excluded = decision.excluded
    if basis is None:
        return Recording(
            request, outcome, decision.policy, decision.seed, ingress, view, excluded, held_bytes=held
        )
    case, profile = basis.case, basis.profile
    numbers = loads.copies(profile.arrays, basis.kept.mask.bit_length())
    return Recording(
        request,
        outcome,
        decision.policy,
        decision.seed,
        ingress,
        view,
        excluded,
        decision.terms[0].score if decision.terms else 0.0,
        fault,
        profile,
        basis.kept,
        basis.steps,
        case.turn,
        case.replicas,
        numbers,
        held + len(numbers) * (len(numbers[0]) + ARRAY_BYTES),
    )


class Ring:
    """The last decisions of a replica, at most `decisions` of them and `held_bytes`."""

    def __init__(self, decisions: int = RING_DECISIONS, max_bytes: int = RING_BYTES) -> None:
        self._most, self._max_bytes = decisions, max_bytes
        self._recordings: deque[Recording] = deque()
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._recordings)

    def keep(self, recording: Recording) -> None:
        """The oldest ones make room."""
        recordings = self._recordings
        recordings.append(recording)
        self.held_bytes += recording.held_bytes
        while len(recordings) > self._most or self.held_bytes > self._max_bytes:
            self.held_bytes -= recordings.popleft().held_bytes

    def requests(self) -> dict[str, ScheduleRequest]:
        """By decision id; a millisecond for 10,000."""
        return {one.request.decision_id: one.request for one in self._recordings}

    def of(self, name: str) -> list[Recording]:
        """The decisions of a request, or the one of this id; oldest first. A millisecond for 10,000."""
        return [one for one in self._recordings if name in (one.request.request_id, one.request.decision_id)]


def inputs_of(recording: Recording) -> Inputs | None:
    """In the form in which they leave the process; None if no instance was looked at."""
    profile, kept, request = recording.profile, recording.kept, recording.request
    if profile is None or kept is None:
        return None
    arrays = zip(profile.arrays, recording.numbers, strict=True)
    custom = RECORDS in profile.reads
    return Inputs(
        request=msgspec.structs.replace(request, user="", session=""),
        policy=profile.name,
        seed=recording.seed,
        turn=recording.turn,
        replicas=recording.replicas,
        session_seed=seed_of(request.session) if request.session else 0,
        thresholds=dataclasses.asdict(profile.thresholds),
        instances=[kept.pool.ids[row] for row in kept.rows],
        numbers={name: _array(packed).take(kept.slots).tobytes() for name, packed in arrays},
        steps=[(blocks, _bits(mask, kept.slots)) for blocks, mask in recording.steps],
        records=[kept.pool.instances[row] for row in kept.rows] if custom else [],
        prefill=inputs_of(recording.prefill) if recording.prefill is not None else None,
    )


def decide_again(
    inputs: Inputs,
    custom: Mapping[str, Policy] | None = None,
    request: ScheduleRequest | None = None,
    shown: int = SHOWN,
) -> Decision | None:
    """What the scheduler's own code chooses on these inputs; None without candidates, of which nothing is.
    `custom` are the operator's own policies; they are given `request` if it is still known as it came. Of so
    many candidates as `shown` the terms are given.

    Raises:
        BadInputs: they are no inputs of a decision, or of a policy that is not here.
        PolicyFault: the policy failed, which it had not.
    """
    if not inputs.instances:
        return None
    if len(inputs.steps) and max(len(mask) for _, mask in inputs.steps) > len(inputs.instances) // 8 + 1:
        raise BadInputs("a decision cannot be made again on these inputs: steps of other instances")
    try:
        profile = Catalog(msgspec.convert(inputs.thresholds, Thresholds), custom).find(inputs.policy)
        pool, loads = _pool(inputs), _loads(inputs)
        hashes = unpack(inputs.request.block_hashes)
    except (TypeError, ValueError, struct.error, msgspec.MsgspecError) as exc:
        raise BadInputs(f"a decision cannot be made again on these inputs: {exc}") from exc
    case = Case(
        request or inputs.request, hashes, inputs.seed, inputs.turn, inputs.replicas, inputs.session_seed
    )
    steps = [(blocks, int.from_bytes(mask, "little")) for blocks, mask in inputs.steps]
    try:
        return choose(case, Candidates(whole(pool).indexed(), loads), _Held(steps), profile, shown)
    except (AttributeError, IndexError, KeyError, OverflowError) as exc:
        raise BadInputs(f"a decision cannot be made again on these inputs: {exc!r}") from exc


def verdict_of(again: Decision | None, outcome: Placement | Rejection, score: float) -> str:
    """Whether a decision made again is the one that was made, in words. `score` is that of the chosen one."""
    if not isinstance(outcome, Placement):
        return "no candidates, as before" if again is None else "not the same: there are candidates"
    if again is None or not isinstance(again.outcome, Placement):
        return "not the same: no candidates"
    if again.outcome.instance != outcome.instance:
        return f"not the same: {again.outcome.instance}"
    return "same pick, same score" if again.terms[0].score == score else "same pick, another score"


class _Held:
    """The prefix index's answer, as it was."""

    def __init__(self, steps: Sequence[tuple[int, int]]) -> None:
        self._steps = steps

    def match(self, hashes: Sequence[int], candidates: int) -> Sequence[tuple[int, int]]:
        return self._steps


def _pool(inputs: Inputs) -> Pool:
    records = inputs.records or [Instance(id=name, endpoint=_ENDPOINT) for name in inputs.instances]
    if len(records) != len(inputs.instances):
        raise ValueError(f"{len(inputs.instances)} instances and {len(records)} records")
    return Pool(tuple(records), np.arange(len(records), dtype=np.intp))


def _loads(inputs: Inputs) -> Loads:
    """The recorded arrays and no others: a policy that reads one that is missing fails."""
    loads = Loads()
    for name in Loads.NAMES:
        packed = inputs.numbers.get(name)
        if packed is None:
            setattr(loads, name, _MISSING)
            continue
        numbers = _array(packed)
        if len(numbers) != len(inputs.instances):
            raise ValueError(f"{len(inputs.instances)} instances and {len(numbers)} numbers of {name}")
        setattr(loads, name, numbers)
    return loads


def _array(packed: bytes) -> Floats:
    return np.frombuffer(packed, dtype="<f8")


def _bits(mask: int, slots: Rows) -> bytes:
    """The positions in `slots` of the slots in `mask`, as bits."""
    bits = sum(1 << position for position, slot in enumerate(slots.tolist()) if mask >> slot & 1)
    return bits.to_bytes((len(slots) + 7) // 8, "little")
