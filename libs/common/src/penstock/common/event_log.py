"""The routing log's writer: takes events, keeps their messages until they are stored, sends and sends again.

Requests never wait for it. Every message names its writer, the writer's incarnation, the first and
last sequence in it and the hash of the message before, so that a reader sees each gap (DESIGN D2).
With a spool, messages are on disk before they are sent, and stay there when memory has no room for them.
"""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from penstock.common.bus import Bus
from penstock.common.errors import BusError, SpoolFault
from penstock.common.event_batches import (
    MAX_BATCH_EVENTS,
    Emitted,
    Message,
    Place,
    SpooledMessage,
)
from penstock.common.event_packing import Batches, emitted, rfc3339
from penstock.common.open_requests import OpenRequests
from penstock.common.routing_events import (
    ADMITTED,
    DEGRADED,
    GAP,
    ROUTED,
    Admission,
    DegradedEvent,
    GapEvent,
)
from penstock.common.subjects import EVENTS, Stream
from penstock.common.telemetry import Metrics

log = logging.getLogger(__name__)

LINGER_S = 0.01
# Memory bound of what is not acknowledged: packed, as what has to wait is, about 90,000 events.
MAX_KEPT_BYTES = 8 * 1024 * 1024
# Messages sent and not acknowledged at one time; the rest waits its turn in order.
WINDOW_MESSAGES = 256
# And bytes of them: a backlog that left at once would hold up the loop, and every stream on it, for 0.1 s.
WINDOW_BYTES = 1024 * 1024
RESEND_AFTER_S = 1.0

BEGINNINGS = {ROUTED: 0, ADMITTED: 1}

Key = tuple[str, str]


class Spool(Protocol):
    """Where messages are on disk (`penstock.common.adapters.event_spool`). Calls may raise SpoolFault."""

    def write(self, messages: Sequence[Message], opened: Callable[[], list[Admission]]) -> int:
        """Append them and note their places; the first segment that is still there."""

    def load(self, place: Place) -> SpooledMessage:
        """A message that memory had no room for."""

    def stored(self, place: Place) -> None:
        """The stream holds the message."""


