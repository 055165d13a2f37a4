"""`python -m penstock.cli.bench.responder PORT...`: engines that compute nothing and answer at once.

It is what the gateway and everything beside it are measured on, so it must never be the limit: no parser,
no task, one search for the order in the prompt. It trusts its callers' framing.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import time
from collections.abc import Sequence
from typing import cast

import msgspec
import uvloop

from penstock.cli.bench.wire import MODEL, PATH, STREAM_END, STREAM_HEAD, answer, chunk, plan_in

HOST = "127.0.0.1"
BACKLOG = 4096
# Of a larger body only the end is kept, where the order stands.
KEPT_BYTES = 256 * 1024
_POST = b"POST " + PATH.encode()
_METRICS = b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0\n"
_MODELS = msgspec.json.encode(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "bench"}]}
)
# What else the routers that may join ask an engine before they send it work.
_PAGES = {b"/v1/models": _MODELS, b"/metrics": _METRICS, b"/health": b"{}"}
_ABOUT = msgspec.json.encode({"model_path": MODEL, "served_model_name": MODEL, "is_generation": True})


class Connection(asyncio.Protocol):
    """One connection of a gateway."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._held = b""
        self._missing = 0
        self._stream: Stream | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self._stream = None

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._more(data)
            return
        if self._held:
            data, self._held = self._held + data, b""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._held = data
            return
        if not data.startswith(_POST):
            self._page(data)
            return
        # `content-length: ` in any case; nobody who calls sends another header that ends so.
        at = data.find(b"ength: ", 0, end) + 7
        missing = int(data[at : data.find(b"\r", at)]) - (len(data) - end - 4)
        if missing > 0:
            self._held, self._missing = data[end + 4 :], missing
        else:
            self._answer(data)

    def _more(self, data: bytes) -> None:
        self._missing -= len(data)
        self._held = (self._held + data)[-KEPT_BYTES:]
        if self._missing <= 0:
            body, self._held, self._missing = self._held, b"", 0
            self._answer(body)

    def _answer(self, body: bytes) -> None:
        nonce, chunks, pace_ms = plan_in(body)
        if chunks:
            self._stream = Stream(self, nonce, chunks, pace_ms)
            self.write(STREAM_HEAD)
            self._stream.run()
        else:
            self.write(answer(nonce))

    def _page(self, data: bytes) -> None:
        content = _PAGES.get(data.split(b" ", 2)[1], _ABOUT)
        kind = b"text/plain" if content is _METRICS else b"application/json"
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (kind, len(content))
        self.write(head + content)

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    @property
    def open(self) -> bool:
        """Whether somebody is there to read."""
        return self._transport is not None

    def pause_writing(self) -> None:
        if self._stream is not None:
            self._stream.paused = True

    def resume_writing(self) -> None:
        if self._stream is not None:
            self._stream.resume()


class Stream:
    """Chunks on their way: one for each turn of the loop, or each at its time."""

    def __init__(self, connection: Connection, nonce: bytes, chunks: int, pace_ms: int) -> None:
        self._connection, self._nonce, self._chunks = connection, nonce, chunks
        self._number = 0
        self._pace_s = pace_ms / 1000
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        self.paused = self._owed = False

    def resume(self) -> None:
        """The reader has caught up."""
        self.paused = False
        if self._owed:
            self._owed = False
            self.run()

    def run(self) -> None:
        """Write a chunk, and see to the next."""
        connection, number = self._connection, self._number
        if not connection.open:
            return
        if self.paused:
            self._owed = True
            return
        if number == self._chunks:
            connection.write(STREAM_END)
            return
        connection.write(chunk(self._nonce, number, b"%016x" % time.monotonic_ns()))
        self._number = number + 1
        if self._pace_s:
            self._loop.call_at(self._began + (number + 1) * self._pace_s, self.run)
        else:
            self._loop.call_soon(self.run)


async def serve(ports: Sequence[int]) -> None:
    """Answer on every port until a signal says stop."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    for port in ports:
        await loop.create_server(Connection, HOST, port, backlog=BACKLOG)
    await stopping.wait()


def main() -> int:
    """Serve the ports of the command line."""
    # Nothing here makes cycles; a collection would be a pause that no gateway is to blame for.
    gc.disable()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve([int(word) for word in sys.argv[1:]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
