"""The response side: an EngineConnection on a transport of bytes, beside h11 as a client."""

from __future__ import annotations

import re
from typing import NamedTuple

import h11

from fuzz.clients import Wire
from penstock.common.telemetry import Metrics
from penstock.ingress.adapters.engine_client import EngineClient
from penstock.ingress.adapters.engine_connection import EngineConnection
from penstock.ingress.adapters.pool import Bounds, Pool
from penstock.ingress.http_wire import CHUNKED, ResponseHead
from penstock.ingress.ports import ResponseListener, Upstream
from penstock.ingress.settings import IngressSettings

_BLANK_BEFORE_EXTENSION = re.compile(rb"[0-9A-Fa-f][ \t]+;")
REQUEST = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n"


class Response(NamedTuple):
    """A complete response as somebody read it; `reusable`: nothing follows it, and the connection stays."""

    status: int
    body: bytes
    reusable: bool


class Listener:
    """Stands where an exchange stands."""

    retry = False

    def __init__(self) -> None:
        self.head: ResponseHead | None = None
        self.wire = b""
        self.done = self.lost = False
        self.upstream: Upstream | None = None

    def upstream_connected(self, upstream: Upstream) -> None:
        self.upstream = upstream
        upstream.send(REQUEST, b"")

    def upstream_waits(self, place: Upstream) -> None: ...

    def upstream_refused(self, cause: str, *, overflow: bool = False) -> None:
        raise AssertionError(cause)

    def upstream_head(self, head: ResponseHead) -> ResponseListener:
        assert self.head is None, "two heads"
        self.head = head
        return self

    def upstream_flush(self) -> None: ...

    def upstream_data(self, data: bytes, boundary: bool) -> None:
        assert self.head is not None
        assert not self.over
        self.wire += data

    def upstream_done(self) -> None:
        assert not self.over
        self.done = True
        assert self.upstream is not None
        self.upstream.release()

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        assert not self.over
        self.lost = True

    @property
    def over(self) -> bool:
        """Told of the end; once."""
        return self.done or self.lost


_SETTINGS = IngressSettings()
_CLIENT = EngineClient(_SETTINGS, Metrics())


def by_us(pieces: list[bytes]) -> Response | None:
    """None if the response is broken or cut off."""
    pool = Pool(_CLIENT, Bounds(_SETTINGS), ("127.0.0.1", 1, "http"), 65536)
    listener, wire = Listener(), Wire()
    connection = EngineConnection(pool)
    connection.connection_made(wire)
    pool.connect(retry=False)
    pool.connected(connection)
    connection.attach(listener, reused=False)
    for piece in pieces:
        if wire.closed:
            break
        connection.data_received(piece)
    reusable = bool(pool.idle) and connection.usable
    connection.connection_lost(None)
    assert listener.over, "the exchange would wait for its deadline"
    assert not pool.idle
    assert (pool.active, pool.connections) == (0, 0)
    if listener.lost or listener.head is None:
        return None
    body = unchunked(listener.wire) if listener.head.length == CHUNKED else listener.wire
    return Response(listener.head.status, body, reusable)


def unchunked(wire: bytes) -> bytes:
    """The payload of a chunked body. AssertionError if it is not whole and alone."""
    body = b""
    while True:
        line, _, wire = wire.partition(b"\r\n")
        size = int(line.partition(b";")[0].strip(b" \t"), 16)
        if not size:
            assert wire == b"\r\n"
            return body
        body += wire[:size]
        assert len(wire) >= size + 2
        assert wire[size : size + 2] == b"\r\n"
        wire = wire[size + 2 :]


def by_h11(data: bytes) -> Response | None:
    """The response as h11 reads it."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=65536)
    connection.send(h11.Request(method="POST", target="/", headers=[("host", "a"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    if data:
        connection.receive_data(data)
    connection.receive_data(b"")
    status, body = 0, b""
    try:
        while True:
            event = connection.next_event()
            match event:
                case h11.Response():
                    status = event.status_code
                case h11.Data():
                    body += event.data
                case h11.EndOfMessage():
                    reusable = connection.their_state is h11.DONE and not connection.trailing_data[0]
                    return Response(status, body, reusable)
                case h11.InformationalResponse():
                    continue
                case _:
                    return None
    except h11.RemoteProtocolError:
        return None


def check(data: bytes, pieces: list[bytes]) -> None:
    """What the gateway takes for a whole response, h11 reads the same way; pieces change only whether bytes
    behind the end are seen in time."""
    ours, whole = by_us(pieces), by_us([data])
    assert (ours and ours[:2]) == (whole and whole[:2]), "the pieces made a difference"
    if whole is None or _BLANK_BEFORE_EXTENSION.search(data):
        return
    theirs = by_h11(data)
    assert theirs is not None, "h11 refuses it"
    assert whole[:2] == theirs[:2]
    assert theirs.reusable or not whole.reusable
