"""The routing log's writer: CloudEvents in batches, numbered, chained, kept until acknowledged.

Requests never wait for it. Every message names its writer, the writer's incarnation, the first and
last sequence in it and the hash of the message before, so that a reader sees each gap (DESIGN D2).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache

import msgspec

from penstock.common.bus import Bus
from penstock.common.errors import BusError
from penstock.common.routing_events import DEGRADED, DegradedEvent, type_of
from penstock.common.subjects import EVENTS, Stream, event_subject
from penstock.common.telemetry import Metrics

log = logging.getLogger(__name__)

BATCH_TYPE = "application/cloudevents-batch+json"
LINGER_S = 0.01
MAX_BATCH_EVENTS = 64
MAX_BATCH_BYTES = 256 * 1024
# Memory bound of what is not acknowledged: packed, as what has to wait is, about 90,000 events.
MAX_KEPT_BYTES = 8 * 1024 * 1024
# What a kept message takes beside its payload: headers, subject, its place in the table.
MESSAGE_BYTES = 1024
# Messages sent and not acknowledged at one time; the rest waits its turn in order.
WINDOW_MESSAGES = 256
# And bytes of them: a backlog that left at once would hold up the loop, and every stream on it, for 0.1 s.
WINDOW_BYTES = 1024 * 1024
RESEND_AFTER_S = 1.0

WRITER, INCARNATION, SEQUENCE, PREVIOUS = (
    "Penstock-Writer",
    "Penstock-Incarnation",
    "Penstock-Sequence",
    "Penstock-Previous",
)


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """CloudEvents 1.0 attributes in JSON; `id` is writer, incarnation and sequence, unique for good."""

    specversion: str
    id: str
    source: str
    type: str
    subject: str
    time: str
    data: msgspec.Struct
    datacontenttype: str = "application/json"


class _Message(msgspec.Struct):
    number: int
    subject: str
    headers: dict[str, str]
    payload: bytes
    first: int
    last: int
    packed: bool = False
    # Bytes of it under way; 0 while it is not.
    sent: int = 0

    @property
    def events(self) -> int:
        return self.last - self.first + 1

    @property
    def held_bytes(self) -> int:
        return len(self.payload) + MESSAGE_BYTES


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
    ) -> None:
        """`writer` is service and id, as in `scheduler/7f3a`; `wall_clock` gives Unix seconds; `stream` is
        EVENTS within the bounds that this deployment wants."""
        self._stream = stream
        self._max_kept_bytes = max_kept_bytes
        # First and last sequence of what was dropped since everything was stored; (0, 0) for nothing.
        self._lost = 0, 0
        self._bus, self._writer, self._incarnation, self._wall_clock = bus, writer, incarnation, wall_clock
        self._sequence = 0
        self._previous = ""
        self._message_number = 0
        self._open: dict[tuple[str, str], list[tuple[str, float, msgspec.Struct]]] = {}
        self._kept: OrderedDict[int, _Message] = OrderedDict()
        self._kept_bytes = 0
        self._in_window = self._window_bytes = 0
        self._stream_known = False
        self._wake, self._empty = asyncio.Event(), asyncio.Event()
        self._encode = msgspec.json.Encoder().encode
        events = metrics.counter("penstock_events_total", "Routing events by what became of them", "result")
        self._written, self._acknowledged, self._dropped = (
            events.labels(result) for result in ("written", "acknowledged", "dropped")
        )
        metrics.gauge(
            "penstock_events_unacknowledged_bytes", "Bytes kept for sending", lambda: self._kept_bytes
        )

    def emit(self, event_type: str, model: str, subject: str, data: msgspec.Struct) -> None:
        """Write one event about `subject` (a request or instance id). Never waits, never fails."""
        self._written.value += 1
        key = event_type, model
        batch = self._open.get(key)
        if batch is None:
            batch = self._open[key] = []
            self._wake.set()
        batch.append((subject, self._wall_clock(), data))
        if len(batch) >= MAX_BATCH_EVENTS:
            self._close(key)

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
        for key in list(self._open):
            self._close(key)

    def _close(self, key: tuple[str, str]) -> None:
        """Number and encode a batch. Sequences are given here, so that those of a message are consecutive."""
        first, parts, size = self._sequence + 1, list[bytes](), 0
        for encoded in self._encoded(key[0], self._open.pop(key)):
            if parts and size + len(encoded) > MAX_BATCH_BYTES:
                self._enclose(key, first, parts)
                first, parts, size = first + len(parts), [], 0
            if len(encoded) > MAX_BATCH_BYTES:
                # The stream would refuse it for ever; the gap in the sequences says that it is missing.
                self._dropped.value += 1
                first += 1
                continue
            parts.append(encoded)
            size += len(encoded)
        if parts:
            self._enclose(key, first, parts)
        self._wake.set()

    def _encoded(self, event_type: str, batch: list[tuple[str, float, msgspec.Struct]]) -> Iterator[bytes]:
        """`Event`s as JSON, the part that all of a batch share encoded once: 0.9 us an event, not 2.1."""
        encode = self._encode
        identity = encode(f"{self._writer}/{self._incarnation}/")[:-1]
        constants = b'","source":%b,"type":%b,"subject":' % (
            encode(f"/penstock/{self._writer}"),
            encode(type_of(event_type)),
        )
        last_ms, stamp = 0, b""
        for subject, moment, data in batch:
            self._sequence += 1
            if (ms := int(moment * 1000)) != last_ms:
                last_ms, stamp = ms, _rfc3339(ms)
            yield b'{"specversion":"1.0","id":%b%d%b%b,"time":"%b","data":%b}' % (
                identity,
                self._sequence,
                constants,
                encode(subject),
                stamp,
                encode(data),
            )

    def _enclose(self, key: tuple[str, str], first: int, parts: list[bytes]) -> None:
        payload = b"[" + b",".join(parts) + b"]"
        self._message_number += 1
        last = first + len(parts) - 1
        headers = {
            "Nats-Msg-Id": f"{self._writer}/{self._incarnation}/{self._message_number}",
            "content-type": BATCH_TYPE,
            WRITER: self._writer,
            INCARNATION: self._incarnation,
            SEQUENCE: f"{first}-{last}",
            PREVIOUS: self._previous,
        }
        self._previous = hashlib.sha256(self._previous.encode() + payload).hexdigest()
        # Also behind a bus that hangs and is not known to be away yet.
        packed = not self._bus.connected or self._kept_bytes > self._max_kept_bytes // 4
        if packed:
            # An eighth of the size for 4 to 8 us an event.
            payload = zlib.compress(payload, 1)
        self._keep(_Message(self._message_number, event_subject(*key), headers, payload, first, last, packed))

    def _keep(self, message: _Message) -> None:
        self._kept[message.number] = message
        self._kept_bytes += message.held_bytes
        while self._kept_bytes > self._max_kept_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= oldest.held_bytes
            self._leave_window(oldest)
            self._dropped.value += oldest.events
            self._lose(oldest)

    def _lose(self, message: _Message) -> None:
        first, _ = self._lost
        self._lost = first or message.first, message.last
        if not first:
            self._say_lost(True, f"{self._max_kept_bytes} bytes of events wait for the bus: the oldest go")

    def _found_again(self) -> None:
        """Everything kept is stored: say what never will be."""
        first, last = self._lost
        self._lost = 0, 0
        if first:
            self._say_lost(
                False, f"of incarnation {self._incarnation}, events {first} to {last} were dropped"
            )
            self.close_batches()

    def _say_lost(self, active: bool, cause: str) -> None:
        log.warning("routing events %s lost: %s", "are" if active else "were", cause)
        service, _, identity = self._writer.partition("/")
        self.emit(DEGRADED, "", service, DegradedEvent(service, identity, "losing events", active, cause))

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

    def _send(self, message: _Message) -> None:
        payload = zlib.decompress(message.payload) if message.packed else message.payload
        message.sent = len(payload)
        self._in_window += 1
        self._window_bytes += message.sent
        future = self._bus.append(message.subject, payload, message.headers)

        def settle(done: asyncio.Future[int]) -> None:
            if self._kept.get(message.number) is not message:
                return
            self._leave_window(message)
            if done.cancelled() or done.exception() is not None:
                # It may or may not be stored: the same Nats-Msg-Id makes sending it again harmless.
                # One reason why it is not: the server has come back without its store.
                self._stream_known = False
                asyncio.get_running_loop().call_later(RESEND_AFTER_S, self._wake.set)
                return
            del self._kept[message.number]
            self._kept_bytes -= message.held_bytes
            self._acknowledged.value += message.events
            if not self._kept:
                self._found_again()
            (self._wake if self._kept else self._empty).set()

        future.add_done_callback(settle)

    def _leave_window(self, message: _Message) -> None:
        self._in_window -= message.sent > 0
        self._window_bytes -= message.sent
        message.sent = 0


def _rfc3339(unix_ms: int) -> bytes:
    seconds, ms = divmod(unix_ms, 1000)
    return b"%b.%03dZ" % (_second(seconds), ms)


@lru_cache(4)
def _second(seconds: int) -> bytes:
    # 2 us, which at a thousand events a second each of them would pay.
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode()
