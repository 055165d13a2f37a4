"""InFlightLedger: what is in flight per instance, summed from what the ingresses say.

An ingress is the only truth about its own work (DESIGN 3.4); a placement that no report covers yet counts
until it is covered or its time is up. Applying is idempotent, in any order: an entry carries the
sequence of the report it is from, only a later report changes it, and what finished stays finished for
older reports and for placements.

`now` is a monotonic clock in seconds. The ledger's own clock stands still while the bus is lost.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque

from penstock.common.messages import LoadReport, Placed
from penstock.common.model import InstanceId
from penstock.scheduler.dividing import PREFILL_SUFFIX
from penstock.scheduler.entries import Books, Orphan
from penstock.scheduler.sums import InFlightSums, InstanceLoad

SILENCE_S = 5.0
# A living ingress numbers a snapshot each second: if its numbers stay below the highest for longer, that
# one was not its own (forged, or of a counter that fell).
BEHIND_S = 2.5
TOMBSTONE_S = 60.0
MAX_INGRESSES = 1024
MAX_PER_INGRESS = 65_536
# Of decisions counted, and of placements whose time runs.
MAX_IN_FLIGHT = 1_048_576
# Of each of two generations; past it they live shorter than TOMBSTONE_S.
MAX_TOMBSTONES = 131_072
MAX_PIECES = 64
# Of placements that an ingress never confirmed, per ingress; of what dead ones leave, until it is told.
MAX_UNCONFIRMED = 1024
MAX_ORPHANS = 65_536
SILENT = f"its ingress has said nothing for {SILENCE_S:g} s"
REPLACED = "its ingress was started again"
# Deadline, ingress, incarnation, decision.
_Unconfirmed = tuple[float, str, str, str]


class InFlightLedger:
    """Applies placements and load reports; `loads` and `changes` read the sums."""

    def __init__(self) -> None:
        self._ingresses: dict[str, Books] = {}
        self._sums = InFlightSums()
        # By deadline: those that came in its order, as nearly all do, and the others.
        self._unconfirmed: deque[_Unconfirmed] = deque()
        self._unordered: list[_Unconfirmed] = []
        # Sequences by what is over: the report that finished a decision, an incarnation's last.
        self._over: dict[str | tuple[str, str], int] = {}
        self._over_before: dict[str | tuple[str, str], int] = {}
        self._turned_at = 0.0
        self._paused_at: float | None = None
        self._standstill_s = 0.0
        # What is not counted, or not any more, by reason: the outcome of every bound.
        self.dropped: Counter[str] = Counter()
        self._orphans: list[Orphan] = []

    # Reading

    @property
    def in_flight(self) -> int:
        """Decisions counted."""
        return self._sums.in_flight

    def load(self, instance: InstanceId) -> tuple[int, int]:
        """(requests, tokens) in flight on an instance."""
        return self._sums.load(instance)[1:3]

    def full_load(self, instance: InstanceId) -> InstanceLoad:
        """(instance, requests, tokens, prompt tokens to compute before a first answer)."""
        return self._sums.load(instance)

    def changes(self) -> list[InstanceLoad]:
        """The full load of all whose load changed since the last call."""
        return self._sums.changes()

    def has_snapshot_of(self, ingress: str) -> bool:
        """Whether a complete snapshot of the ingress's present incarnation was applied."""
        source = self._ingresses.get(ingress)
        return source is not None and source.floor > 0

    @property
    def ingresses(self) -> int:
        """Ingresses counted."""
        return len(self._ingresses)

    @property
    def dirty(self) -> int:
        """Ingresses of which a report is missing that no snapshot has made good."""
        return sum(source.missing > 0 for source in self._ingresses.values())

    def silent_s(self, now: float) -> float:
        """How long ago the ingress that is silent for longest was heard, inf without one."""
        heard = (source.heard_at for source in self._ingresses.values())
        return self._moment(now) - min(heard, default=-math.inf)

    # Applying

    def place(self, placed: Placed, confirm_within_s: float, now: float) -> bool:
        """Count a placement, one's own or a sibling's; False if it is over, covered or counted already."""
        moment = self._moment(now)
        decision = placed.decision_id
        if decision in self._over or decision in self._over_before:
            return False
        source = self._ingresses.get(placed.ingress)
        if source is None:
            source = self._open(placed.ingress, placed.incarnation, 0, moment)
        if source is None:
            return False
        if source.incarnation != placed.incarnation:
            # A placement does not tell which incarnation is alive; the next report covers it.
            self.dropped["other incarnation"] += 1
            return False
        work = source.work.get(decision)
        if work is None:
            if not self._has_room(source):
                return False
            work = source.work[decision] = self._sums.start(
                placed.instance, placed.tokens, placed.uncached_tokens, 0
            )
        elif work.sequence or work.instance == placed.instance:
            return False
        else:
            self._sums.move(work, placed.instance, placed.tokens, placed.uncached_tokens)
        work.deadline = moment + confirm_within_s
        entry = work.deadline, placed.ingress, placed.incarnation, decision
        if not self._unconfirmed or self._unconfirmed[-1][0] <= work.deadline:
            self._unconfirmed.append(entry)
        else:
            heapq.heappush(self._unordered, entry)
        return True

    def report(self, report: LoadReport, now: float) -> bool:
        """Apply what an ingress says of itself; False if it was refused."""
        moment = self._moment(now)
        if report.pieces and not report.piece < report.pieces <= MAX_PIECES:
            self.dropped["malformed report"] += 1
            return False
        source = self._ingresses.get(report.ingress)
        if source is None or source.incarnation != report.incarnation:
            source = self._open(report.ingress, report.incarnation, report.sequence, moment)
        if source is None:
            return False
        source.heard_at = moment
        if report.leaving:
            source.sequence = max(source.sequence, report.sequence)
            self._end(report.ingress, source)
            return True
        if report.sequence > source.sequence:
            source.risen_at = moment
        elif moment - source.risen_at >= BEHIND_S:
            self.dropped["numbers fell"] += 1
            self._release(source)
            source = self._begin(report.ingress, report.incarnation, moment)
        if report.sequence > source.sequence + 1:
            source.missing = report.sequence - 1
        source.sequence = max(source.sequence, report.sequence)
        self._finish(source, report)
        if report.sequence >= source.floor:
            self._apply(source, report)
        if report.pieces:
            self._take_piece(source, report)
        return True

    def expire(self, now: float) -> list[str]:
        """Drop what its time is up for; the ingresses released for silence. Nothing while paused."""
        if self._paused_at is not None:
            return []
        moment = self._moment(now)
        for deadline, ingress, incarnation, decision in self._due(moment):
            source = self._ingresses.get(ingress)
            if source is None or source.incarnation != incarnation:
                continue
            work = source.work.get(decision)
            if work is not None and not work.sequence and work.deadline <= deadline:
                self._sums.drop(source.work.pop(decision))
                self.dropped["not confirmed"] += 1
                if len(source.unconfirmed) >= MAX_UNCONFIRMED:
                    del source.unconfirmed[next(iter(source.unconfirmed))]
                source.unconfirmed[decision] = work.instance
        silent = [i for i, source in self._ingresses.items() if moment - source.heard_at >= SILENCE_S]
        for ingress in silent:
            source = self._ingresses.pop(ingress)
            self._orphan(ingress, source, SILENT)
            self._release(source)
        if moment - self._turned_at >= TOMBSTONE_S or len(self._over) >= MAX_TOMBSTONES:
            self._over_before, self._over, self._turned_at = self._over, {}, moment
        return silent

    @property
    def paused(self) -> bool:
        """Whether its clock stands still."""
        return self._paused_at is not None

    def pause(self, now: float) -> None:
        """The bus is lost: silence proves nothing from here on."""
        if self._paused_at is None:
            self._paused_at = now

    def resume(self, now: float) -> None:
        """The bus is back: every ingress has its full grace again."""
        if self._paused_at is None:
            return
        self._standstill_s += now - self._paused_at
        self._paused_at = None
        for source in self._ingresses.values():
            source.heard_at = self._moment(now)

    # The parts of a report

    def _finish(self, source: Books, report: LoadReport) -> None:
        over, sequence = self._over, report.sequence
        for decision in report.finished:
            if over.get(decision, 0) < sequence:
                over[decision] = sequence
            work = source.work.get(decision)
            if work is not None and work.sequence <= sequence:
                self._sums.drop(source.work.pop(decision))

    def _apply(self, source: Books, report: LoadReport) -> None:
        held, sequence = source.work, report.sequence
        for entry in report.in_flight:
            decision, tokens = entry.decision_id, entry.prompt_tokens + entry.output_tokens
            pending = 0 if entry.output_tokens else max(0, entry.prompt_tokens - entry.cached_tokens)
            work = held.get(decision)
            if work is not None:
                if work.sequence <= sequence:
                    work.sequence = sequence
                    # An ingress that was given no `matched_tokens` knows less than the placement did.
                    pending = min(pending, work.pending) if work.instance == entry.instance else pending
                    if (work.tokens, work.pending, work.instance) != (tokens, pending, entry.instance):
                        self._sums.move(work, entry.instance, tokens, pending)
            elif self._is_over(decision, sequence):
                continue
            elif self._has_room(source):
                held[decision] = self._sums.start(entry.instance, tokens, pending, sequence)

    def _is_over(self, decision: str, sequence: int) -> bool:
        """Whether a later report than `sequence` finished it. The same report may finish and start again
        under one id: its entries are the later word."""
        return max(self._over.get(decision, 0), self._over_before.get(decision, 0)) > sequence

    def _take_piece(self, source: Books, report: LoadReport) -> None:
        """Pieces carry consecutive sequences, so the first one's names the snapshot."""
        first = report.sequence - report.piece
        if first <= source.floor or first < source.open:
            return
        if first != source.open:
            source.open, source.open_pieces = first, 0
        source.open_pieces |= 1 << report.piece
        if source.open_pieces != (1 << report.pieces) - 1:
            return
        for decision in [d for d, work in source.work.items() if 0 < work.sequence < first]:
            self._sums.drop(source.work.pop(decision))
        source.floor = first
        if source.missing < first + report.pieces:
            source.missing = 0

    # The books

    def _open(self, ingress: str, incarnation: str, sequence: int, moment: float) -> Books | None:
        """Books for this incarnation, in place of another's; None if there is no room or it ended.

        Nothing tells which of two incarnations is the younger. One that ended and then says something
        later than its last word is alive: so a straggler of a dead one is corrected by the next report
        of the living."""
        ended = self._over.get((ingress, incarnation), self._over_before.get((ingress, incarnation)))
        if ended is not None and sequence <= ended:
            self.dropped["ended incarnation"] += 1
            return None
        other = self._ingresses.get(ingress)
        if other is not None:
            self._orphan(ingress, other, REPLACED)
            self._end(ingress, other)
        elif len(self._ingresses) >= MAX_INGRESSES:
            self.dropped["too many ingresses"] += 1
            return None
        return self._begin(ingress, incarnation, moment)

    def _begin(self, ingress: str, incarnation: str, moment: float) -> Books:
        source = self._ingresses[ingress] = Books(incarnation, moment, moment, {})
        return source

    def _end(self, ingress: str, source: Books) -> None:
        del self._ingresses[ingress]
        self._release(source)
        self._over[ingress, source.incarnation] = source.sequence

    def _release(self, source: Books) -> None:
        for work in source.work.values():
            self._sums.drop(work)

    def orphans(self, count: int) -> list[Orphan]:
        """What ingresses that are gone have left, to be told once; at most so many at a time."""
        some, self._orphans = self._orphans[:count], self._orphans[count:]
        return some

    def _orphan(self, ingress: str, source: Books, cause: str) -> None:
        """Both shares of a pair are one decision. One that was not confirmed may have ended otherwise: its
        own outcome then beats this."""
        left = {**source.unconfirmed, **{d: work.instance for d, work in source.work.items()}}
        decisions = {d.removesuffix(PREFILL_SUFFIX): instance for d, instance in left.items()}
        room = MAX_ORPHANS - len(self._orphans)
        self.dropped["orphans"] += max(0, len(decisions) + 1 - room)
        self._orphans += [
            Orphan(ingress, source.incarnation, cause),
            *(Orphan(ingress, source.incarnation, cause, *left) for left in decisions.items()),
        ][:room]

    def _due(self, moment: float) -> list[_Unconfirmed]:
        """Placements whose time is up; they are asked for once."""
        due: list[_Unconfirmed] = []
        while self._unconfirmed and self._unconfirmed[0][0] <= moment:
            due.append(self._unconfirmed.popleft())
        while self._unordered and self._unordered[0][0] <= moment:
            due.append(heapq.heappop(self._unordered))
        return due

    def _has_room(self, source: Books) -> bool:
        if (
            len(source.work) < MAX_PER_INGRESS
            and self._sums.in_flight < MAX_IN_FLIGHT
            and len(self._unconfirmed) + len(self._unordered) < MAX_IN_FLIGHT
        ):
            return True
        self.dropped["ledger full"] += 1
        return False

    def _moment(self, now: float) -> float:
        return (now if self._paused_at is None else self._paused_at) - self._standstill_s
