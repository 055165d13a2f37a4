"""Recordings: what decisions were made on, kept as it stood, and decided again from it."""

from __future__ import annotations

import dataclasses
import struct
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from penstock.common.messages import Placement, Rejection, ScheduleRequest
from penstock.common.model import Endpoint, Instance
from penstock.common.routing_events import Inputs, ViewAge
from penstock.scheduler.candidates import Candidates
from penstock.scheduler.chain import Hashes, unpack
from penstock.scheduler.decisions import Basis, Case, Decision, Facts, MadeBy, Page, Recording
from penstock.scheduler.draws import seed_of
from penstock.scheduler.loads import Cells, Loads
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.custom import RECORDS, Policy
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.pool import Floats, Kept, Pool, Rows, whole
from penstock.scheduler.scheduler import SHOWN, choose

if TYPE_CHECKING:
    from penstock.scheduler.profile import Profile

RING_DECISIONS = 10_000
# With cache-aware, 10,000 decisions of up to 500 instances; past that as many as fit.
RING_BYTES = 128 * 1024 * 1024
_pack: Final = msgspec.msgpack.Encoder().encode
_unpack: Final = msgspec.msgpack.Decoder(list[Facts]).decode
_ENDPOINT = Endpoint("unknown", 1)
# Has no number at any slot.
_MISSING = np.empty(0)
# Arrays of Loads as a choice found them, by slot, and those of the choice of prefill's instance.
Numbers = tuple[tuple[bytes, ...], tuple[bytes, ...]]
_NO_NUMBERS: Final[Numbers] = ((), ())


class BadInputs(ValueError):
    """The inputs do not fit together: they are not what a scheduler wrote."""


class NumbersOf:
    """Copies the numbers that decisions are made on; of many, profile and candidates are the same."""

    def __init__(self, loads: Loads) -> None:
        self._loads = loads
        self._cells: Cells | None = None
        self._profile: Profile | None = None
        self._kept: Kept | None = None
        self._arrays: list[Floats] = []

    def decision(self, decision: Decision) -> Numbers:
        """To be called before anything of the decision is reserved."""
        basis = decision.basis
        if basis is None:
            return _NO_NUMBERS
        own = self._copies(basis.profile, basis.kept)
        its = decision.prefill.basis if decision.prefill is not None else None
        return own, self._copies(its.profile, its.kept) if its is not None else ()

    def _copies(self, profile: Profile, kept: Kept) -> tuple[bytes, ...]:
        """Little-endian f64 by slot."""
        loads = self._loads
        # Columns that have grown are others.
        if profile is not self._profile or kept is not self._kept or loads.cells is not self._cells:
            self._profile, self._kept, self._cells = profile, kept, loads.cells
            slots = kept.mask.bit_length()
            self._arrays = [getattr(loads, name)[:slots] for name in profile.arrays]
        return tuple([array.tobytes() for array in self._arrays])


def _fields(
    request: ScheduleRequest, decision: Decision, basis: Basis, numbers: tuple[bytes, ...], mask_bytes: int
) -> tuple[Any, ...]:
    """The fields of Facts, in their order: packed they are the same, and a record costs twice a tuple."""
    fault, case, terms = decision.fault, basis.case, decision.terms
    return (
        request,
        decision.outcome,
        decision.policy,
        decision.seed,
        decision.excluded,
        terms[0].score if terms else 0.0,
        str(fault) if fault is not None else "",
        [(blocks, mask.to_bytes(mask_bytes, "little")) for blocks, mask in basis.steps],
        case.turn,
        case.replicas,
        numbers,
    )


def _row(request: ScheduleRequest, decision: Decision, numbers: tuple[bytes, ...]) -> tuple[Any, ...]:
    """The same, also of a decision for which no instance was looked at."""
    basis = decision.basis
    if basis is None:
        return request, decision.outcome, decision.policy, decision.seed, decision.excluded
    return _fields(request, decision, basis, numbers, (basis.kept.mask.bit_length() + 7) >> 3)


def facts_of(request: ScheduleRequest, decision: Decision, numbers: Numbers) -> Facts:
    """What of a decision is kept."""
    facts = Facts(*_row(request, decision, numbers[0]))
    if decision.prefill is None or decision.basis is None:
        return facts
    return msgspec.structs.replace(facts, prefill=Facts(*_row(request, decision.prefill, numbers[1])))


def made_by(decision: Decision) -> MadeBy:
    """Profile and candidates of a choice."""
    return (decision.basis.profile, decision.basis.kept) if decision.basis is not None else None


def recording_of(
    request: ScheduleRequest, decision: Decision, numbers: Numbers, ingress: str, view: ViewAge
) -> Recording:
    """One decision by itself."""
    prefill_by = made_by(decision.prefill) if decision.prefill is not None else None
    return _recording(facts_of(request, decision, numbers), ingress, view, made_by(decision), prefill_by)


