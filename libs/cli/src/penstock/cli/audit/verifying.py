"""A message of the log after the other: its place in its writer's chain, and what it says of requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime

import msgspec

from penstock.cli import event_lines
from penstock.cli.audit.chains import Chains, Fault, Part, text_of
from penstock.cli.audit.reading import part_of
from penstock.cli.audit.reconcile import Ended, Requests
from penstock.cli.event_lines import BrokenEvent, Event
from penstock.common.bus import Stored
from penstock.common.routing_events import (
    ADMITTED,
    GAP,
    LOST,
    OUTCOME,
    PLACEMENT,
    REJECTION,
    ROUTED,
    WRITER_CHANGE,
    Admission,
    GapEvent,
    RouteEvent,
    WriterChange,
    WriterEvent,
)

# Faults found on the way that are kept; the others are counted.
MAX_FAULTS = 10_000
# Decisions and outcomes are told by the clocks of several machines.
CLOCKS_S = 2.0


class _Decided(msgspec.Struct):
    decision_id: str
    request_id: str
    ingress: str = ""


class _Outcome(msgspec.Struct):
    request_id: str
    outcome: str
    ingress: str
    decisions: tuple[str, ...] = ()
    e2e_ms: float = 0.0
    route: str = ""
    undecided: bool = False


class _Admitted(msgspec.Struct):
    ingress: str
    requests: list[Admission]


class Head(msgspec.Struct, frozen=True):
    """The end of a writer's chain: kept elsewhere, it proves later that the log is still the same one."""

    writer: str
    incarnation: str
    last: int
    hash: str


class Verdict(msgspec.Struct, frozen=True):
    """What an audit has found. `whole`: from the stream's very first message on."""

    clean: bool
    whole: bool
    since: str
    until: str
    messages: int
    events: int
    writers: int
    repeated: int
    admitted: int
    decided: int
    finished: int
    lost: int
    superseded: int
    open: int
    faults: list[Fault]
    more_faults: int
    notes: list[str]
    heads: list[Head]