class EventWriter:
    """Takes events without waiting; `run` sends them."""

    def __init__(
        self,
        bus: Bus,
        writer: str,
        incarnation: str,
        metrics: Metrics,
        wall_clock: Callable[[], float] = time.time,
        max_kept_bytes: int = MAX_KEPT_BYTES,
        stream: Stream = EVENTS,
        spool: Spool | None = None,
    ) -> None:
        """`writer` is service and id, as in `scheduler/7f3a`; `wall_clock` gives Unix seconds; `stream` is
        EVENTS within the bounds that this deployment wants."""
        self._bus, self._stream, self._spool = bus, stream, spool
        self._writer, self._incarnation, self._wall_clock = writer, incarnation, wall_clock
        self._max_kept_bytes = max_kept_bytes
        self._batches = Batches(writer, incarnation)
        self._open: dict[Key, list[Emitted]] = {}
        self._requests = OpenRequests()
        self._kept: OrderedDict[int, Message] = OrderedDict()
        self._kept_bytes = 0
        # With a spool: numbers of those in memory, oldest first; and the first segment on disk.
        self._resident: deque[int] = deque()
        self._first_segment = 0
        self._spool_fault = ""
        # What was dropped since everything was stored: first and last sequence, how many, since when.
        self._lost = 0, 0, 0, 0.0
        self._in_window = self._window_bytes = 0
        self._stream_known = False
        self._wake, self._empty = asyncio.Event(), asyncio.Event()
        events = metrics.counter("penstock_events_total", "Routing events by what became of them", "result")
        self._written, self._acknowledged, self._dropped = (
            events.labels(result) for result in ("written", "acknowledged", "dropped")
        )
        metrics.gauge(
            "penstock_events_unacknowledged_bytes", "Bytes kept for sending", lambda: self._kept_bytes
        )
        self._degraded = metrics.level(
            "penstock_degraded", "Processes that work around it, as their degraded events say", "what"
        )

    @property
    def spools(self) -> bool:
        """Whether events are on disk before they are sent."""
        return self._spool is not None

    def emit(self, event_type: str, model: str, subject: str, data: msgspec.Struct) -> None:
        """Write one event about `subject` (a request or instance id). Never waits, never fails."""
        self._written.value += 1
        key = event_type, model
        batch = self._open.get(key)
        if batch is None:
            batch = self._open[key] = []
            self._wake.set()
        batch.append(emitted(subject, self._wall_clock(), data, keep=self._spool is not None))
        if len(batch) < MAX_BATCH_EVENTS:
            return
        if self._spool is None:
            self._close([(key, self._open.pop(key))])
        else:
            self.close_batches()

    def settle(self) -> None:
        """With a spool, have on disk what was said so far, before others act on it; else nothing."""
        if self._spool is not None:
            self.close_batches()

    def degraded(self, what: str, active: bool, cause: str) -> None:
        """The process begins, or ceases, to work around something: an event and a metric."""
        service, _, identity = self._writer.partition("/")
        self._degraded.labels(what).value = float(active)
        self.emit(DEGRADED, "", service, DegradedEvent(service, identity, what, active, cause))

    async def run(self) -> None:
        """Send, acknowledge, send again; until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(LINGER_S)
            self.close_batches()
            if not self._kept:
                continue
            if not self._stream_known:
                self._stream_known = await self._ensure_stream()
            if not self._stream_known or not self._send_window():
                self._stream_known = False
                await asyncio.sleep(RESEND_AFTER_S)
                self._wake.set()

    async def flush(self, deadline_s: float) -> bool:
        """Wait until everything is acknowledged; False if the deadline came first."""
        if self._spool is not None:
            self._tell_losses()
        while self._open:
            # Closing may have something to say itself.
            self.close_batches()
        self._empty.clear()
        self._wake.set()
        if self._kept:
            try:
                async with asyncio.timeout(deadline_s):
                    await self._empty.wait()
            except TimeoutError:
                return False
        return True

    def close_batches(self) -> None:
        """Turn the events at hand into messages."""
        if self._open:
            opened, self._open = self._open, {}
            self._close(list(opened.items()))

    def _close(self, batches: list[tuple[Key, list[Emitted]]]) -> None:
        if self._spool is not None:
            # What began before what ended.
            batches.sort(key=lambda one: BEGINNINGS.get(one[0][0], len(BEGINNINGS)))
        messages = [one for key, batch in batches for one in self._batches.close(*key, batch)]
        if self._spool is not None:
            self._write(self._spool, messages, batches)
        for message in messages:
            self._keep(message)
        while self._batches.oversize:
            number = self._batches.oversize.pop()
            self._dropped.value += 1
            self._say_gap(number, number, 1, "too large for the stream", self._wall_clock())
        self._wake.set()

    def _keep(self, message: Message) -> None:
        # Also behind a bus that hangs and is not known to be away yet.
        if not self._bus.connected or self._kept_bytes > self._max_kept_bytes // 4:
            # An eighth of the size for 4 to 8 us an event.
            message.packed, message.payload = True, zlib.compress(message.payload, 1)
        self._kept[message.number] = message
        self._kept_bytes += message.held_bytes
        while self._kept_bytes > self._max_kept_bytes:
            if not self._spill():
                self._drop(next(one for one in self._kept.values() if one.headers))

    # What is on disk

    def _write(self, spool: Spool, messages: list[Message], batches: list[tuple[Key, list[Emitted]]]) -> None:
        fault = ""
        try:
            first = spool.write(messages, self._requests.checkpoint)
        except SpoolFault as exc:
            fault = str(exc)
        else:
            self._resident.extend(message.number for message in messages)
            if first > self._first_segment:
                self._first_segment = first
                self._forget_segments(first)
        for _, batch in batches:
            for _, _, _, data in batch:
                if data is not None:
                    self._requests.take(data)
        if bool(fault) is not bool(self._spool_fault):
            self._spool_fault = fault
            self._say("audit spool", bool(fault), fault or "the disk takes events again")

    def _spill(self) -> bool:
        """Leave the oldest message that is not under way to the disk; False if there is none."""
        while self._resident:
            message = self._kept.get(self._resident.popleft())
            if message is not None and message.headers and message.place is not None and not message.sent:
                self._kept_bytes -= message.held_bytes
                message.headers, message.payload, message.packed = {}, b"", False
                return True
        return False

    def _forget_segments(self, first: int) -> None:
        """The spool was full: what was in the segments before `first` is in memory or nowhere."""
        for message in list(self._kept.values()):
            if message.place is None:
                continue
            if message.place.segment >= first:
                break
            message.place = None
            if not message.headers:
                self._drop(message)

    # What is lost

    def _drop(self, message: Message) -> None:
        del self._kept[message.number]
        self._kept_bytes -= message.held_bytes
        self._leave_window(message)
        if message.place is not None and self._spool is not None:
            self._spool.stored(message.place)
        self._dropped.value += message.events
        first, _, count, since = self._lost
        self._lost = first or message.first, message.last, count + message.events, since or self._wall_clock()
        if not first:
            where = "the spool is full" if self._spool is not None else f"{self._max_kept_bytes} bytes wait"
            self._say("losing events", True, f"{where} for the bus: the oldest events go")

    def _tell_losses(self) -> None:
        """Everything kept is stored, or on disk: say what never will be."""
        first, last, count, since = self._lost
        self._lost = 0, 0, 0, 0.0
        if first:
            self._say_gap(first, last, count, "the buffer was full while the bus was away", since)
            range_ = f"of incarnation {self._incarnation}, events {first} to {last} were dropped"
            self._say("losing events", False, range_)
            self.close_batches()

    def _say_gap(self, first: int, last: int, count: int, cause: str, since: float) -> None:
        moments = (rfc3339(int(moment * 1000)).decode() for moment in (since, self._wall_clock()))
        event = GapEvent(self._writer, self._incarnation, first, last, count, cause, *moments)
        self.emit(GAP, "", self._writer, event)

    def _say(self, what: str, active: bool, cause: str) -> None:
        log.warning("%s%s: %s", what, "" if active else " has ended", cause)
        self.degraded(what, active, cause)

    async def _ensure_stream(self) -> bool:
        try:
            await self._bus.ensure_stream(self._stream)
        except BusError as exc:
            log.debug("event stream: %s", exc)
            return False
        return True

    def _send_window(self) -> bool:
        """Send what is not under way, oldest first, up to the window; False without a connection."""
        if not self._bus.connected:
            return False
        for message in list(self._kept.values()):
            if self._in_window >= WINDOW_MESSAGES or self._window_bytes >= WINDOW_BYTES:
                break
            if not message.sent:
                self._send(message)
        return True

    def _send(self, message: Message) -> None:
        headers, payload = message.headers, message.payload
        if not headers:
            try:
                if self._spool is None or message.place is None:
                    raise SpoolFault("a message is nowhere")
                spooled = self._spool.load(message.place)
            except SpoolFault as exc:
                log.error("a routing event message cannot be read from the spool: %s", exc)
                self._drop(message)
                return
            headers, payload = spooled.headers, spooled.payload
        elif message.packed:
            payload = zlib.decompress(payload)
        message.sent = len(payload)
        self._in_window += 1
        self._window_bytes += message.sent
        future = self._bus.append(message.subject, payload, headers)

        def settle(done: asyncio.Future[int]) -> None:
            if self._kept.get(message.number) is not message:
                return
            self._leave_window(message)
            if done.cancelled() or done.exception() is not None:
                # It may or may not be stored: the same Nats-Msg-Id makes sending it again harmless.
                # One reason why it is not: the server has come back without its store.
                self._stream_known = False
                if self._spool is not None:
                    self._resident.append(message.number)
                asyncio.get_running_loop().call_later(RESEND_AFTER_S, self._wake.set)
                return
            del self._kept[message.number]
            self._kept_bytes -= message.held_bytes
            self._acknowledged.value += message.events
            if message.place is not None and self._spool is not None:
                self._spool.stored(message.place)
            if not self._kept:
                self._tell_losses()
            (self._wake if self._kept else self._empty).set()

        future.add_done_callback(settle)

    def _leave_window(self, message: Message) -> None:
        self._in_window -= message.sent > 0
        self._window_bytes -= message.sent
        message.sent = 0