def _recording(facts: Facts, ingress: str, view: ViewAge, by: MadeBy, prefill_by: MadeBy) -> Recording:
    prefill = Recording(facts.prefill, ingress, view, prefill_by) if facts.prefill is not None else None
    return Recording(facts, ingress, view, by, prefill)


class PageWriter:
    """Gathers the decisions of one message."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._made_by: list[MadeBy] = []
        self._prefill_by: dict[int, MadeBy] = {}
        self._last: MadeBy = None
        self._mask_bytes = 0

    def add(self, request: ScheduleRequest, decision: Decision, numbers: Numbers) -> None:
        """One more; `numbers` are those that it was made on."""
        basis, last, its = decision.basis, self._last, decision.prefill
        if basis is None:
            self._rows.append(_row(request, decision, ()))
            self._made_by.append(None)
        else:
            if last is None or last[0] is not basis.profile or last[1] is not basis.kept:
                self._last = last = basis.profile, basis.kept
                self._mask_bytes = (basis.kept.mask.bit_length() + 7) >> 3
            row = _fields(request, decision, basis, numbers[0], self._mask_bytes)
            if its is not None:
                self._prefill_by[len(self._rows)] = made_by(its)
                row = (*row, _row(request, its, numbers[1]))
            self._rows.append(row)
            self._made_by.append(last)

    def page(self, ingress: str, view: ViewAge) -> Page | None:
        """What was added, None if nothing was; the next page begins."""
        if not self._rows:
            return None
        its = self._prefill_by
        prefill_by = tuple([its.get(number) for number in range(len(self._rows))]) if its else ()
        page = Page(ingress, view, _pack(self._rows), tuple(self._made_by), prefill_by)
        self._rows, self._made_by, self._prefill_by = [], [], {}
        return page


class Ring:
    """The last decisions of a replica: at least `decisions` of them, as far as they fit in `held_bytes`."""

    def __init__(self, decisions: int = RING_DECISIONS, max_bytes: int = RING_BYTES) -> None:
        self._most, self._max_bytes = decisions, max_bytes
        self._pages: deque[Page] = deque()
        self._count = self.held_bytes = 0

    def __len__(self) -> int:
        return self._count

    def keep(self, page: Page) -> None:
        """The oldest pages make room."""
        pages = self._pages
        pages.append(page)
        self.held_bytes += page.held_bytes
        self._count += len(page.made_by)
        while pages and (
            self.held_bytes > self._max_bytes or self._count - len(pages[0].made_by) >= self._most
        ):
            oldest = pages.popleft()
            self.held_bytes -= oldest.held_bytes
            self._count -= len(oldest.made_by)

    def requests(self) -> dict[str, ScheduleRequest]:
        """By decision id; 10 ms for 10,000."""
        facts = (one for page in self._pages for one in _unpack(page.packed))
        return {one.request.decision_id: one.request for one in facts}

    def of(self, name: str) -> list[Recording]:
        """The decisions of a request, or the one of this id; oldest first. A millisecond for 10,000."""
        wanted = name.encode("utf-8", "replace")
        found: list[Recording] = []
        for page in self._pages:
            if wanted not in page.packed:
                continue
            for number, facts in enumerate(_unpack(page.packed)):
                if name in (facts.request.request_id, facts.request.decision_id):
                    prefill_by = page.prefill_by[number] if page.prefill_by else None
                    by = page.made_by[number]
                    found.append(_recording(facts, page.ingress, page.view, by, prefill_by))
        return found


def inputs_of(recording: Recording) -> Inputs | None:
    """In the form in which they leave the process; None if no instance was looked at."""
    if recording.made_by is None:
        return None
    profile, kept = recording.made_by
    facts = recording.facts
    request = facts.request
    arrays = zip(profile.arrays, facts.numbers, strict=True)
    custom = RECORDS in profile.reads
    return Inputs(
        request=msgspec.structs.replace(request, user="", session=""),
        policy=profile.name,
        seed=facts.seed,
        turn=facts.turn,
        replicas=facts.replicas,
        session_seed=seed_of(request.session) if request.session else 0,
        thresholds=_by_name(profile.thresholds),
        instances=[kept.pool.ids[row] for row in kept.rows],
        numbers={name: _array(packed).take(kept.slots).tobytes() for name, packed in arrays},
        steps=[(blocks, _bits(int.from_bytes(mask, "little"), kept.slots)) for blocks, mask in facts.steps],
        records=[kept.pool.instances[row] for row in kept.rows] if custom else [],
        prefill=inputs_of(recording.prefill) if recording.prefill is not None else None,
    )


@lru_cache(64)
def _by_name(thresholds: Thresholds) -> dict[str, int | float]:
    """To take them apart is half of what one decision's inputs cost."""
    return dataclasses.asdict(thresholds)


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

    def match(self, hashes: Hashes, candidates: int) -> Sequence[tuple[int, int]]:
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
