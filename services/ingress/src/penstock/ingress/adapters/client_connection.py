"""One client's connection: HTTP/1.1 on an asyncio protocol, one exchange at a time."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from typing import TYPE_CHECKING, Final, cast

from penstock.ingress.adapters.admin_relay import PREFIX, AdminExchange
from penstock.ingress.chunked_body import ChunkedBody
from penstock.ingress.exchange import Exchange
from penstock.ingress.failures import GatewayError
from penstock.ingress.gateway import Gateway
from penstock.ingress.http_wire import CHUNKED, BadFraming, HeadMemo, RequestHead, parse_request
from penstock.ingress.large_bodies import LARGE_BODY_BYTES, SizedBody
from penstock.ingress.openai import GENERATION
from penstock.ingress.ports import Downstream
from penstock.ingress.responses import error_response

if TYPE_CHECKING:
    from penstock.ingress.adapters.http_server import HttpServer

# Bytes of further requests that a connection may send while one is served; then it is not read.
MAX_PIPELINED_BYTES: Final = 64 * 1024
# Response bytes that may wait for a slow client before its upstream is paused.
WRITE_HIGH_WATER: Final = 64 * 1024
# What a refused client may still send is read and dropped for this long.
LINGER_S: Final = 2.0
# After as many chunks, or a read of this size, others have their turn before more of a body is read; uvloop
# would read on up to 32 times.
MAX_CHUNKS: Final = 512
FULL_READ_BYTES: Final = 128 * 1024
# Makes the kernel end a connection with a reset instead of a FIN.
_RESET: Final = struct.pack("ii", 1, 0)
_EMPTY_LINES: Final = re.compile(rb"\A(?:\r\n)+")
_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

MODELS: Final = b"/v1/models"


class ClientConnection(Downstream):
    """One client. Reads a request whole, hands it to an Exchange, writes what that sends. It is an
    `asyncio.Protocol` by its methods only, as `EngineConnection` is."""

    __slots__ = (
        "_body",
        "_body_bytes",
        "_body_until",
        "_buffer",
        "_chunked",
        "_closing",
        "_exchange",
        "_gateway",
        "_head",
        "_heads",
        "_held_back",
        "_idle_timeout",
        "_most_body_bytes",
        "_reading_paused",
        "_server",
        "_transport",
        "_writing_paused",
        "deadline",
    )

    def __init__(self, server: HttpServer, gateway: Gateway) -> None:
        self._server, self._gateway = server, gateway
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._head: RequestHead | None = None
        settings = gateway.settings
        self._heads = HeadMemo(parse_request, settings.max_header_bytes)
        # Read here once: of settings each costs 30 ns.
        self._most_body_bytes, self._idle_timeout = settings.buffer_limit, settings.idle_timeout
        # Bodies that come in chunks, and large ones.
        self._chunked: ChunkedBody | SizedBody | None = None
        self._body: list[bytes] = []
        self._body_bytes = 0
        # When the body that is being read has to be whole; 0 before its first piece.
        self._body_until = 0.0
        self._exchange: Exchange | AdminExchange | None = None
        self._reading_paused = self._writing_paused = self._closing = False
        # The next request waits for its turn: until the loop comes round, or the client reads.
        self._held_back = False
        self.deadline = gateway.clock() + settings.header_timeout

    # -- the socket's side -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._server.admit(self):
            self._closing = True
            self._transport.abort()
            return
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.forget(self)
        self._left()

    def eof_received(self) -> bool:
        """A client that closes its sending side is taken to have left, as nginx does."""
        # At once: the transport closes only when a client that does not read has taken what is written.
        self._left()
        return False

    def _left(self) -> None:
        self._closing = True
        self.deadline = self._gateway.clock() + self._gateway.settings.idle_timeout
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.client_gone()

    def pause_writing(self) -> None:
        self._writing_paused = True
        if self._exchange is not None:
            self._exchange.pause()
        else:
            # An exchange that began from here on would not be told to pause.
            self._held_back = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        if self._exchange is not None:
            self._exchange.resume()
        elif self._held_back:
            asyncio.get_running_loop().call_soon(self._next)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if self._exchange is not None or self._held_back:
            self._buffer += data
            if len(self._buffer) > MAX_PIPELINED_BYTES and self._transport is not None:
                self._reading_paused = True
                self._transport.pause_reading()
            return
        if self._head is None and not self._buffer and (whole := self._heads.whole(data)) is not None:
            head, body = whole
            if head.generates and len(body) <= self._most_body_bytes:
                keys = self._gateway.api_keys
                admitted = head if keys is None else keys.known(head, self._heads)
                if admitted is not None:
                    # Most requests: nothing has to be remembered of them.
                    self._begin(admitted, body)
                    return
        self._advance(data)

    def _advance(self, data: bytes) -> None:
        try:
            if self._head is None:
                self._read_head(data)
            else:
                self._read_body(data)
        except BadFraming as exc:
            self._refuse(GatewayError("bad_framing", str(exc)))
        except GatewayError as error:
            # Under a name of its own: mypyc gives one name one type.
            self._refuse(error)

    # -- reading a request -------------------------------------------------------------------------

    def _read_head(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        if buffer.startswith(b"\r\n"):
            # RFC 9112 2.2: an empty line before a request is to be ignored; all of them are, so that the
            # pieces they come in make no difference.
            buffer = _EMPTY_LINES.sub(b"", buffer, 1)
        end = buffer.find(b"\r\n\r\n")
        settings = self._gateway.settings
        limit = settings.max_header_bytes
        if end < 0 or end > limit:
            if not self._buffer and buffer:
                self.deadline = self._gateway.clock() + settings.header_timeout
            self._buffer = buffer
            if len(buffer) > limit:
                raise GatewayError("headers_too_large", f"the request's headers exceed {limit} bytes")
            return
        self._buffer = b""
        head = self._head = self._heads.parse(buffer[: end + 2])
        rest = buffer[end + 4 :]
        keys = self._gateway.api_keys
        if keys is not None and (head.path in GENERATION or head.path == MODELS):
            # Before anything of the body is kept.
            head = self._head = keys.admit(head, self._heads)
        if head.length > settings.buffer_limit:
            raise self._too_large()
        if head.length == len(rest):
            self._whole(rest, b"")
            return
        if head.length == 0:
            self._whole(b"", rest)
            return
        if head.length == CHUNKED:
            self._chunked = ChunkedBody(collect=True, refuse_tiny=True)
        else:
            self._chunked = SizedBody(head.length) if head.length > LARGE_BODY_BYTES else None
        if not rest and head.minor and head.read.get(b"expect", b"").lower() == b"100-continue":
            self.write(_CONTINUE)
        if rest:
            self._read_body(rest)
        else:
            self.deadline = self._gateway.clock() + settings.header_timeout

    def _read_body(self, data: bytes) -> None:
        head = cast(RequestHead, self._head)
        now, settings = self._gateway.clock(), self._gateway.settings
        self._body_until = self._body_until or now + settings.body_timeout
        self.deadline = min(now + settings.header_timeout, self._body_until)
        chunked = self._chunked
        if chunked is not None:
            chunked.feed_some(data, MAX_CHUNKS)
            if chunked.size > self._gateway.settings.buffer_limit:
                raise self._too_large()
            if chunked.done:
                body = chunked.data
                self._whole(body if len(body) > LARGE_BODY_BYTES else bytes(body), chunked.rest)
            elif (chunked.more or len(data) >= FULL_READ_BYTES) and self._transport is not None:
                self._transport.pause_reading()
                asyncio.get_running_loop().call_soon(self._read_on)
            return
        missing = head.length - self._body_bytes
        if len(data) < missing:
            self._body.append(data)
            self._body_bytes += len(data)
        elif self._body:
            self._body.append(data[:missing])
            self._whole(b"".join(self._body), data[missing:])
        else:
            self._whole(data[:missing] if len(data) > missing else data, data[missing:])

    def _read_on(self) -> None:
        chunked, transport = self._chunked, self._transport
        if transport is None or transport.is_closing():
            return
        transport.resume_reading()
        if chunked is not None and chunked.more and not self._closing:
            self._advance(b"")

    def _too_large(self) -> GatewayError:
        limit = self._gateway.settings.buffer_limit
        return GatewayError("request_too_large", f"the request's body exceeds {limit} bytes (--buffer-limit)")

    def _whole(self, body: bytes | bytearray, rest: bytes) -> None:
        """A request is there: answer it."""
        head = cast(RequestHead, self._head)
        self._head = self._chunked = None
        self._body, self._body_bytes, self._body_until = [], 0, 0.0
        self._buffer = rest
        path = head.path
        if head.generates:
            self._begin(head, body)
            return
        request_id = self._gateway.request_id(head.given_id)
        if self._server.admin is not None and path.startswith(PREFIX):
            self.deadline = 0.0
            self._exchange = self._server.admin.start(self, head, body, request_id)
            return
        self._server.answers.value += 1
        try:
            self.write(self._server.answer(head, path, request_id))
        except GatewayError as exc:
            self.write(
                error_response(exc, request_id, keep_alive=head.keep_alive, head_only=head.method == b"HEAD")
            )
        self.exchange_done(head.keep_alive)

    def _begin(self, head: RequestHead, body: bytes | bytearray) -> None:
        self.deadline = 0.0
        exchange = self._exchange = Exchange(self._gateway, self, head, body)
        if self._gateway.sample is not None:
            self._gateway.sample(exchange)
        exchange.start()

    def _refuse(self, error: GatewayError) -> None:
        """Answer bytes that are no request, and end the connection: what follows cannot be told apart."""
        self._server.refused.inc(error.code)
        self.write(error_response(error, self._gateway.request_id(None), keep_alive=False))
        self._closing, self._buffer, self._head = True, b"", None
        self._body.clear()
        self.deadline = self._gateway.clock() + LINGER_S
        transport = self._transport
        if transport is not None and not transport.is_closing():
            # Closing with bytes unread would reset the connection and take the answer with it; not under TLS,
            # whose end is a message, after which what comes is read and dropped.
            transport.write_eof() if transport.can_write_eof() else transport.close()

    # -- the exchange's side -----------------------------------------------------------------------

    @property
    def peer(self) -> str:
        """The client's address; of IPv6 the network, as one client has a whole one."""
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        if not name:
            return ""
        host = str(name[0])
        return socket.inet_pton(socket.AF_INET6, host.partition("%")[0])[:8].hex() if ":" in host else host

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def exchange_done(self, keep_alive: bool) -> None:
        self._exchange = None
        transport = self._transport
        if transport is None:
            return
        if not keep_alive or self._gateway.draining or transport.is_closing():
            self.end()
            return
        self.deadline = self._gateway.clock() + self._idle_timeout
        if self._writing_paused:
            self._held_back = True
        elif self._buffer:
            # In a later turn: a client that pipelines many requests must not nest them on the stack.
            self._held_back = True
            asyncio.get_running_loop().call_soon(self._next)

    def abort(self) -> None:
        self._closing = True
        relaying, self._exchange = self._exchange is not None, None
        if self._transport is None:
            return
        if relaying:
            # After a response that ends with the connection, a FIN would say that it is complete.
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._transport.abort()

    def _next(self) -> None:
        """Take up what came in while it had to wait; until the client reads, it gets no further answer."""
        if self._writing_paused or self._closing or not self._held_back:
            return
        self._held_back = False
        if self._buffer:
            buffer, self._buffer = self._buffer, b""
            self._advance(buffer)
        full = len(self._buffer) > MAX_PIPELINED_BYTES and (self._exchange is not None or self._held_back)
        if self._reading_paused and not full and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()

    def end(self) -> None:
        """Close once the client has what was written."""
        self._closing = True
        self._buffer = b""
        self.deadline = self._gateway.clock() + self._gateway.settings.idle_timeout
        if self._transport is not None:
            self._transport.close()

    @property
    def idle(self) -> bool:
        """Whether no request is being read or served."""
        return self._exchange is None and self._head is None and not self._buffer

    def expire(self) -> None:
        """The deadline of what is being read passed."""
        if self.idle or self._closing or self._held_back:
            self.abort()
        else:
            self._refuse(GatewayError("request_timeout", "the request did not arrive in time"))

    def drain(self) -> None:
        """End the connection if it waits for a request."""
        if self.idle:
            self.end()
