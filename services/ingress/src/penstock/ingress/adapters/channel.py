"""The pair of sockets between the ingress's parent and a worker: length-prefixed MessagePack."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec

from penstock.common.codec import DecodeError, decode

MAX_FRAME_BYTES = 16 * 1024 * 1024


class Channel:
    """One end; both ends are ours, so a frame that cannot be read ends the channel."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def open(self) -> None:
        """Attach to the running loop."""
        self._socket.setblocking(False)
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)

    async def send(self, message: Any) -> None:
        """Send one frame. Raises OSError when the other end is gone."""
        if self._writer is None:
            raise OSError("the channel is not open")
        payload = msgspec.msgpack.encode(message)
        self._writer.write(len(payload).to_bytes(4, "big") + payload)
        await self._writer.drain()

    async def receive(self, kind: Any) -> Any:
        """The next frame, of a class or a union of classes; None when the channel ended."""
        if self._reader is None:
            return None
        try:
            size = int.from_bytes(await self._reader.readexactly(4), "big")
            if size > MAX_FRAME_BYTES:
                return None
            return decode(kind, await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, OSError, DecodeError):
            return None

    def close(self) -> None:
        """End it."""
        if self._writer is not None:
            self._writer.close()
        else:
            self._socket.close()
