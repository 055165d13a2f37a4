"""Requests of the log: each that was admitted is decided and ends, once."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Protocol

import msgspec

from penstock.cli.audit.chains import Fault, Name
from penstock.common.routing_events import LOST

# Decisions that wait for their other events; past it the oldest is reported. Names of ended requests, of ids
# that are not numbered, and of lost ones, that are remembered.
MAX_OPEN, MAX_REMEMBERED = 1_000_000, 262_144
SHOWN_IDS, SHOWN_WRITERS = 20, 5


class Ended(msgspec.Struct, frozen=True):
    """What an outcome says that counts here; `started` and `time` are Unix seconds."""

    request_id: str
    ingress: str
    decisions: tuple[str, ...]
    outcome: str
    undecided: bool
    started: float
    time: float


class _Decision(msgspec.Struct):
    ingress: str
    request_id: str
    time: float
    admitted: bool = False
    decided: bool = False
    closed: bool = False
    lost: bool = False
    # The outcome says that it may not have been decided.
    excused: bool = False


class Numbers:
    """Decision ids that are over: intervals of the numbers of each incarnation, which are few."""

    def __init__(self) -> None:
        self._of: dict[str, list[tuple[int, int]]] = {}
        self._others: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, decision: str) -> bool:
        prefix, number = _split(decision)
        if number is None:
            return decision in self._others
        intervals = self._of.get(prefix, [])
        at = bisect_right(intervals, (number, 1 << 62)) - 1
        return at >= 0 and intervals[at][1] >= number

    def add(self, decision: str) -> None:
        """It is over."""
        prefix, number = _split(decision)
        if number is None:
            self._others[decision] = None
            if len(self._others) > MAX_REMEMBERED:
                self._others.popitem(last=False)
            return
        intervals = self._of.setdefault(prefix, [])
        at = bisect_right(intervals, (number, 1 << 62))
        low = high = number
        if at < len(intervals) and intervals[at][0] == number + 1:
            high = intervals.pop(at)[1]
        if at and intervals[at - 1][1] >= number - 1:
            low, before = intervals.pop(at - 1)
            high, at = max(high, before), at - 1
        intervals.insert(at, (low, high))

    @property
    def intervals(self) -> int:
        """How many there are, the measure of what this takes."""
        return sum(map(len, self._of.values()))


class Writers(Protocol):
    """What is known of who wrote."""

    def gone(self, name: Name) -> str:
        """How it is known that a writer writes no more; empty if it is not."""

    def holed(self, name: Name, since: float) -> bool:
        """Whether events are missing that a writer wrote after a moment."""

    def unsent(self, service: str) -> list[str]:
        """Writers of a service that died, and nobody knows what they had not sent."""


class Requests:
    """Told every event once, in any order; times are Unix seconds of the events."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, _Decision] = OrderedDict()
        self._over = Numbers()
        # Outcomes of dead ingresses' requests; a real one takes its place.
        self._lost: OrderedDict[str, None] = OrderedDict()
        self._routed: OrderedDict[tuple[str, str], tuple[int, float]] = OrderedDict()
        self._given_up: list[tuple[str, _Decision]] = []
        self._twice: list[Fault] = []
        self.admitted = self.decided = self.finished = self.superseded = 0

    @property
    def lost(self) -> int:
        """Requests whose only outcome is that they are lost."""
        return len(self._lost_requests())

    def admit(self, decision: str, request_id: str, ingress: str, time: float) -> None:
        """A decision is asked for."""
        if decision not in self._over:
            held = self._find(decision, request_id, ingress, time)
            self.admitted += not held.admitted
            held.admitted = True

    def decide(self, decision: str, request_id: str, ingress: str, time: float) -> None:
        """A placement or a rejection. Several replicas may decide the same, where answers came too late."""
        if decision in self._over:
            return
        held = self._find(decision, request_id, ingress, time)
        self.decided += not held.decided
        held.decided, held.request_id = True, held.request_id or request_id
        held.ingress = ingress or held.ingress
        self._settle(decision, held)

    def route(self, request_id: str, ingress: str, time: float) -> None:
        """A request was given a route; it may go outside, and never be decided."""
        self._count_route(ingress, request_id, 1, time)

    def end(self, ended: Ended, event_id: str, *, routed: bool) -> None:
        """An outcome; a real one beats one that says that the request is lost."""
        if ended.outcome == LOST:
            self._end_lost(ended)
        else:
            self._end_real(ended, event_id)
        if routed or not ended.decisions:
            self._count_route(ended.ingress, ended.request_id, -1, ended.time)

    def faults(
        self, now: float, since: float, settle_s: float, writers: Writers, whole: bool
    ) -> Iterator[Fault]:
        """What is missing at `now`, the end of the log. What began before `since` is not judged, unless the
        `whole` log was read; nor what is younger than `settle_s`, or goes on in an ingress that lives: see
        `open_requests`."""
        yield from self._twice
        unfinished: dict[tuple[Name, str], list[str]] = {}
        undecided: dict[tuple[Name, str], list[str]] = {}
        lost, dead = self._lost_requests(), writers.unsent("scheduler")
        suspects = f"; {', '.join(dead[:SHOWN_WRITERS])} may have taken it along" if dead else ""
        for decision, held in [*self._given_up, *self._open.items()]:
            name = f"ingress/{held.ingress}", _split(decision)[0]
            if held.time > now - settle_s or (held.time < since and not whole):
                continue
            if held.closed and not (held.decided or held.excused):
                cause = f"its outcome names it, the event of the decision is not in the log{suspects}"
                undecided.setdefault((name, cause), []).append(decision)
            elif held.closed or (name[1], held.request_id) in lost:
                continue
            elif how := _over(held, name, writers):
                unfinished.setdefault((name, how), []).append(decision)
        for kind, found in (("unfinished", unfinished), ("undecided", undecided)):
            for (name, cause), decisions in found.items():
                yield _fault(kind, name, decisions, cause)
        for (ingress, request_id), (count, time) in self._routed.items():
            if count > 0 and since <= time <= now - settle_s:
                cause = "a request that was given a route has no outcome"
                yield Fault("unfinished", f"ingress/{ingress}", "", 0, 0, count, cause, ids=(request_id,))

    def open_requests(self, settle_s: float, now: float, writers: Writers) -> int:
        """Decisions without an outcome that are young, or of an ingress that lives."""
        return sum(
            not held.closed
            and (
                held.time > now - settle_s
                or not _over(held, (f"ingress/{held.ingress}", _split(decision)[0]), writers)
            )
            for decision, held in self._open.items()
        )

    def _lost_requests(self) -> set[tuple[str, str]]:
        held = ((decision, self._open.get(decision)) for decision in self._lost)
        return {(_split(d)[0], (one.request_id if one is not None else "") or d) for d, one in held}

    def _end_lost(self, ended: Ended) -> None:
        for decision in ended.decisions:
            if decision in self._over:
                continue
            held = self._find(decision, ended.request_id, ended.ingress, ended.time)
            held.closed = held.lost = held.excused = True
            held.request_id = held.request_id or ended.request_id
            self._lost[decision] = None
            if len(self._lost) > MAX_REMEMBERED:
                self._lost.popitem(last=False)

    def _end_real(self, ended: Ended, event_id: str) -> None:
        over = [decision for decision in ended.decisions if decision in self._over]
        if over:
            name = f"ingress/{ended.ingress}", _split(over[0])[0]
            cause = f"a second outcome, event {event_id}, names them"
            if len(self._twice) < MAX_REMEMBERED:
                self._twice.append(_fault("twice", name, over, cause))
            return
        self.finished += 1
        superseded = False
        for decision in ended.decisions:
            superseded |= decision in self._lost
            self._lost.pop(decision, None)
            held = self._find(decision, ended.request_id, ended.ingress, ended.started)
            held.closed, held.lost = True, False
            held.excused |= ended.undecided and decision == ended.decisions[-1]
            self._settle(decision, held)
        self.superseded += superseded

    def _find(self, decision: str, request_id: str, ingress: str, time: float) -> _Decision:
        held = self._open.get(decision)
        if held is None:
            held = self._open[decision] = _Decision(ingress, request_id, time)
            if len(self._open) > MAX_OPEN:
                self._given_up.append(self._open.popitem(last=False))
                del self._given_up[MAX_REMEMBERED:]
        return held

    def _settle(self, decision: str, held: _Decision) -> None:
        if held.closed and not held.lost and (held.decided or held.excused):
            self._open.pop(decision, None)
            self._over.add(decision)

    def _count_route(self, ingress: str, request_id: str, change: int, time: float) -> None:
        key = ingress, request_id
        count, first = self._routed.pop(key, (0, time))
        if count + change:
            self._routed[key] = count + change, first
            if len(self._routed) > MAX_REMEMBERED:
                self._routed.popitem(last=False)


def _over(held: _Decision, name: Name, writers: Writers) -> str:
    """Why a decision without an outcome will have none, in words; empty while it may."""
    if how := writers.gone(name):
        return f"it has no outcome; {how}"
    holed = writers.holed(name, held.time)
    return "its outcome may be among the events that are missing of its ingress" if holed else ""


def _split(decision: str) -> tuple[str, int | None]:
    """`5f2a.1c` as ("5f2a", 28); ids of another make have no number."""
    prefix, dot, number = decision.partition(".")
    try:
        return prefix, int(number, 16) if dot and len(number) <= 15 else None
    except ValueError:
        return prefix, None


def _fault(kind: str, name: Name, decisions: Iterable[str], cause: str) -> Fault:
    ids = sorted(decisions, key=_split_key)
    numbers = [number for one in ids if (number := _split(one)[1]) is not None] or [0]
    return Fault(kind, *name, numbers[0], numbers[-1], len(ids), cause, ids=tuple(ids[:SHOWN_IDS]))


def _split_key(decision: str) -> tuple[str, int]:
    prefix, number = _split(decision)
    return prefix, number or 0
