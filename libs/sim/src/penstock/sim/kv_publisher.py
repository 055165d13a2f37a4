"""Publishes an engine's KV-cache events over ZeroMQ, with the replay socket that engines have."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import zmq
import zmq.asyncio

from penstock.sim.kv_log import KvEncoding, KvLog, encode

TOPIC = b"kv-events"
# As many as vLLM keeps by default.
KEPT_BATCHES = 10_000
_END = (2**64 - 1).to_bytes(8, "big")


class KvPublisher:
    """`flush` after each step of the engine. Ports of 0 pick free ones; without replay at -1."""

    def __init__(
        self,
        log: KvLog,
        encoding: KvEncoding,
        block_size: int,
        *,
        host: str,
        port: int,
        replay_port: int = -1,
    ) -> None:
        """Raises OSError if an address is taken or not ours."""
        self.log = log
        self._encoding, self._block_size = encoding, block_size
        self._context = zmq.asyncio.Context()
        try:
            # A PUB socket never waits, so it needs no loop.
            self._events = zmq.Context(self._context).socket(zmq.PUB)
            self.port = _bind(self._events, host, port)
            self._replay = self._context.socket(zmq.ROUTER) if replay_port >= 0 else None
            self.replay_port = _bind(self._replay, host, replay_port) if self._replay is not None else 0
        except zmq.ZMQError as exc:
            self._context.destroy(linger=0)
            raise OSError(exc.errno, f"KV-cache events: {exc}") from exc
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=KEPT_BATCHES)
        self._sequence = 0
        self._silent = self._forgetful = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Answer replays from here on."""
        if self._replay is not None:
            self._task = asyncio.create_task(self._answer(self._replay), name=f"kv-replay-{self.replay_port}")

    async def stop(self) -> None:
        """End at once."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._events.close(linger=0)
        self._context.destroy(linger=0)

    def flush(self) -> None:
        """Publish what happened since the last call as one batch."""
        events = self.log.take()
        if not events:
            return
        payload = encode(events, self._encoding, self._block_size, time.time())
        sequence, self._sequence = self._sequence, self._sequence + 1
        if self._forgetful:
            self._forgetful -= 1
        else:
            self._kept.append((sequence, payload))
        if self._silent:
            self._silent -= 1
            return
        self._events.send_multipart((TOPIC, sequence.to_bytes(8, "big"), payload), zmq.NOBLOCK)

    def lose(self, batches: int, *, for_good: bool) -> None:
        """Do not send the next batches; with `for_good`, do not keep them for a replay either."""
        self._silent, self._forgetful = batches, batches if for_good else 0

    def restart(self) -> None:
        """As a process that starts anew: sequence numbers from 0, and nothing kept."""
        self.log.take()
        self._sequence = self._silent = self._forgetful = 0
        self._kept.clear()

    async def _answer(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            peer, first = frames[0], int.from_bytes(frames[2], "big")
            for sequence, payload in list(self._kept):
                if sequence >= first:
                    await socket.send_multipart([peer, b"", TOPIC, sequence.to_bytes(8, "big"), payload])
            await socket.send_multipart([peer, b"", b"", _END, b""])


def _bind(socket: zmq.Socket[Any], host: str, port: int) -> int:
    """The port, a free one for 0."""
    address = f"[{host}]" if ":" in host else host
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.IPV6, int(":" in host))
    socket.bind(f"tcp://{address}:{port or '*'}")
    endpoint = socket.getsockopt(zmq.LAST_ENDPOINT)
    return int(bytes(endpoint).rstrip(b"\0").rpartition(b":")[2])
