"""A load generator: keep-alive connections, each with one request under way, every answer checked."""

from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import msgspec

from penstock.sim.text import expected_text

PATH = "/v1/chat/completions"
PROMPT_BYTES = 1024
MAX_TOKENS = 16
# So many that a request differs from all others of its time in its first block.
DISTINCT_REQUESTS = 512
# A round waits so long for the answers still under way.
LAST_ANSWER_S = 10.0

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d{1,9})\r\n", re.IGNORECASE)


@dataclass(frozen=True)
class Exchange:
    """The bytes of a request, and the text of its answer."""

    request: bytes
    answer: str


@dataclass
class Result:
    """What became of the requests of some rounds; latencies in seconds."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Result) -> None:
        """Count another round in."""
        self.seconds += other.seconds
        self.latencies_s += other.latencies_s
        self.failures += other.failures

    @property
    def rate_rps(self) -> float:
        """Good answers in a second."""
        return len(self.latencies_s) / self.seconds if self.seconds else 0.0

    def percentile_ms(self, percent: float) -> float:
        """The latency that `percent` of the good answers did not exceed."""
        ordered = sorted(self.latencies_s)
        if not ordered:
            return float("nan")
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] * 1000


class _Message(msgspec.Struct):
    content: str


class _Choice(msgspec.Struct):
    message: _Message


class _Answer(msgspec.Struct):
    choices: list[_Choice]


_decoder = msgspec.json.Decoder(_Answer)


def exchanges(model: str, policy: str) -> list[Exchange]:
    """Chats of 1 KB, no two with a common beginning, placed by `policy` (empty: the default)."""
    made, choice = [], f"routing-strategy: {policy}\r\n" if policy else ""
    for number in range(DISTINCT_REQUESTS):
        text = (f"{number:04d} water runs down the penstock and drives the wheel; " * 32)[:PROMPT_BYTES]
        messages = [{"role": "user", "content": text}]
        body = msgspec.json.encode({"model": model, "messages": messages, "max_tokens": MAX_TOKENS})
        head = (
            f"POST {PATH} HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
            f"{choice}content-length: {len(body)}\r\n\r\n"
        )
        made.append(Exchange(head.encode() + body, expected_text(messages, MAX_TOKENS, model=model)))
    return made


async def run_round(
    urls: Sequence[str], work: Sequence[Exchange], connections: int, seconds: float
) -> Result:
    """Keep `connections` busy for `seconds`, spread evenly over `urls`."""
    result, supply = Result(), itertools.cycle(work)
    clients = [await _connect(urls[n % len(urls)], supply, result) for n in range(connections)]
    started = time.perf_counter()
    for client in clients:
        client.begin(started + seconds)
    _, late = await asyncio.wait([c.finished for c in clients], timeout=seconds + LAST_ANSWER_S)
    result.seconds = time.perf_counter() - started
    for future in late:
        result.failures.append("no answer")
        future.cancel()
    for client in clients:
        client.close()
    return result


async def _connect(url: str, supply: Iterator[Exchange], result: Result) -> _Client:
    client, address = _Client(supply, result), urlsplit(url)
    loop = asyncio.get_running_loop()
    # The transport is taken from here: uvloop's are no subclass of what connection_made announces.
    client.transport, _ = await loop.create_connection(
        lambda: client, address.hostname or "", address.port or 80
    )
    return client


class _Client(asyncio.Protocol):
    """One connection; asks until the end of the round, then finishes the request under way."""

    transport: asyncio.Transport

    def __init__(self, supply: Iterator[Exchange], result: Result) -> None:
        self._supply, self._result = supply, result
        self._received = bytearray()
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def begin(self, until: float) -> None:
        self._until = until
        self._ask()

    def close(self) -> None:
        self.transport.abort()

    def _ask(self) -> None:
        self._current = next(self._supply)
        self._asked = time.perf_counter()
        self.transport.write(self._current.request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, mark, body = self._received.partition(b"\r\n\r\n")
        if not mark:
            return
        length = _LENGTH.search(head + b"\r\n")
        if length is None:
            self._fail("an answer without content-length")
        elif len(body) >= int(length[1]):
            self._check(head, bytes(body))

    def _check(self, head: bytearray, body: bytes) -> None:
        now = time.perf_counter()
        self._received.clear()
        status = head[9:12].decode("latin-1")
        if status != "200":
            return self._fail(f"status {status}: {body[:200]!r}")
        try:
            text = _decoder.decode(body).choices[0].message.content
        except (msgspec.MsgspecError, IndexError) as exc:
            return self._fail(f"not an answer: {exc}")
        if text != self._current.answer:
            return self._fail(f"another answer than expected: {text[:80]!r}")
        self._result.latencies_s.append(now - self._asked)
        if now < self._until:
            self._ask()
        elif not self.finished.done():
            self.finished.set_result(None)

    def _fail(self, cause: str) -> None:
        if not self.finished.done():
            self._result.failures.append(cause)
            self.finished.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(f"connection lost: {exc or 'closed'}")