class Verifying:
    """Take every message, in the stream's order, then ask for the verdict."""

    def __init__(self) -> None:
        self._chains, self._requests = Chains(), Requests()
        self._faults: list[Fault] = []
        self._more = 0
        self._messages = self._events = self._first_sequence = 0
        self._since = self._until = 0.0
        self._kinds: Counter[str] = Counter()
        self._takes: dict[str, Callable[[Event, float], None]] = {
            ADMITTED: self._admitted,
            PLACEMENT: self._decided,
            REJECTION: self._decided,
            OUTCOME: self._outcome,
            ROUTED: self._routed,
            WRITER_CHANGE: self._writer,
            GAP: self._gap,
        }

    def take(self, message: Stored) -> None:
        """Check one message."""
        if not self._messages:
            self._first_sequence, self._since = message.sequence, message.time_s
        self._messages += 1
        self._until = max(self._until, message.time_s)
        events, broken = _events_of(message)
        written = _seconds(events[0].time, message.time_s) if events else message.time_s
        part = part_of(message, written)
        if part is None:
            self._note("unreadable", message, "its headers do not say whose it is")
            return
        new = self._chains.is_new(part)
        if (fault := self._chains.see(part)) is not None:
            self._keep(fault)
        if broken:
            self._note("unreadable", message, broken, part)
            return
        if not _numbered(part, events):
            self._note("altered", message, "its events are not those that its headers announce", part)
        if new:
            for event in events:
                self._event(event, message, part)

    def verdict(self, settle_s: float) -> Verdict:
        """What was found; nothing can be taken after it."""
        chains, requests = self._chains, self._requests
        whole = self._first_sequence == 1
        for fault in chains.faults(whole=whole):
            self._keep(fault)
        since = self._since + CLOCKS_S
        for fault in requests.faults(self._until, since, settle_s, chains, whole):
            self._keep(fault)
        heads = [
            Head(*name, last, hash_)
            for name, writer in chains.writers.items()
            for last, hash_ in writer.ends.items()
            if last == writer.expected - 1
        ]
        return Verdict(
            clean=not self._faults,
            whole=whole,
            since=text_of(self._since),
            until=text_of(self._until),
            messages=self._messages,
            events=self._events,
            writers=len(chains.writers),
            repeated=chains.repeated,
            admitted=requests.admitted,
            decided=requests.decided,
            finished=requests.finished,
            lost=requests.lost,
            superseded=requests.superseded,
            open=requests.open_requests(settle_s, self._until, chains),
            faults=self._faults,
            more_faults=self._more,
            notes=self._notes(),
            heads=heads,
        )

    def _notes(self) -> list[str]:
        notes = []
        if not self._messages:
            notes.append("the log holds nothing in this range")
        if self._chains.uncompared:
            notes.append(f"{self._chains.uncompared} messages are there again, too late to be compared")
        return notes

    def _event(self, event: Event, message: Stored, part: Part) -> None:
        self._events += 1
        if (take := self._takes.get(event.kind)) is None:
            return
        try:
            take(event, _seconds(event.time, message.time_s))
        except (msgspec.MsgspecError, UnicodeDecodeError) as exc:
            self._note("unreadable", message, f"event {event.id}: {exc}", part)

    def _admitted(self, event: Event, time: float) -> None:
        data = msgspec.json.decode(event.data, type=_Admitted)
        for one in data.requests:
            self._requests.admit(one.decision_id, one.request_id, data.ingress, time)

    def _decided(self, event: Event, time: float) -> None:
        data = msgspec.json.decode(event.data, type=_Decided)
        self._requests.decide(data.decision_id, data.request_id, data.ingress, time)

    def _outcome(self, event: Event, time: float) -> None:
        data = msgspec.json.decode(event.data, type=_Outcome)
        started = time - data.e2e_ms / 1000
        ended = Ended(
            data.request_id, data.ingress, data.decisions, data.outcome, data.undecided, started, time
        )
        self._requests.end(ended, event.id, routed=bool(data.route))

    def _routed(self, event: Event, time: float) -> None:
        data = msgspec.json.decode(event.data, type=RouteEvent)
        self._requests.route(data.request_id, data.ingress, time)

    def _writer(self, event: Event, time: float) -> None:
        data = msgspec.json.decode(event.data, type=WriterEvent)
        name = data.writer, data.incarnation
        match data.change:
            case WriterChange.ENDED:
                self._chains.over(name, "its process ended by itself", told=True)
            case WriterChange.SILENT:
                cause = f"{data.cause or 'it fell silent'}, as {data.by} saw at {event.time}"
                self._chains.over(name, cause, told=False)
            case WriterChange.ADOPTED:
                cause = f"its process ended without a word before {event.time}"
                self._chains.over(name, cause, data.last, told=True)

    def _gap(self, event: Event, time: float) -> None:
        data = msgspec.json.decode(event.data, type=GapEvent)
        self._chains.told((data.writer, data.incarnation), data.first, data.last, data.cause)

    def _note(self, kind: str, message: Stored, cause: str, part: Part | None = None) -> None:
        writer, incarnation = part.name if part is not None else ("", "")
        first, last = (part.first, part.last) if part is not None else (0, 0)
        cause = f"message {message.sequence} of the stream: {cause}"
        time = text_of(message.time_s)
        self._keep(Fault(kind, writer, incarnation, first, last, max(1, last - first + 1), cause, time))

    def _keep(self, fault: Fault) -> None:
        if len(self._faults) < MAX_FAULTS:
            self._faults.append(fault)
        else:
            self._more += 1


def _events_of(message: Stored) -> tuple[list[Event], str]:
    """The events, and why they cannot be read."""
    try:
        raws = event_lines.split(message.headers, message.payload)
        return [event_lines.parse(raw) for raw in raws], ""
    except BrokenEvent as exc:
        return [], str(exc)


def _numbered(part: Part, events: list[Event]) -> bool:
    """Whether the ids are those of the range; what a witness says has an id of its own."""
    prefix = f"{part.writer}/{part.incarnation}/"
    return len(events) == part.last - part.first + 1 and all(
        event.id == f"{prefix}{number}" or event.id.startswith(f"{LOST}/")
        for number, event in enumerate(events, part.first)
    )


def _seconds(stamp: str, otherwise: float) -> float:
    try:
        return datetime.fromisoformat(stamp).timestamp()
    except ValueError:
        return otherwise
