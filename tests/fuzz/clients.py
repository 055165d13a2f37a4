"""The request side: a ClientConnection on a transport of bytes, beside h11 as a server."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any, NamedTuple

import h11

from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.instances import InstanceTable
from penstock.common.telemetry import Metrics
from penstock.ingress.access_log import AccessLog
from penstock.ingress.adapters.client_connection import ClientConnection
from penstock.ingress.adapters.http_server import HttpServer
from penstock.ingress.gateway import Gateway
from penstock.ingress.http_wire import RequestHead
from penstock.ingress.in_flight import InFlightAccount
from penstock.ingress.settings import IngressSettings

MAX_HEAD = 65536
# RFC 9112 7.1.1 allows blanks before an extension; h11 does not.
_BLANK_BEFORE_EXTENSION = re.compile(rb"[0-9A-Fa-f][ \t]+;")
_EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")
_ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]+\r\n((?:[!-9;-~]+: ?[^\r\n]*\r\n)*)\r\n")
_LENGTH = re.compile(rb"(?im)^content-length: (\d+)\r$")


class Request(NamedTuple):
    """A request as somebody read it."""

    method: bytes
    target: bytes
    body: bytes


class Wire(asyncio.Transport):
    """Keeps what is written; never full."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.closed = self.ended = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def write(self, data: Any) -> None:
        assert not self.ended, "written behind the end"
        self.written += data

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(list_of_data))

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Recorded(ClientConnection):
    """Keeps every request that it takes for whole."""

    def __init__(self, server: HttpServer, gateway: Gateway) -> None:
        super().__init__(server, gateway)
        self.requests: list[Request] = []

    def _whole(self, body: bytes | bytearray, rest: bytes) -> None:
        head = self._head
        assert isinstance(head, RequestHead)
        self.requests.append(Request(head.method, head.target, bytes(body)))
        super()._whole(body, rest)


class Reader:
    """A gateway that knows no instance: every chat is answered with an error of ours."""

    def __init__(self) -> None:
        metrics, table = Metrics(), InstanceTable()
        writer = EventWriter(MemoryBus(MemoryBroker(), metrics), "fuzz", "1", metrics)
        self.gateway = Gateway(
            IngressSettings(),
            Identity("ingress", "fuzz", "1"),
            table,
            InFlightAccount("fuzz", "1"),
            writer,
            AccessLog(False, lambda line: None),
            metrics,
            time.monotonic,
        )
        self.server = HttpServer(self.gateway, metrics)

    async def read(self, pieces: list[bytes]) -> tuple[list[Request], bytes, bool]:
        """Requests, answers, and whether the connection is over."""
        connection, wire = Recorded(self.server, self.gateway), Wire()
        connection.connection_made(wire)
        for piece in pieces:
            if wire.closed:
                break
            connection.data_received(piece)
        for _ in range(10_000):
            if not connection._held_back or wire.closed:
                break
            await asyncio.sleep(0)
        over = wire.closed or wire.ended
        connection.connection_lost(None)
        assert not self.gateway.exchanges
        assert not self.server.connections
        return connection.requests, bytes(wire.written), over


def statuses(answers: bytes) -> list[int]:
    """Of the gateway's answers. AssertionError if they are not HTTP; only HEAD has a length and no body."""
    found: list[tuple[int, int]] = []
    while answers:
        match = _ANSWER.match(answers)
        if match is None and found and found[-1][1]:
            answers = answers[found[-1][1] :]
            found[-1] = (found[-1][0], 0)
            continue
        assert match, answers[:200]
        length = _LENGTH.search(match[2])
        found.append((int(match[1]), int(length[1]) if length else 0))
        answers = answers[match.end() :]
    return [status for status, _ in found]


def by_h11(data: bytes) -> list[Request]:
    """The requests that h11 reads, up to its first complaint."""
    requests: list[Request] = []
    while data:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        connection.receive_data(_EMPTY_LINES.sub(b"", data))
        try:
            request = _one(connection)
        except h11.RemoteProtocolError:
            return requests
        if request is None:
            return requests
        requests.append(request)
        data = connection.trailing_data[0]
    return requests


def _one(connection: h11.Connection) -> Request | None:
    head, body = None, b""
    while True:
        event = connection.next_event()
        match event:
            case h11.Request():
                head = event
            case h11.Data():
                body += event.data
            case h11.EndOfMessage() if head is not None:
                return Request(head.method, head.target, body)
            case _:
                return None


async def check(reader: Reader, data: bytes, pieces: list[bytes]) -> None:
    """What the gateway takes for requests, h11 reads as the very same ones, whatever pieces they come in."""
    requests, answers, over = await reader.read(pieces)
    whole, _, _ = await reader.read([data])
    assert requests == whole, "the pieces made a difference"
    found = statuses(answers)
    final = [status for status in found if status != 100]
    assert len(requests) <= len(final) <= len(requests) + 1
    if len(final) > len(requests):
        assert final[-1] in (400, 413, 431)
        assert over
    if not _BLANK_BEFORE_EXTENSION.search(data):
        assert requests == by_h11(data)[: len(requests)]
