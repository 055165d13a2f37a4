"""Connections of the load generator. Each asks for one thing at a time and believes no byte of the answer."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from penstock.cli.bench.dechunk import Dechunker, NotChunked
from penstock.cli.bench.wire import DONE, EVENT_BYTES, STAMP, answer_body, event

CONNECT_S = 10.0
# Connections that are opened at one time: fewer than any listener's backlog.
CONNECT_BATCH = 100
SHOWN_BYTES = 200
# Failures that are kept as text; the others are counted.
KEPT_FAILURES = 100
# Of an answer that is not whole; the load generator's own are far smaller.
MAX_HELD_BYTES = 64 * 1024
_OK = b"HTTP/1.1 200 "


class Address(NamedTuple):
    """Where to connect."""

    host: str
    port: int


class Tally:
    """What came back: answers or chunks counted, their times in ns, and every failure.

    `mark` is what a head must hold if the answer came the way that is measured; others are counted as
    strays: they are right, but not what the figures are about.
    """

    def __init__(self, mark: bytes = b"") -> None:
        self.mark = mark
        self.done = self.heads = self.strays = 0
        self.times_ns = array("q")
        self.failed = 0
        self.failures: list[str] = []

    def fail(self, cause: str) -> None:
        """One wrong or missing answer."""
        self.failed += 1
        if len(self.failures) < KEPT_FAILURES:
            self.failures.append(cause)


class Client(asyncio.Protocol):
    """One connection; `finished` is called after each good answer, and never after a failure."""

    transport: asyncio.Transport

    def __init__(self, tally: Tally, finished: Callable[[Any], None]) -> None:
        self._tally, self._finished = tally, finished
        self._mark = tally.mark
        self._held = b""
        self.busy = self.failed = False

    def ask(self, request: bytes, nonce: bytes) -> None:
        """Send a request; one at a time."""
        raise NotImplementedError

    def fail(self, cause: str) -> None:
        """The answer is wrong: this connection asks no more."""
        if not self.failed:
            self.failed, self.busy = True, False
            self._tally.fail(cause)
            self.transport.abort()

    def close(self) -> None:
        """End the connection; an answer that is still due does not count as failed."""
        self.failed = True
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.busy = False
        if not self.failed:
            self.failed = True
            self._tally.fail(f"connection lost: {exc or 'closed'}")


class ChatClient(Client):
    """Asks for JSON answers; the time of one is from its request's write to its last byte."""

    def ask(self, request: bytes, nonce: bytes, due_ns: int = 0) -> None:
        """Send a request; with `due_ns`, its time counts from then."""
        if self.failed:
            return
        self._expected = answer_body(nonce)
        self.busy = True
        self._asked_ns = due_ns or time.monotonic_ns()
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        if self._held:
            data = self._held + data
        end = data.find(b"\r\n\r\n")
        if not self.busy:
            self.fail(f"bytes that nobody asked for: {data[:SHOWN_BYTES]!r}")
        elif data.startswith(_OK) and data[end + 4 :] == self._expected:
            self._held = b""
            self.busy = False
            tally = self._tally
            tally.done += 1
            tally.heads += 1
            tally.strays += self._mark not in data
            tally.times_ns.append(now_ns - self._asked_ns)
            self._finished(self)
        elif self._may_become_whole(data, end):
            self._held = data
        else:
            self.fail(f"another answer than expected: {data[: end + SHOWN_BYTES]!r}")

    def _may_become_whole(self, data: bytes, end: int) -> bool:
        if end < 0:
            return len(data) < MAX_HELD_BYTES
        return data.startswith(_OK) and self._expected.startswith(data[end + 4 :])


class StreamClient(Client):
    """Asks for streams; with `timed`, the time of a chunk is from its stamp to its arrival."""

    def __init__(
        self, tally: Tally, finished: Callable[[Any], None], chunks: int, *, timed: bool = False
    ) -> None:
        super().__init__(tally, finished)
        self._chunks, self._timed = chunks, timed
        self.received = 0

    def ask(self, request: bytes, nonce: bytes) -> None:
        """Send a request for as many chunks as this client takes."""
        if self.failed:
            return
        self._nonce = nonce
        self.received = 0
        self._payload = b""
        self._dechunker: Dechunker | None = None
        self.busy = True
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        if not self.busy:
            self.fail(f"bytes that nobody asked for: {data[:SHOWN_BYTES]!r}")
            return
        if self._dechunker is None:
            data = self._begin(self._held + data)
        if self._dechunker is None or not data:
            return
        try:
            payload = self._dechunker.feed(data)
        except NotChunked as exc:
            self.fail(str(exc))
            return
        self._events(payload, now_ns)
        if self._dechunker.done and not self.failed:
            self._end()

    def _begin(self, data: bytes) -> bytes:
        """Check the head; what follows it."""
        end = data.find(b"\r\n\r\n")
        if end < 0 and len(data) < MAX_HELD_BYTES:
            self._held = data
            return b""
        self._held = b""
        head = data[:end].lower()
        if not data.startswith(_OK) or b"transfer-encoding: chunked" not in head:
            self.fail(f"not a stream: {data[: end + SHOWN_BYTES]!r}")
            return b""
        self._tally.heads += 1
        self._tally.strays += self._mark not in head
        self._dechunker = Dechunker()
        return data[end + 4 :]

    def _events(self, payload: bytes, now_ns: int) -> None:
        if self._payload:
            payload = self._payload + payload
        at, number, nonce, tally = 0, self.received, self._nonce, self._tally
        while len(payload) - at >= EVENT_BYTES and number < self._chunks:
            piece = payload[at : at + EVENT_BYTES]
            stamp = piece[STAMP]
            if piece != event(nonce, number, stamp):
                self.fail(f"chunk {number} of {self._chunks} is another than expected: {piece!r}")
                return
            if self._timed:
                tally.times_ns.append(now_ns - int(stamp, 16))
            at += EVENT_BYTES
            number += 1
        tally.done += number - self.received
        self.received = number
        self._payload = payload[at:]
        if len(self._payload) > EVENT_BYTES:
            self.fail(f"more than {self._chunks} chunks: {self._payload[:SHOWN_BYTES]!r}")

    def _end(self) -> None:
        if self.received != self._chunks or self._payload != DONE:
            self.fail(
                f"a stream of {self._chunks} chunks ended after {self.received}: "
                f"{self._payload[:SHOWN_BYTES]!r}"
            )
            return
        self.busy = False
        self._finished(self)


ClientT = TypeVar("ClientT", bound=Client)


async def connect(
    make: Callable[[], ClientT], addresses: Sequence[Address], connections: int
) -> list[ClientT]:
    """Open this many, evenly over the addresses. Raises OSError, TimeoutError."""
    opened: list[ClientT] = []
    try:
        async with asyncio.timeout(CONNECT_S):
            while len(opened) < connections:
                batch = range(len(opened), min(connections, len(opened) + CONNECT_BATCH))
                opened += await asyncio.gather(*(_open(make, addresses[n % len(addresses)]) for n in batch))
    except (OSError, TimeoutError):
        for client in opened:
            client.close()
        raise
    return opened


async def _open(make: Callable[[], ClientT], address: Address) -> ClientT:
    # The transport is taken from here: uvloop's are no subclass of what connection_made announces.
    transport, client = await asyncio.get_running_loop().create_connection(make, *address)
    client.transport = transport
    return client
