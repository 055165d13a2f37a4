"""No turn of the loop handles more of one connection than a bounded piece."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from integration.servers import eventually

from penstock.ingress.adapters.client_connection import ClientConnection
from penstock.ingress.adapters.engine_connection import (
    FULL_READ_BYTES,
    MAX_CHUNKS,
    SLICE_BYTES,
    EngineConnection,
)
from penstock.ingress.adapters.pool import Bounds, Pool
from penstock.ingress.chunked_body import PIECE_BYTES
from penstock.ingress.http_wire import LAST_CHUNK, ResponseHead
from penstock.ingress.ports import ResponseListener, Upstream

from .ingress_lab import Lab

CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
TINY = b"1\r\nx\r\n"
# More than is followed in one turn.
MANY = TINY * 3000


class Wire(asyncio.Transport):
    """Remembers what is written and whether it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.reading, self.closed = True, False

    def write(self, data: bytes | bytearray | memoryview[int]) -> None:
        self.written += data

    def writelines(self, list_of_data: object) -> None:
        raise AssertionError("a large body is written by slices")

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def is_reading(self) -> bool:
        return self.reading

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def close(self) -> None:
        self.closed = True


class Listener:
    """Gathers a response."""

    retry = False

    def __init__(self) -> None:
        self.data, self.done, self.lost = b"", False, ""

    def upstream_connected(self, upstream: Upstream) -> None:
        pass

    def upstream_waits(self, place: Upstream) -> None: ...

    def upstream_refused(self, cause: str, *, overflow: bool = False) -> None:
        raise AssertionError(cause)

    def upstream_head(self, head: ResponseHead) -> ResponseListener:
        return self

    def upstream_flush(self) -> None:
        pass

    def upstream_data(self, data: bytes, boundary: bool) -> None:
        self.data += data

    def upstream_done(self) -> None:
        self.done = True

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        self.lost = cause


@pytest.fixture
def engine_wire() -> Wire:
    return Wire()


@pytest.fixture
def connection(lab: Lab, engine_wire: Wire) -> EngineConnection:
    """A connection that serves somebody."""
    pool = Pool(lab.upstreams, Bounds(lab.settings), ("127.0.0.1", 1, "http"), 65536)
    connection = EngineConnection(pool)
    connection.connection_made(engine_wire)
    return connection


def attached(connection: EngineConnection) -> Listener:
    listener = Listener()
    connection.attach(listener, reused=False)
    connection.send(b"", b"")
    return listener


async def test_a_response_of_tiny_chunks_is_relayed_by_pieces_and_not_read_meanwhile(
    connection: EngineConnection, engine_wire: Wire
) -> None:
    listener, body = attached(connection), TINY * 20_000 + LAST_CHUNK
    connection.data_received(CHUNKED_HEAD + body)
    assert len(listener.data) <= MAX_CHUNKS * len(TINY) + PIECE_BYTES
    assert not engine_wire.reading
    await eventually(lambda: listener.done)
    assert listener.data == body
    assert not listener.lost


async def test_reading_goes_on_once_the_pieces_are_relayed(
    connection: EngineConnection, engine_wire: Wire
) -> None:
    listener = attached(connection)
    connection.data_received(CHUNKED_HEAD + MANY)
    await eventually(lambda: engine_wire.reading)
    assert listener.data == MANY


async def test_a_slow_client_is_waited_for_when_the_pieces_are_relayed(
    connection: EngineConnection, engine_wire: Wire
) -> None:
    listener = attached(connection)
    connection.data_received(CHUNKED_HEAD + MANY)
    connection.pause()
    await eventually(lambda: len(listener.data) == len(MANY))
    for _ in range(3):
        await asyncio.sleep(0)
    assert not engine_wire.reading
    connection.resume()
    assert engine_wire.reading


async def test_a_fault_behind_many_chunks_is_found(connection: EngineConnection, engine_wire: Wire) -> None:
    listener = attached(connection)
    connection.data_received(CHUNKED_HEAD + TINY * 20_000 + b"nonsense\r\n")
    await eventually(lambda: listener.lost)
    assert engine_wire.closed


async def test_after_a_full_read_others_have_their_turn(
    connection: EngineConnection, engine_wire: Wire
) -> None:
    listener = attached(connection)
    connection.data_received(b"HTTP/1.1 200 OK\r\n\r\n")
    connection.data_received(b"x" * FULL_READ_BYTES)
    assert (len(listener.data), engine_wire.reading) == (FULL_READ_BYTES, False)
    await eventually(lambda: engine_wire.reading)


async def test_a_large_body_is_sent_by_slices_as_the_engine_takes_them(
    connection: EngineConnection, engine_wire: Wire
) -> None:
    body = bytes(range(256)) * 4096
    attached(connection)
    connection.send(b"head", body)
    assert len(engine_wire.written) == len(b"head") + SLICE_BYTES
    connection.pause_writing()
    for _ in range(3):
        await asyncio.sleep(0)
    held = len(engine_wire.written)
    assert held <= len(b"head") + 2 * SLICE_BYTES
    connection.resume_writing()
    await eventually(lambda: len(engine_wire.written) == len(b"head") + len(body))
    assert engine_wire.written == b"head" + body


async def test_a_connection_with_a_body_half_sent_is_not_kept(
    connection: EngineConnection, engine_wire: Wire
) -> None:
    listener = attached(connection)
    connection.send(b"head", b"x" * (3 * SLICE_BYTES))
    connection.data_received(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
    assert listener.done
    connection.release()
    assert engine_wire.closed
    await asyncio.sleep(0)
    assert len(engine_wire.written) == len(b"head") + SLICE_BYTES


async def test_a_chunked_request_is_taken_by_pieces_too(lab: Lab) -> None:
    wire = Wire()
    connection = ClientConnection(lab.server, lab.gateway)
    connection.connection_made(wire)
    connection.data_received(b"POST /nowhere HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
    connection.data_received(TINY * 4000 + LAST_CHUNK)
    assert not wire.is_reading()
    assert wire.written == b""
    await eventually(lambda: wire.written.startswith(b"HTTP/1.1 404"))
    assert wire.is_reading()
    connection.connection_lost(None)


async def test_a_large_request_lets_others_have_their_turn_after_a_full_read(lab: Lab) -> None:
    wire = Wire()
    connection = ClientConnection(lab.server, lab.gateway)
    connection.connection_made(cast(asyncio.BaseTransport, wire))
    connection.data_received(b"POST /nowhere HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n")
    for left in (750_000, 500_000, 250_000):
        connection.data_received(b"x" * 250_000)
        assert not wire.is_reading(), left
        await eventually(wire.is_reading)
    connection.data_received(b"x" * 250_000)
    assert wire.written.startswith(b"HTTP/1.1 404")
    assert wire.is_reading()
    connection.connection_lost(None)
