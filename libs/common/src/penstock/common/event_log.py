"""The routing log's writer: CloudEvents in batches, numbered, chained, kept until acknowledged.

Requests never wait for it. Every message names its writer, the writer's incarnation, the first and
last sequence in it and the hash of the message before, so that a reader sees each gap (DESIGN D2).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import lru_cache

import msgspec

from penstock.common.bus import Bus
from penstock.common.errors import BusError
from penstock.common.subjects import EVENTS, event_subject
from penstock.common.telemetry import Metrics

log = logging.getLogger(__name__)

BATCH_TYPE = "application/cloudevents-batch+json"
LINGER_S = 0.01
MAX_BATCH_EVENTS = 64
MAX_BATCH_BYTES = 256 * 1024
# Memory bound of what is not acknowledged: at 300 bytes an event, about 100,000 events.
MAX_KEPT_BYTES = 32 * 1024 * 1024
# Messages sent and not acknowledged at one time; the rest waits its turn in order.
WINDOW_MESSAGES = 256
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
    events: int
    sent: bool = False


class EventWriter:
    """Takes events without waiting; `run` sends them."""

    def __init__(
        self,
        bus: Bus,
        writer: str,
        incarnation: str,
        metrics: Metrics,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`writer` is service and id, as in `scheduler/7f3a`; `wall_clock` gives Unix seconds."""
        self._bus, self._writer, self._incarnation, self._wall_clock = bus, writer, incarnation, wall_clock
        self._sequence = 0
        self._previous = ""
        self._message_number = 0
        self._open: dict[tuple[str, str], list[tuple[str, float, msgspec.Struct]]] = {}
        self._kept: OrderedDict[int, _Message] = OrderedDict()
        self._kept_bytes = 0
        self._in_window = 0
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
        identity, source = f"{self._writer}/{self._incarnation}/", f"/penstock/{self._writer}"
        for subject, moment, data in batch:
            self._sequence += 1
            event = Event(
                "1.0",
                f"{identity}{self._sequence}",
                source,
                f"penstock.{event_type}.v1",
                subject,
                _rfc3339(moment),
                data,
            )
            yield self._encode(event)

    def _enclose(self, key: tuple[str, str], first: int, parts: list[bytes]) -> None:
        payload = b"[" + b",".join(parts) + b"]"
        self._message_number += 1
        headers = {
            "Nats-Msg-Id": f"{self._writer}/{self._incarnation}/{self._message_number}",
            "content-type": BATCH_TYPE,
            WRITER: self._writer,
            INCARNATION: self._incarnation,
            SEQUENCE: f"{first}-{first + len(parts) - 1}",
            PREVIOUS: self._previous,
        }
        self._previous = hashlib.sha256(self._previous.encode() + payload).hexdigest()
        self._keep(_Message(self._message_number, event_subject(*key), headers, payload, len(parts)))

    def _keep(self, message: _Message) -> None:
        self._kept[message.number] = message
        self._kept_bytes += len(message.payload)
        while self._kept_bytes > MAX_KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._kept_bytes -= len(oldest.payload)
            self._in_window -= oldest.sent
            self._dropped.value += oldest.events

    async def _ensure_stream(self) -> bool:
        try:
            await self._bus.ensure_stream(EVENTS)
        except BusError as exc:
            log.debug("event stream: %s", exc)
            return False
        return True

    def _send_window(self) -> bool:
        """Send what is not under way, oldest first, up to the window; False without a connection."""
        if not self._bus.connected:
            return False
        for message in list(self._kept.values()):
            if self._in_window >= WINDOW_MESSAGES:
                break
            if not message.sent:
                self._send(message)
        return True

    def _send(self, message: _Message) -> None:
        message.sent = True
        self._in_window += 1
        future = self._bus.append(message.subject, message.payload, message.headers)

        def settle(done: asyncio.Future[int]) -> None:
            if self._kept.get(message.number) is not message:
                return
            self._in_window -= 1
            if done.cancelled() or done.exception() is not None:
                # It may or may not be stored: the same Nats-Msg-Id makes sending it again harmless.
                message.sent = False
                # One reason why it is not: the server has come back without its store.
                self._stream_known = False
                asyncio.get_running_loop().call_later(RESEND_AFTER_S, self._wake.set)
                return
            del self._kept[message.number]
            self._kept_bytes -= len(message.payload)
            self._acknowledged.value += message.events
            (self._wake if self._kept else self._empty).set()

        future.add_done_callback(settle)


@lru_cache(maxsize=8)
def _second(whole: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole))


def _rfc3339(moment: float) -> str:
    whole = int(moment)
    return f"{_second(whole)}.{int((moment - whole) * 1000):03d}Z"
