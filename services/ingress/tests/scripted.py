"""Engines and endpoints that misbehave in a named way, at a named point of a response."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

from .ingress_lab import HOST, MODEL, Lab, Peer

ERROR = b'{"error":"from the endpoint"}'
SSE = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def _answer(status: str) -> Callable[[Peer], None]:
    return lambda peer: peer.answer(ERROR, status)


def _head_then(end: Callable[[Peer], None], body: bytes = b"") -> Callable[[Peer], None]:
    def play(peer: Peer) -> None:
        peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + body)
        end(peer)

    return play


def _half_a_head(peer: Peer) -> None:
    peer.send(b"HTTP/1.1 200 OK\r\nx: ")
    peer.reset()


def _silence(peer: Peer) -> None:
    """Says nothing more."""


# After the request came; what is refused or not accepted has no script.
SCRIPTS: dict[str, Callable[[Peer], None]] = {
    "ok": lambda peer: peer.answer(b'{"ok":true}'),
    "reset before the head": Peer.reset,
    "end before the head": Peer.close,
    "half a head": _half_a_head,
    "no HTTP": lambda peer: peer.send(b"220 smtp ready\r\n\r\n"),
    "silence": _silence,
    **{status: _answer(status) for status in ("400 Bad", "404 No", "429 Slow Down", "500 Oh", "503 Busy")},
    "500 without its body": lambda peer: peer.send(b"HTTP/1.1 500 Oh\r\ncontent-length: 9\r\n\r\n"),
    "500 with a huge body": lambda peer: peer.answer(b"x" * 100_000, "500 Oh"),
    "reset after the head": _head_then(Peer.reset),
    "end after the head": _head_then(Peer.close),
    "silence after the head": _head_then(_silence),
    "reset in the body": _head_then(Peer.reset, b"some"),
    "silence in the body": _head_then(_silence, b"some"),
    "bad chunk in the body": lambda peer: peer.send(
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nsome\r\nzz\r\n"
    ),
}


class Endpoint:
    """Listens and plays a script for each request; of several each in turn, the last one for ever."""

    def __init__(self, *scripts: str) -> None:
        self.scripts = list(scripts)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.times: list[float] = []
        self.port = 0
        self._server: asyncio.Server | None = None
        self._peers: list[Peer] = []

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, 0, backlog=2048)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peers.append(peer := Peer(reader, writer))
        try:
            while True:
                first, headers, _ = await peer.head()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.requests.append((first, headers, body))
                self.times.append(asyncio.get_running_loop().time())
                self.play(peer)
        except (OSError, EOFError, TimeoutError):
            writer.close()

    def play(self, peer: Peer) -> None:
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
        SCRIPTS[script](peer)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for peer in self._peers:
            peer.writer.transport.abort()


def refusing_port() -> int:
    """A port where nobody listens."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def config(*entries: dict[str, Any]) -> str:
    """The value of --route-config."""
    return json.dumps(list(entries))


def add_instance(lab: Lab, port: int, name: str = "i1") -> None:
    """An instance of the model at a port."""
    lab.instance(name, port, models=(MODEL,))
