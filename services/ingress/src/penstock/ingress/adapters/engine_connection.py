"""One connection to an instance: HTTP/1.1 on an asyncio protocol, relayed as bytes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

from penstock.ingress.chunked_body import PIECE_BYTES, ChunkedBody
from penstock.ingress.http_wire import (
    CHUNKED,
    LAST_CHUNK,
    UNTIL_CLOSE,
    BadFraming,
    HeadMemo,
    ResponseHead,
    parse_response,
)
from penstock.ingress.ports import ResponseListener, Upstream, UpstreamListener

if TYPE_CHECKING:
    from penstock.ingress.adapters.pool import Pool


# A second write costs less than copying a body of this size behind its head.
JOIN_BYTES: Final = 32 * 1024
# A larger body is sent by pieces, with a turn of the loop after each: 4 MiB at once hold it for 4 ms.
SLICE_BYTES: Final = 128 * 1024
# After as many chunks, or a read of this size, others have their turn before more of a response is read;
# uvloop would read on up to 32 times.
MAX_CHUNKS: Final = 512
FULL_READ_BYTES: Final = 128 * 1024
MAX_INTERIM_RESPONSES: Final = 8


class EngineConnection(Upstream):
    """One connection; serves one exchange at a time. It is an `asyncio.Protocol` by its methods only: machine
    code has slots in objects whose bases are compiled too, and 20 ns for each attribute of others."""

    __slots__ = (
        "_breathing",
        "_buffer",
        "_chunked",
        "_head_done",
        "_heads_seen",
        "_interim",
        "_keep_alive",
        "_listener",
        "_paused",
        "_pool",
        "_remaining",
        "_response",
        "_transport",
        "_unsent",
        "_writing_paused",
        "idle_since",
        "left",
        "retry",
        "reused",
    )

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        # Who waits for a head, and then who hears of the body.
        self._listener: UpstreamListener | None = None
        self._response: ResponseListener | None = None
        self._chunked: ChunkedBody | None = None
        self._buffer = b""
        self._remaining = 0
        self._interim = 0
        self._heads_seen = HeadMemo(parse_response)
        self._head_done = self._keep_alive = False
        self._paused = self._breathing = self._writing_paused = False
        self._unsent: memoryview | None = None
        self.reused = False
        self.idle_since = 0.0
        # Requests that it may still serve: from 0 on, any number. Whether that in hand is a retry.
        self.left = pool.requests_per_connection
        self.retry = False

    # -- the exchange's side -----------------------------------------------------------------------

    def attach(self, listener: UpstreamListener, *, reused: bool) -> None:
        """Serve `listener`."""
        self._listener, self.reused = listener, reused
        self._buffer = b""
        self._interim = 0
        self._head_done = False
        self._keep_alive = True
        listener.upstream_connected(self)

    def send(self, head: bytes, body: bytes | bytearray) -> None:
        transport = self._transport
        if transport is None:
            return
        self._head_done = self._keep_alive = False
        if len(body) <= JOIN_BYTES:
            transport.write(head + body)
        elif len(body) <= SLICE_BYTES:
            transport.writelines((head, body))
        else:
            transport.write(head)
            self._unsent = memoryview(body)
            self._send_on()

    def _send_on(self) -> None:
        unsent = self._unsent
        if unsent is None or self._transport is None or self._transport.is_closing():
            return
        self._unsent = unsent[SLICE_BYTES:] if len(unsent) > SLICE_BYTES else None
        self._transport.write(unsent[:SLICE_BYTES])
        if self._unsent is not None and not self._writing_paused:
            asyncio.get_running_loop().call_soon(self._send_on)

    def pause(self) -> None:
        self._paused = True
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        self._paused = False
        if self._transport is not None and not self._transport.is_closing() and not self._breathing:
            self._transport.resume_reading()

    def release(self) -> None:
        self._listener = self._response = None
        transport = self._transport
        if transport is None:
            return
        # Unsent request bytes mean that the instance answered without reading: not a clean end.
        unsent = self._unsent is not None or transport.get_write_buffer_size()
        if not self._keep_alive or transport.is_closing() or unsent:
            self.abort()
            return
        if self._paused:
            self._paused = False
            transport.resume_reading()
        self._pool.give_back(self)

    def abort(self) -> None:
        self._listener = self._response = self._unsent = None
        if self._transport is not None:
            self._transport.abort()

    # -- the socket's side -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def eof_received(self) -> None:
        """The other end says no more: the transport closes."""

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._unsent is not None:
            asyncio.get_running_loop().call_soon(self._send_on)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = self._unsent = None
        self._pool.forget(self)
        listener, response = self._listener, self._response
        self._listener = self._response = None
        if listener is None:
            return
        if response and self._chunked is None and self._remaining == UNTIL_CLOSE and exc is None:
            response.upstream_done()
        else:
            answered = self._head_done or bool(self._buffer) or self._interim > 0
            if self.reused and not answered:
                self._pool.close_idle()
            cause = str(exc) if exc else "it closed the connection"
            (response or listener).upstream_lost(cause, answered=answered)

    def data_received(self, data: bytes) -> None:
        listener = self._listener
        if listener is None:
            # An idle connection that speaks is broken: what it says belongs to nobody.
            self.abort()
            return
        response = self._response
        try:
            if response is not None:
                self._body(response, data)
            elif not self._buffer and (whole := self._heads_seen.whole(data)) and whole[0].status >= 200:
                known, body = whole
                self._whole(listener, known, body)
            else:
                self._heads(listener, data)
        except BadFraming as exc:
            response = self._response
            self.abort()
            self._pool.metrics_bad_framing.value += 1
            (response or listener).upstream_lost(f"it broke HTTP: {exc}", answered=True)
            return
        if len(data) >= FULL_READ_BYTES and self._listener is listener:
            self._breathe()

    def _breathe(self) -> None:
        """Let others have their turn, then go on."""
        if self._transport is not None and not self._breathing and not self._transport.is_closing():
            self._breathing = True
            self._transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._breathing = False
        if self._transport is None or self._transport.is_closing():
            return
        if self._listener is not None and self._chunked is not None and self._chunked.more:
            self.data_received(b"")
        if not self._breathing and not self._paused and not self._transport.is_closing():
            self._transport.resume_reading()

    def _heads(self, listener: UpstreamListener, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        response: ResponseListener | None = None
        while not self._head_done:
            end = buffer.find(b"\r\n\r\n")
            if end < 0 or end > self._pool.max_header_bytes:
                if len(buffer) > self._pool.max_header_bytes:
                    raise BadFraming(f"headers of more than {self._pool.max_header_bytes} bytes")
                self._buffer = buffer
                return
            head = self._heads_seen.parse(buffer[: end + 2])
            buffer = buffer[end + 4 :]
            if head.status < 200:
                self._interim += 1
                if head.status == 101 or self._interim > MAX_INTERIM_RESPONSES:
                    raise BadFraming(f"an unexpected {head.status}")
                continue
            self._head_done = True
            self._keep_alive = head.keep_alive
            self._remaining = head.length
            self._chunked = ChunkedBody() if head.length == CHUNKED else None
            self._buffer = b""
            response = self._response = listener.upstream_head(head)
        if response is None:
            return
        if self._remaining == 0:
            self._done(response, buffer)
        elif buffer:
            self._body(response, buffer)
        if self._response is response:
            response.upstream_flush()

    def _whole(self, listener: UpstreamListener, known: ResponseHead, body: bytes) -> None:
        """Most responses that are no streams: all of it is here, behind a head that is known."""
        head = known if known.length == len(body) else known.with_length(len(body))
        self._head_done, self._keep_alive = True, head.keep_alive
        self._remaining, self._chunked = 0, None
        response = self._response = listener.upstream_head(head)
        if response is not None:
            response.upstream_data(body, True)
            if self._response is response:
                response.upstream_done()

    def _body(self, response: ResponseListener, data: bytes) -> None:
        chunked = self._chunked
        if chunked is not None:
            if len(data) > PIECE_BYTES or chunked.more:
                wire = chunked.feed_some(data, MAX_CHUNKS)
                if chunked.more:
                    self._breathe()
            else:
                wire = chunked.feed(data)
            if chunked.done:
                wire += LAST_CHUNK
            if wire:
                response.upstream_data(wire, chunked.between_chunks)
            if chunked.done and self._response is response:
                self._done(response, chunked.rest)
        elif self._remaining == UNTIL_CLOSE:
            response.upstream_data(data, True)
        else:
            rest = data[self._remaining :]
            if rest:
                data = data[: self._remaining]
            self._remaining -= len(data)
            response.upstream_data(data, self._remaining == 0)
            if self._remaining == 0 and self._response is response:
                self._done(response, rest)

    def _done(self, response: ResponseListener, rest: bytes) -> None:
        if rest:
            # Bytes after the end could be taken for the next exchange's response.
            self._keep_alive = False
        response.upstream_done()

    @property
    def usable(self) -> bool:
        """Whether an idle connection can still serve; one that ended stays in its pool for a loop turn."""
        return self._transport is not None and not self._transport.is_closing()

    def close_idle(self) -> None:
        """Close a connection that serves nobody."""
        if self._transport is not None:
            self._transport.close()
