"""KV-cache events over ZeroMQ, as vLLM and SGLang publish them: a SUB socket for the stream, a DEALER socket
for what was missed. The only importer of zmq in discovery."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import zmq
import zmq.asyncio

from penstock.discovery.allowed import AllowedHosts, is_address
from penstock.discovery.kv_events import KvEventError, decode_sequence
from penstock.discovery.kv_targets import KvTarget

# A peer that sends larger frames is disconnected. A prompt of 250,000 tokens stored at once takes 2 MiB.
MAX_FRAME_BYTES = 4 * 1024 * 1024
# Messages that wait unread; the publisher drops what comes on top, which is a gap.
PENDING_MESSAGES = 1000
# The engines keep 10,000 by default.
MAX_REPLAYED, MAX_REPLAYED_BYTES, REPLAY_S = 10_000, 64 * 1024 * 1024, 5.0
RECONNECT_MS, RECONNECT_MOST_MS = 200, 30_000
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 5_000, 15_000
MAX_SOCKETS = 16_384
_END = (2**64 - 1).to_bytes(8, "big")
# topic, sequence, payload
_FRAMES = 3
_MAX_FRAMES = 16


@contextmanager
def zmq_publishers(allowed: AllowedHosts) -> Iterator[ZmqPublishers]:
    """Connects to publishers at `allowed` addresses only."""
    context = zmq.asyncio.Context()
    context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
    try:
        yield ZmqPublishers(context, allowed)
    finally:
        context.destroy(linger=0)


class ZmqPublishers:
    """Fulfils `ports.KvPublishers`."""

    def __init__(self, context: zmq.asyncio.Context, allowed: AllowedHosts) -> None:
        self._context, self._allowed = context, allowed

    async def connect(self, target: KvTarget) -> ZmqPublisher:
        """See `ports.KvPublishers`; the connections themselves come about later."""
        events = await self._address(*target.events)
        replay = await self._address(*target.replay) if target.replay is not None else ""
        return ZmqPublisher(self._context, events, replay)

    async def _address(self, host: str, port: int) -> str:
        address = host
        if not is_address(host):
            # Resolved here, so that a name cannot lead where no instance may be.
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)
            address = str(found[0][4][0])
        refusal = self._allowed.refusal(address)
        if refusal:
            raise PermissionError(refusal)
        return f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"


class ZmqPublisher:
    """Fulfils `ports.KvPublisher`."""

    def __init__(self, context: zmq.asyncio.Context, events: str, replay: str) -> None:
        """Raises OSError."""
        self._context, self._replay = context, replay
        self._events = self._socket(zmq.SUB)
        self._events.setsockopt(zmq.SUBSCRIBE, b"")
        self._monitor = self._events.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._connect(self._events, events)

    async def receive(self) -> tuple[int, bytes]:
        """See `ports.KvPublisher`. Raises KvEventError for other frames than a publisher's."""
        try:
            _, sequence, payload = await self._message(self._events)
        except zmq.ZMQError as exc:
            raise OSError(exc.errno, str(exc)) from exc
        return decode_sequence(sequence), payload

    def interrupted(self) -> bool:
        """See `ports.KvPublisher`."""
        interrupted = False
        while int(self._monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            # They are there already: nothing is awaited.
            cast(asyncio.Future[list[bytes]], self._monitor.recv_multipart(zmq.NOBLOCK)).result()
            interrupted = True
        return interrupted

    async def replay(self, first: int) -> list[tuple[int, bytes]]:
        """See `ports.KvPublisher`."""
        replayed: list[tuple[int, bytes]] = []
        if not self._replay:
            return replayed
        deadline, size = time.monotonic() + REPLAY_S, 0
        with contextlib.suppress(zmq.ZMQError, OSError, KvEventError, TimeoutError):
            socket = self._socket(zmq.DEALER)
            try:
                self._connect(socket, self._replay)
                async with asyncio.timeout(deadline - time.monotonic()):
                    await socket.send_multipart([b"", first.to_bytes(8, "big")])
                    while len(replayed) < MAX_REPLAYED and size < MAX_REPLAYED_BYTES:
                        _, sequence, payload = await self._message(socket, skip=1)
                        if sequence == _END:
                            break
                        replayed.append((decode_sequence(sequence), payload))
                        size += len(payload)
                        await asyncio.sleep(0)
            finally:
                socket.close(linger=0)
        return replayed

    def close(self) -> None:
        """See `ports.KvPublisher`."""
        self._events.disable_monitor()
        self._monitor.close(linger=0)
        self._events.close(linger=0)

    def _socket(self, kind: int) -> zmq.asyncio.Socket:
        try:
            socket = self._context.socket(kind)
        except zmq.ZMQError as exc:
            raise OSError(exc.errno, str(exc)) from exc
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.RCVHWM, PENDING_MESSAGES),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, RECONNECT_MOST_MS),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
            (zmq.IPV6, 1),
        ):
            socket.setsockopt(option, value)
        return socket

    def _connect(self, socket: zmq.asyncio.Socket, address: str) -> None:
        try:
            socket.connect(address)
        except zmq.ZMQError as exc:
            socket.close(linger=0)
            raise OSError(exc.errno, str(exc)) from exc

    async def _message(self, socket: zmq.asyncio.Socket, skip: int = 0) -> tuple[bytes, bytes, bytes]:
        """The three frames after the first `skip` of the next message; frames on top of them are read one by
        one and dropped."""
        frames: list[bytes] = []
        count = 0
        while True:
            frame: bytes = await socket.recv()
            count += 1
            if skip < count <= skip + _FRAMES:
                frames.append(frame)
            if not socket.getsockopt(zmq.RCVMORE):
                break
        if len(frames) != _FRAMES or count > _MAX_FRAMES:
            raise KvEventError(f"a message of {count} frames")
        return frames[0], frames[1], frames[2]
