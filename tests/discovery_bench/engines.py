"""Many engines in one lean process: every address answers /health, /v1/models and /metrics from memory.

`engines.py COUNT METRICS_BYTES` prints the file of endpoints that it listens on.
"""

from __future__ import annotations

import asyncio
import re
import resource
import sys
from typing import ClassVar

import uvloop

MODELS = b'{"object":"list","data":[{"id":"bench","object":"model","owned_by":"vllm"}]}'
LOAD = b"".join(
    b'vllm:%b{engine="0",model_name="bench"} %b\n' % pair
    for pair in (
        (b"num_requests_running", b"3"),
        (b"num_requests_waiting", b"1"),
        (b"kv_cache_usage_perc", b"0.5"),
    )
)
FILLER = b'vllm:request_latency_seconds_bucket{engine="0",le="0.005",model_name="bench"} 12345.0\n'
ADDRESSES_A_LISTENER = 250


def _answer(body: bytes, kind: bytes = b"application/json") -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (kind, len(body))
    return head + body


class Engine(asyncio.Protocol):
    """One connection."""

    answers: ClassVar[dict[bytes, bytes]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.WriteTransport = transport  # type: ignore[assignment]  # a TCP one writes

    def data_received(self, data: bytes) -> None:
        path = re.match(rb"GET (\S+) ", data)
        self._transport.write(self.answers.get(path[1], b"") if path else b"")


def addresses(count: int) -> list[str]:
    """Loopback addresses, one an engine."""
    return [f"127.77.{n // ADDRESSES_A_LISTENER}.{n % ADDRESSES_A_LISTENER + 1}" for n in range(count)]


async def serve(count: int, metrics_bytes: int) -> None:
    """Listen and print where; until the standard input ends."""
    metrics = LOAD + FILLER * (metrics_bytes // len(FILLER))
    Engine.answers = {
        b"/health": _answer(b""),
        b"/v1/models": _answer(MODELS),
        b"/metrics": _answer(metrics, b"text/plain"),
    }
    loop = asyncio.get_running_loop()
    hosts = addresses(count)
    first = await loop.create_server(Engine, hosts[0], 0, backlog=4096)
    port = first.sockets[0].getsockname()[1]
    for at in range(1, count, ADDRESSES_A_LISTENER):
        await loop.create_server(Engine, hosts[at : at + ADDRESSES_A_LISTENER], port, backlog=256)
    print("\n".join(f"{host}:{port}" for host in hosts), flush=True)
    print("listening", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
