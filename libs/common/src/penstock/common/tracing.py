"""Traces: which requests get one, its context on the wire (W3C Trace Context), and spans as plain values.

An adapter hands them to OpenTelemetry (penstock.common.adapters.otlp); nothing here knows it.
"""

from __future__ import annotations

import math
import re
import secrets
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Annotated, Literal, NamedTuple

import msgspec

from penstock.common.telemetry import Metrics

CONTEXT_BYTES = 24
# Spans kept until they are sent; further ones are dropped and counted.
MAX_SPANS = 4096
_TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-[!-~]*)?")

Kind = Literal["server", "client", "internal"]
Value = str | int | float | bool
Id = Annotated[int, msgspec.Meta(ge=0)]


class Context(NamedTuple):
    """A place in a trace: what is below it is a child of `span_id`."""

    trace_id: bytes
    span_id: int

    def pack(self) -> bytes:
        """As a schedule message carries it."""
        return self.trace_id + self.span_id.to_bytes(8, "big")

    def traceparent(self) -> bytes:
        """As an HTTP header carries it, with the flag that says sampled."""
        return b"00-%b-%016x-01" % (self.trace_id.hex().encode(), self.span_id)


def unpack(packed: bytes) -> Context | None:
    """The reverse of `Context.pack`; None for what is none."""
    trace_id, span_id = packed[:16], int.from_bytes(packed[16:], "big")
    if len(packed) != CONTEXT_BYTES or not any(trace_id) or not span_id:
        return None
    return Context(trace_id, span_id)


def read_traceparent(value: bytes) -> tuple[Context, bool] | None:
    """A client's context and whether its trace is sampled; None for what is not valid, or of a version that
    cannot be read."""
    match = _TRACEPARENT.fullmatch(value)
    if match is None or match[1] == b"ff" or (match[1] == b"00" and match[5] is not None):
        return None
    trace_id, span_id = bytes.fromhex(match[2].decode()), int(match[3], 16)
    if not any(trace_id) or not span_id:
        return None
    return Context(trace_id, span_id), bool(int(match[4], 16) & 1)


class SpanEvent(msgspec.Struct, array_like=True):
    """Something that happened at one moment of a span; times are Unix time in ns."""

    name: str
    at_ns: int
    attributes: dict[str, Value] = {}


class Span(msgspec.Struct, array_like=True):
    """One span that has ended. `parent_id` is 0 for the first of a trace; `error` says what failed."""

    name: str
    kind: Kind
    trace_id: bytes
    span_id: Id
    parent_id: Id
    start_ns: int
    end_ns: int = 0
    attributes: dict[str, Value] = {}
    events: list[SpanEvent] = []
    error: str = ""

    @property
    def context(self) -> Context:
        """For its children."""
        return Context(self.trace_id, self.span_id)


class Ids:
    """Random ids that nobody can guess the next of; never 0."""

    def __init__(self) -> None:
        self._bits = Random(secrets.randbits(256)).getrandbits

    def trace(self) -> bytes:
        """16 bytes."""
        return (self._bits(128) | 1).to_bytes(16, "big")

    def span(self) -> int:
        """64 bits."""
        return self._bits(64) | 1


class Spans:
    """Spans that ended and wait to be sent; bounded."""

    def __init__(self, metrics: Metrics, most: int = MAX_SPANS) -> None:
        self._waiting: deque[Span] = deque()
        self._most = most
        self.counted = metrics.counter(
            "penstock_trace_spans_total",
            "Spans by what became of them: ended; exported; failed (the collector did not take them); "
            "dropped (too many waited)",
            "result",
        )
        self._ended, self._dropped = self.counted.labels("ended"), self.counted.labels("dropped")

    def add(self, span: Span) -> None:
        """Keep it until it is taken, or drop it if too many wait."""
        self._ended.value += 1
        self.put(span)

    def put(self, span: Span) -> None:
        """`add` for one that another process has counted."""
        if len(self._waiting) >= self._most:
            self._dropped.value += 1
        else:
            self._waiting.append(span)

    def take(self, most: int) -> list[Span]:
        """The oldest; empty if none wait."""
        waiting = self._waiting
        return [waiting.popleft() for _ in range(min(most, len(waiting)))]


class Sampler:
    """Every request has the chance `ratio`; a client's sampled trace is continued while those of all clients
    are no more than `inbound_per_s`. A trace that its client says is not sampled is not."""

    def __init__(
        self, ratio: float, inbound_per_s: float, draw: Callable[[], float], clock: Callable[[], float]
    ) -> None:
        """`draw` gives numbers from 0 to below 1."""
        self._ratio, self._rate, self._draw, self._clock = ratio, inbound_per_s, draw, clock
        self._tokens, self._filled_at = max(1.0, inbound_per_s), clock()

    def gap(self) -> float:
        """Requests up to and with the next that is sampled by chance: drawn at once, so that the others are
        counted and no more."""
        if self._ratio <= 0:
            return math.inf
        if self._ratio >= 1:
            return 1
        return 1 + math.floor(math.log(1 - self._draw()) / math.log(1 - self._ratio))

    def continues(self, traceparent: bytes) -> tuple[bool | None, Context | None]:
        """Whether a request with this header is sampled, None: by chance as any other; and as whose child."""
        read = read_traceparent(traceparent)
        if read is None:
            return None, None
        parent, sampled = read
        if not sampled:
            return False, None
        return (True if self._spend() else None), parent

    def _spend(self) -> bool:
        if self._rate <= 0:
            return False
        now = self._clock()
        self._tokens = min(max(1.0, self._rate), self._tokens + (now - self._filled_at) * self._rate)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
