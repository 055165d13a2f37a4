"""Writers of the log: their numbers without a gap, each message as the next one says that it was.

A writer numbers its events; a message holds consecutive ones and the hash of the message before. Messages may
be stored out of order, and more than once (penstock.common.event_log).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec

from penstock.common.event_batches import chain

# Past these the writer that is silent for longest, the oldest hash, the oldest range are forgotten.
MAX_WRITERS, MAX_HASHES, MAX_RANGES, MAX_FORGOTTEN = 65_536, 262_144, 1024, 65_536

Range = tuple[int, int]
Name = tuple[str, str]


class Fault(msgspec.Struct, frozen=True):
    """Something that is wrong or missing: `kind` is sequence, tail, chain, altered, unfinished, undecided,
    twice or unreadable; `first` to `last` are numbers of events, or of decisions of the writer's incarnation;
    of a tail, whose end nobody knows, `last` and `count` are 0."""

    kind: str
    writer: str
    incarnation: str
    first: int
    last: int
    count: int
    cause: str
    time: str = ""
    ids: tuple[str, ...] = ()


class Part(msgspec.Struct, frozen=True):
    """What of a message a chain is made of."""

    writer: str
    incarnation: str
    first: int
    last: int
    previous: str
    payload: bytes
    # When the stream took it, and when its first event was written, Unix seconds.
    time: float
    written: float

    @property
    def name(self) -> Name:
        """The writer and its incarnation."""
        return self.writer, self.incarnation


class Writer(msgspec.Struct):
    """One incarnation of a writer; `began` is the first number seen of it, 0 as long as there is none.
    `ended`, unless it is empty, says how it is known that it writes no more; `told`: so does the writer
    itself, or its spool, so that its end is not missing."""

    heard: float
    written: float
    expected: int = 1
    began: int = 0
    missing: list[Range] = []
    ends: dict[int, str] = {}
    starts: dict[int, str] = {}
    ended: str = ""
    told: bool = False
    last: int = 0
    # When it was last seen that events before are missing.
    gap_at: float = 0.0


class Chains:
    """Told every message, in the order of the stream."""

    def __init__(self) -> None:
        self.writers: OrderedDict[Name, Writer] = OrderedDict()
        self._hashes: OrderedDict[tuple[Name, int], str] = OrderedDict()
        self._told: dict[Name, list[tuple[int, int, str]]] = {}
        self._forgotten: list[Fault] = []
        # When the last incarnation of each writer wrote first.
        self._latest: dict[str, float] = {}
        # Messages that are there again, and those of them too old to be compared.
        self.repeated = self.uncompared = 0

    def see(self, part: Part) -> Fault | None:
        """Take a message; what is wrong with it. Of one that is there again see `is_new`."""
        writer = self._writer(part)
        hash_ = chain(part.previous, part.payload)
        if not self._is_missing(writer, part):
            return self._again(part, hash_)
        self._hashes[part.name, part.first] = hash_
        if len(self._hashes) > MAX_HASHES:
            self._hashes.popitem(last=False)
        self._enter(writer, part.first, part.last)
        return self._link(writer, part, hash_)

    def is_new(self, part: Part) -> bool:
        """Whether a message with these numbers was not there before."""
        writer = self.writers.get(part.name)
        return writer is None or self._is_missing(writer, part)

    def over(self, name: Name, how: str, last: int = 0, *, told: bool) -> None:
        """It is known that a writer writes no more, and of its events up to `last` that they were written;
        `told`: that these were all."""
        writer = self.writers.get(name)
        if writer is None:
            writer = self.writers[name] = Writer(0.0, 0.0)
        writer.ended = writer.ended or how
        writer.last, writer.told = max(writer.last, last), writer.told or told

    def told(self, name: Name, first: int, last: int, cause: str) -> None:
        """The log itself says that events are missing."""
        ranges = self._told.setdefault(name, [])
        ranges.append((first, last, cause))
        del ranges[:-MAX_RANGES]

    def gone(self, name: Name) -> str:
        """How it is known that a writer writes no more; empty if it is not."""
        writer = self.writers.get(name)
        if writer is None:
            return ""
        if writer.ended:
            return writer.ended
        # By their own clocks: what a dead one's spool held can come after its successor's first words.
        again = writer.began and self._latest.get(name[0], 0.0) > writer.written
        return "the process was started again" if again else ""

    def holed(self, name: Name, since: float) -> bool:
        """Whether events are missing that a writer wrote after a moment."""
        writer = self.writers.get(name)
        return writer is not None and bool(writer.missing) and writer.gap_at >= since

    def unsent(self, service: str) -> list[str]:
        """Writers of a service that died, and nobody knows what they had not sent."""
        return [
            f"{writer} run {run}"
            for (writer, run), one in self.writers.items()
            if writer.startswith(f"{service}/") and one.began and not one.told and self.gone((writer, run))
        ]

    def faults(self, *, whole: bool) -> Iterator[Fault]:
        """What is missing, once all is read; `whole`: the log was read from its very first message, so that
        what writers wrote before is missing too."""
        yield from self._forgotten
        for name, writer in self.writers.items():
            yield from self._missing(name, writer, whole=whole)

    def _missing(self, name: Name, writer: Writer, *, whole: bool) -> Iterator[Fault]:
        # What was written before the first message that was read is none of this range of the log.
        ranges = [gap for gap in writer.missing if whole or gap[1] >= writer.began]
        if writer.began and not writer.told and (how := self.gone(name)):
            cause = f"what it wrote after event {writer.expected - 1}, if anything, is not known; {how}"
            yield Fault("tail", *name, writer.expected, 0, 0, cause, text_of(writer.heard))
        if writer.last >= writer.expected and (whole or writer.began):
            ranges.append((writer.expected, writer.last))
        for first, last in ranges:
            yield Fault(
                "sequence",
                *name,
                first,
                last,
                last - first + 1,
                self._cause(name, first, last),
                text_of(writer.heard),
            )

    def _cause(self, name: Name, first: int, last: int) -> str:
        told = [cause for low, high, cause in self._told.get(name, ()) if low <= last and first <= high]
        if told:
            return told[0]
        if first == 1:
            return "the stream does not go back to the writer's first message: it was made anew, or cut"
        ended = self.gone(name)
        return f"not in the stream; {ended}" if ended else "not in the stream, and nothing in it says why"

    def _writer(self, part: Part) -> Writer:
        writer = self.writers.get(part.name)
        if writer is None:
            writer = self.writers[part.name] = Writer(part.time, part.written)
            self._latest[part.writer] = max(self._latest.get(part.writer, 0.0), part.written)
            if len(self.writers) > MAX_WRITERS:
                name, oldest = self.writers.popitem(last=False)
                self._forgotten += self._missing(name, oldest, whole=False)
                del self._forgotten[MAX_FORGOTTEN:]
        writer.began = writer.began or part.first
        writer.written = min(writer.written or part.written, part.written)
        self.writers.move_to_end(part.name)
        writer.heard = part.time
        return writer

    @staticmethod
    def _is_missing(writer: Writer, part: Part) -> bool:
        """Whether any of its numbers was not there before."""
        return part.last >= writer.expected or any(
            first <= part.last and part.first <= last for first, last in writer.missing
        )

    @staticmethod
    def _enter(writer: Writer, first: int, last: int) -> None:
        if first < writer.expected:
            writer.missing = [rest for gap in writer.missing for rest in _without(gap, first, last)]
        elif first > writer.expected:
            writer.missing = [*writer.missing, (writer.expected, first - 1)]
            writer.gap_at = writer.heard
            if len(writer.missing) > MAX_RANGES:
                # What lies between is named as missing too: better that than a silent gap.
                (low, _), (_, high), *rest = writer.missing
                writer.missing = [(low, high), *rest]
        writer.expected = max(writer.expected, last + 1)

    def _again(self, part: Part, hash_: str) -> Fault | None:
        self.repeated += 1
        known = self._hashes.get((part.name, part.first))
        if known is None:
            self.uncompared += 1
        elif known != hash_:
            return _of(part, "altered", "the message is in the log a second time, and is another one")
        return None

    @staticmethod
    def _link(writer: Writer, part: Part, hash_: str) -> Fault | None:
        """Compare with the message before and the one after, whichever is there first."""
        fault = None
        if part.first == 1:
            if part.previous:
                fault = _of(part, "chain", "a writer's first message names one before it")
        elif (before := writer.ends.pop(part.first - 1, None)) is None:
            writer.starts[part.first] = part.previous
        elif before != part.previous:
            text = f"the message before it, up to event {part.first - 1}, is not the one that it names"
            fault = _of(part, "chain", text)
        if (after := writer.starts.pop(part.last + 1, None)) is None:
            writer.ends[part.last] = hash_
        elif after != hash_:
            fault = _of(part, "chain", f"the message after it, from event {part.last + 1}, names another one")
        for table in (writer.ends, writer.starts):
            if len(table) > MAX_RANGES:
                del table[min(table)]
        return fault


def _of(part: Part, kind: str, cause: str) -> Fault:
    count = part.last - part.first + 1
    return Fault(kind, *part.name, part.first, part.last, count, cause, text_of(part.time))


def text_of(moment: float) -> str:
    """Unix seconds as a date and time, UTC; empty for 0."""
    if not moment:
        return ""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _without(gap: Range, first: int, last: int) -> list[Range]:
    """What is left of `gap` once first..last came."""
    parts = [(gap[0], min(gap[1], first - 1)), (max(gap[0], last + 1), gap[1])]
    return [part for part in parts if part[0] <= part[1]]
