"""Spools of dead processes: what they hold goes into the stream, and their open requests are told lost."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import msgspec

from penstock.common.bus import Bus
from penstock.common.errors import BusError, SpoolFault
from penstock.common.event_batches import INCARNATION, WRITER, SpooledMessage
from penstock.common.event_log import EventWriter
from penstock.common.open_requests import TRACKED, OpenRequests, lost_outcome
from penstock.common.routing_events import (
    GAP,
    OUTCOME,
    WRITER_CHANGE,
    Admission,
    GapEvent,
    WriterChange,
    WriterEvent,
    type_of,
)
from penstock.common.subjects import Stream

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
RETRY_S, FLUSH_S = 1.0, 3.0
WINDOW_MESSAGES = 64


class Checkpoint(Protocol):
    """Requests that were open where it stands."""

    @property
    def requests(self) -> list[Admission]:
        """All of them."""


class Leftover(Protocol):
    """One spool of a dead process, held by nobody else (`penstock.common.adapters.event_spool`)."""

    name: str
    torn: str

    def records(self) -> Iterator[SpooledMessage | Checkpoint]:
        """What it holds, oldest first. Raises SpoolFault."""

    def remove(self) -> None:
        """It is looked after."""

    def release(self) -> None:
        """Leave it to others."""


class _Event(msgspec.Struct):
    type: str
    data: msgspec.Raw


_events = msgspec.json.Decoder(list[_Event])
_data = {type_of(kind): msgspec.json.Decoder(cls) for kind, cls in TRACKED.items()}


class Adopter:
    """Looks for spools whose processes are dead, one at a time; `witness` is the process that does."""

    def __init__(
        self,
        bus: Bus,
        events: EventWriter,
        stream: Stream,
        witness: str,
        find: Callable[[], Iterable[Leftover]],
    ) -> None:
        """`find` gives those that are there at the moment, locked."""
        self._bus, self._events, self._stream, self._witness, self._find = bus, events, stream, witness, find

    async def run(self) -> None:
        """Look again and again; until cancelled."""
        while True:
            for leftover in self._find():
                try:
                    await self._adopt(leftover)
                finally:
                    leftover.release()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _adopt(self, leftover: Leftover) -> None:
        """Until the stream holds all of it. What cannot be read stays where it is."""
        while True:
            try:
                await self._bus.ensure_stream(self._stream)
                known = await self._replay(leftover)
            except BusError as exc:
                log.debug("the spool %s cannot be replayed yet: %s", leftover.name, exc)
                await asyncio.sleep(RETRY_S)
                continue
            except SpoolFault as exc:
                log.error("the spool %s cannot be read, it stays on disk: %s", leftover.name, exc)
                return
            break
        self._tell(leftover, known)
        # Stored, or at least on our own disk, before it leaves theirs.
        await self._events.flush(FLUSH_S)
        leftover.remove()

    async def _replay(self, leftover: Leftover) -> _Known:
        known = _Known()
        messages = (one for one in leftover.records() if known.take(one))
        while window := list(itertools.islice(messages, WINDOW_MESSAGES)):
            sent = [
                self._bus.append(one.subject, one.payload, one.headers)
                for one in window
                if isinstance(one, SpooledMessage)
            ]
            for failed in await asyncio.gather(*sent, return_exceptions=True):
                if isinstance(failed, BaseException):
                    raise failed
        return known

    def _tell(self, leftover: Leftover, known: _Known) -> None:
        if known.requests is not None:
            for end, decisions in known.requests.chains():
                outcome = lost_outcome(
                    decisions,
                    end.request_id,
                    end.model,
                    known.process,
                    self._witness,
                    "its ingress ended without a word",
                )
                self._events.emit(OUTCOME, end.model, end.request_id, outcome)
        if leftover.torn:
            gap = GapEvent(known.writer, known.incarnation, known.last + 1, known.last + 1, 0, leftover.torn)
            self._events.emit(GAP, "", known.writer, gap)
        if known.writer:
            cause = "it ended without a word; what it had on disk is in the log"
            change = WriterEvent(
                known.writer, known.incarnation, WriterChange.ADOPTED, self._witness, known.last, cause
            )
            self._events.emit(WRITER_CHANGE, "", known.writer, change)
        fields = {"spool": leftover.name, "messages": known.messages, "torn": leftover.torn}
        log.warning("the spool of a dead process is in the log", extra={"fields": fields})


class _Known:
    """What a spool tells of its writer."""

    def __init__(self) -> None:
        self.writer = self.incarnation = ""
        self.last = self.messages = 0
        # From the first checkpoint on.
        self.requests: OpenRequests | None = None

    @property
    def process(self) -> str:
        """The writer's id, without its service."""
        return self.writer.partition("/")[2]

    def take(self, record: SpooledMessage | Checkpoint) -> bool:
        """Note a record; whether it is a message."""
        if not isinstance(record, SpooledMessage):
            self.requests = OpenRequests(record.requests) if self.requests is None else self.requests
            return False
        self.writer, self.incarnation = record.headers.get(WRITER, ""), record.headers.get(INCARNATION, "")
        self.last, self.messages = max(self.last, record.last), self.messages + 1
        if self.requests is not None:
            for event in _tracked(record.payload):
                self.requests.take(event)
        return True


def _tracked(payload: bytes) -> Iterator[msgspec.Struct]:
    """The events of a message that tell which requests are open; none of what another release has written."""
    try:
        for event in _events.decode(payload):
            if (decoder := _data.get(event.type)) is not None:
                yield decoder.decode(event.data)
    except msgspec.MsgspecError as exc:
        log.warning("events of a spool cannot be read: %s", exc)
