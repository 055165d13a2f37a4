"""The public listener: HTTP/1.1 on asyncio protocols, one exchange at a time per connection."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from typing import cast

import msgspec

from penstock.common.telemetry import Metrics
from penstock.ingress.exchange import Exchange, error_response
from penstock.ingress.failures import GatewayError
from penstock.ingress.gateway import Gateway
from penstock.ingress.http_wire import CHUNKED, BadFraming, ChunkedBody, RequestHead, parse_request
from penstock.ingress.openai import GENERATION_PATHS, MULTIPART_PATHS

BACKLOG = 1024
# Bytes of further requests that a connection may send while one is served; then it is not read.
MAX_PIPELINED_BYTES = 64 * 1024
# Response bytes that may wait for a slow client before its upstream is paused.
WRITE_HIGH_WATER = 64 * 1024
# What a refused client may still send is read and dropped for this long.
LINGER_S = 2.0
FLUSH_CHECK_S = 0.05
# Makes the kernel end a connection with a reset instead of a FIN.
_RESET = struct.pack("ii", 1, 0)
_GENERATION = frozenset(GENERATION_PATHS) | MULTIPART_PATHS
_INFO = frozenset({b"/v1/models", b"/health", b"/healthz", b"/readyz"})
_EMPTY_LINES = re.compile(rb"\A(?:\r\n)+")
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class ClientConnection(asyncio.Protocol):
    """One client. Reads a request whole, hands it to an Exchange, writes what that sends."""

    __slots__ = (
        "_body",
        "_body_bytes",
        "_buffer",
        "_chunked",
        "_closing",
        "_exchange",
        "_gateway",
        "_head",
        "_held_back",
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
        self._chunked: ChunkedBody | None = None
        self._body: list[bytes] = []
        self._body_bytes = 0
        self._exchange: Exchange | None = None
        self._reading_paused = self._writing_paused = self._closing = False
        # The next request waits for its turn: until the loop comes round, or the client reads.
        self._held_back = False
        self.deadline = gateway.clock() + gateway.settings.header_timeout

    # -- the socket's side -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER)
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.connections.discard(self)
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
        self._advance(data)

    def _advance(self, data: bytes) -> None:
        try:
            if self._head is None:
                self._read_head(data)
            else:
                self._read_body(data)
        except BadFraming as exc:
            self._refuse(GatewayError("bad_framing", str(exc)))
        except GatewayError as exc:
            self._refuse(exc)

    # -- reading a request -------------------------------------------------------------------------

    def _read_head(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        if buffer.startswith(b"\r\n"):
            # RFC 9112 2.2: an empty line before a request is to be ignored; all of them are, so that the
            # pieces they come in make no difference.
            buffer = _EMPTY_LINES.sub(b"", buffer, 1)
        if not self._buffer and buffer:
            self.deadline = self._gateway.clock() + self._gateway.settings.header_timeout
        end = buffer.find(b"\r\n\r\n")
        limit = self._gateway.settings.max_header_bytes
        if end < 0 or end > limit:
            self._buffer = buffer
            if len(buffer) > limit:
                raise GatewayError("headers_too_large", f"the request's headers exceed {limit} bytes")
            return
        self._buffer = b""
        head = self._head = parse_request(buffer[: end + 2])
        rest = buffer[end + 4 :]
        if head.length == 0:
            self._whole(b"", rest)
            return
        if head.length > self._gateway.settings.buffer_limit:
            raise self._too_large()
        self._chunked = ChunkedBody(collect=True, refuse_tiny=True) if head.length == CHUNKED else None
        if not rest and head.minor and head.read.get(b"expect", b"").lower() == b"100-continue":
            self.write(_CONTINUE)
        if rest:
            self._read_body(rest)

    def _read_body(self, data: bytes) -> None:
        head = cast(RequestHead, self._head)
        self.deadline = self._gateway.clock() + self._gateway.settings.header_timeout
        chunked = self._chunked
        if chunked is not None:
            chunked.feed(data)
            if chunked.size > self._gateway.settings.buffer_limit:
                raise self._too_large()
            if chunked.done:
                self._whole(bytes(chunked.data), chunked.rest)
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

    def _too_large(self) -> GatewayError:
        limit = self._gateway.settings.buffer_limit
        return GatewayError("request_too_large", f"the request's body exceeds {limit} bytes (--buffer-limit)")

    def _whole(self, body: bytes, rest: bytes) -> None:
        """A request is there: answer it."""
        head = cast(RequestHead, self._head)
        self._head = self._chunked = None
        self._body, self._body_bytes = [], 0
        self._buffer = rest
        path = head.path
        if path in _GENERATION and head.method == b"POST":
            self.deadline = 0.0
            self._exchange = Exchange(self._gateway, self, head, body)
            self._exchange.start()
            return
        request_id = self._gateway.request_id(head.header(b"x-request-id"))
        self._server.answers.value += 1
        try:
            self.write(self._server.answer(head, path, request_id))
        except GatewayError as exc:
            self.write(
                error_response(exc, request_id, keep_alive=head.keep_alive, head_only=head.method == b"HEAD")
            )
        self.exchange_done(head.keep_alive)

    def _refuse(self, error: GatewayError) -> None:
        """Answer bytes that are no request, and end the connection: what follows cannot be told apart."""
        self._server.refused.inc(error.code)
        self.write(error_response(error, self._gateway.request_id(""), keep_alive=False))
        self._closing, self._buffer, self._head = True, b"", None
        self._body.clear()
        self.deadline = self._gateway.clock() + LINGER_S
        if self._transport is not None and not self._transport.is_closing():
            # Closing with bytes unread would reset the connection and take the answer with it.
            self._transport.write_eof()

    # -- the exchange's side -----------------------------------------------------------------------

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
        self.deadline = self._gateway.clock() + self._gateway.settings.idle_timeout
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


class HttpServer:
    """The listener of one process and the requests that need no instance."""

    def __init__(self, gateway: Gateway, metrics: Metrics) -> None:
        self._gateway = gateway
        self._server: asyncio.Server | None = None
        self.connections: set[ClientConnection] = set()
        self.refused = metrics.counter(
            "penstock_ingress_refused_total", "Bytes that were no request, by error code", "code"
        )
        self.answers = metrics.counter(
            "penstock_ingress_answers_total", "Requests that the ingress answered by itself"
        ).labels()
        metrics.gauge("penstock_ingress_connections", "Client connections", lambda: len(self.connections))

    async def listen(self, sock: socket.socket) -> None:
        """Accept on a bound socket."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: ClientConnection(self, self._gateway), sock=sock, backlog=BACKLOG
        )

    def stop_accepting(self) -> None:
        """Take no new connection, and end those that wait for a request."""
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.drain()

    async def close(self, flush_s: float) -> None:
        """End every connection, each as soon as its client has what was written, all after `flush_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + flush_s
        for connection in list(self.connections):
            connection.end()
        while self.connections and loop.time() < deadline:  # noqa: ASYNC110  # they end in many places
            await asyncio.sleep(FLUSH_CHECK_S)
        for connection in list(self.connections):
            connection.abort()

    def sweep(self, now: float) -> None:
        """End connections whose time is over."""
        for connection in [c for c in self.connections if c.deadline and c.deadline < now]:
            connection.expire()

    def answer(self, head: RequestHead, path: bytes, request_id: str) -> bytes:
        """A response without an instance. Raises GatewayError."""
        known = path in _INFO or path in _GENERATION
        if not known:
            raise GatewayError("not_found", f"there is no {path.decode('ascii', 'replace')[:200]} here")
        if path in _GENERATION or head.method not in (b"GET", b"HEAD"):
            allowed = "POST" if path in _GENERATION else "GET"
            raise GatewayError(
                "method_not_allowed", f"{head.method.decode('ascii')[:40]} is not allowed here, use {allowed}"
            )
        status, content = 200, dict[str, object](status="ok")
        if path == b"/v1/models":
            content = self._models()
        elif path == b"/readyz" and (not self._gateway.table.synced or self._gateway.draining):
            status, content = 503, {"status": "not ready"}
        return _json_response(status, content, request_id, head)

    def _models(self) -> dict[str, object]:
        data = [
            {"id": model, "object": "model", "created": 0, "owned_by": owner or "penstock"}
            for model, owner in self._gateway.model_owners()
        ]
        return {"object": "list", "data": data}


def _json_response(status: int, content: object, request_id: str, head: RequestHead) -> bytes:
    body = msgspec.json.encode(content)
    close = b"" if head.keep_alive else b"connection: close\r\n"
    reason = b"OK" if status == 200 else b"Service Unavailable"
    response = (
        b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        b"x-request-id: %b\r\n%b\r\n"
    ) % (status, reason, len(body), request_id.encode(), close)
    return response if head.method == b"HEAD" else response + body
