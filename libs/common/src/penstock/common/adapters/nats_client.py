"""One connection to one NATS server, from connecting to discarding: an asyncio protocol without tasks.

Publishing is a plain call, messages of one loop turn leave in one write, and handlers are called once the
bytes at hand have been cut into messages. It never reconnects: whoever holds it makes another.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Final, cast
from urllib.parse import unquote, urlsplit

import msgspec

from penstock.common.adapters.nats_login import ConnectError, ServerInfo, credentials, tls_context
from penstock.common.adapters.nats_wire import Message, Parser, WireError, encode_publish
from penstock.common.settings import BusSettings

log = logging.getLogger(__name__)

DEFAULT_PORT: Final = 4222
# A server that reads this slowly is behind by seconds; callers stop sending at their own, lower bounds.
READ_LIMIT_BYTES: Final = 256 * 1024
# What handlers have said is sent once it is this much, half of what 64 placements take: who asked first in
# a burst need not wait until all have been served.
SAID_BYTES: Final = 2048


class Interest:
    """One subscription on one connection; holds at most `limit` messages that are not handled yet."""

    __slots__ = ("client", "dropped", "handle", "limit", "number", "pending", "then")

    def __init__(
        self,
        client: NatsClient,
        number: int,
        handle: Callable[[Message], None],
        limit: int,
        dropped: Callable[[], None],
        then: Callable[[], None] | None,
    ) -> None:
        self.client, self.number, self.handle, self.limit, self.dropped = (
            client,
            number,
            handle,
            limit,
            dropped,
        )
        self.pending, self.then = 0, then

    def end(self) -> None:
        """Take nothing more; what has come is still handled."""
        self.client.unsubscribe(self)


class NatsClient:
    """Use `connect`, then the rest until `closed` is set. It is an `asyncio.Protocol` by its methods only: a
    compiled class has slots if its bases are compiled too (decision 0032)."""

    def __init__(self, refused: Callable[[str], None]) -> None:
        """`refused` is told what the server does not permit."""
        self._refused = refused
        self.closed = asyncio.Event()
        self.cause = ""
        self._transport: asyncio.Transport | None = None
        self._parser = Parser(self._on_message, self._on_line)
        self._loop = asyncio.get_running_loop()
        self._info: asyncio.Future[ServerInfo] = self._loop.create_future()
        self._max_payload = ServerInfo().max_payload
        self._last_number = 0
        self._interests: dict[int, Interest] = {}
        self._arrived: deque[tuple[Interest, Message]] = deque()
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._pongs: deque[asyncio.Future[None]] = deque()
        # Handlers are being called: what they say is sent after them. And what they leave for then.
        self._handling = False
        self._then: list[Callable[[], None]] = []

    # -- for its owner -----------------------------------------------------------------------------

    async def connect(self, settings: BusSettings, server: str, name: str) -> None:
        """Connect and prove that the server accepts us. Raises ConnectError, OSError, WireError."""
        parts = urlsplit(server if "://" in server else f"nats://{server}")
        host = parts.hostname or "127.0.0.1"
        protocol = cast(asyncio.Protocol, self)
        await self._loop.create_connection(lambda: protocol, host, parts.port or DEFAULT_PORT)
        info = await self._info
        if info.tls_required or settings.nats_tls_ca or settings.nats_tls_cert or parts.scheme == "tls":
            await self._start_tls(tls_context(settings), host)
        self._max_payload = info.max_payload
        options: dict[str, Any] = {
            "verbose": False,
            "pedantic": False,
            "lang": "python",
            "version": "penstock",
            "name": name,
            "protocol": 1,
            "headers": True,
            "no_responders": True,
            "echo": True,
            **credentials(settings, info.nonce, unquote(parts.username or ""), unquote(parts.password or "")),
        }
        self._write(b"CONNECT " + msgspec.json.encode(options) + b"\r\n")
        try:
            await self.ping()
        except ConnectionError as exc:
            raise ConnectError(self.cause or str(exc)) from exc

    @property
    def unsent_bytes(self) -> int:
        """Bytes that the server has not taken yet."""
        buffered = self._transport.get_write_buffer_size() if self._transport is not None else 0
        return self._unsent_bytes + buffered

    def publish(
        self, subject: str, payload: bytes, reply: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        """Send with the other messages of this turn.

        Raises:
            ValueError: over the server's payload limit, or not a subject.
        """
        if len(payload) > self._max_payload:
            raise ValueError(f"{len(payload)} bytes are over the server's limit of {self._max_payload}")
        self._write(encode_publish(subject, payload, reply, headers))

    def subscribe(
        self,
        subject: str,
        queue: str,
        handle: Callable[[Message], None],
        limit: int,
        dropped: Callable[[], None],
        then: Callable[[], None] | None = None,
    ) -> Interest:
        """Call `handle` for every message, `dropped` for each over `limit`; `then` when what was said to some
        is on its way."""
        self._last_number += 1
        interest = Interest(self, self._last_number, handle, limit, dropped, then)
        self._interests[interest.number] = interest
        self._write(f"SUB {subject} {queue + ' ' if queue else ''}{interest.number}\r\n".encode())
        return interest

    def unsubscribe(self, interest: Interest) -> None:
        """End an interest; the server's queue for it is empty once a ping is answered."""
        if interest.number in self._interests:
            self._write(f"UNSUB {interest.number}\r\n".encode())

    def forget(self, interest: Interest) -> None:
        """Hear no more of an interest."""
        self._interests.pop(interest.number, None)

    async def ping(self) -> None:
        """Return once the server has taken in all that was sent before. Raises ConnectionError."""
        if self._transport is None:
            raise ConnectionError(self.cause or "not connected")
        pong: asyncio.Future[None] = self._loop.create_future()
        self._pongs.append(pong)
        self._write(b"PING\r\n")
        await pong

    def flush(self) -> None:
        """Hand everything to the socket."""
        if self._unsent and self._transport is not None:
            data = b"".join(self._unsent)
            self._unsent.clear()
            self._unsent_bytes = 0
            self._transport.write(data)

    def discard(self) -> None:
        """End the connection at once; a server that hangs cannot hold it."""
        if self._transport is not None:
            self._transport.abort()

    # -- the socket's side -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self.cause = self.cause or (str(exc) if exc else "closed by the server")
        self.closed.set()
        self._unsent.clear()
        self._unsent_bytes = 0
        lost = ConnectionError(self.cause)
        waiting: list[asyncio.Future[Any]] = [*self._pongs, self._info]
        self._pongs.clear()
        for future in waiting:
            if not future.done():
                future.set_exception(lost)
        if self._info.done() and not self._info.cancelled():
            self._info.exception()  # a connection nobody asks any more is no unretrieved error

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
        except WireError as exc:
            self.cause = str(exc)
            self.discard()
        if self._arrived:
            self._handle()

    def eof_received(self) -> None:
        """The server closes: so does the transport."""

    def pause_writing(self) -> None:
        """Who sends asks `unsent_bytes`."""

    def resume_writing(self) -> None:
        """See `pause_writing`."""

    def _on_line(self, name: bytes, rest: bytes) -> None:
        if name == b"PING":
            self._write(b"PONG\r\n")
        elif name == b"PONG":
            if self._pongs:
                pong = self._pongs.popleft()
                if not pong.done():
                    pong.set_result(None)
        elif name == b"INFO":
            self._on_info(rest)
        elif name == b"-ERR":
            self._on_error(rest.decode("utf-8", "replace").strip(" '"))
        elif name != b"+OK":
            raise WireError(f"not a NATS server: {name[:40]!r}")

    def _on_info(self, rest: bytes) -> None:
        try:
            info = msgspec.json.decode(rest, type=ServerInfo)
        except msgspec.MsgspecError as exc:
            raise WireError(f"INFO cannot be read: {exc}") from exc
        self._max_payload = info.max_payload
        if not self._info.done():
            self._info.set_result(info)

    def _on_error(self, text: str) -> None:
        # The server closes after all but these; they cost what was asked for, not the connection.
        if text.startswith("Permissions Violation"):
            self._refused(text)
        else:
            log.debug("the bus server says: %s", text)
        self.cause = text

    def _on_message(self, number: int, message: Message) -> None:
        interest = self._interests.get(number)
        if interest is None:
            return
        if interest.pending >= interest.limit:
            interest.dropped()
            return
        interest.pending += 1
        self._arrived.append((interest, message))

    def _handle(self) -> None:
        """Call the handlers of what came in one read, then send what they said without waiting a turn."""
        arrived, after = self._arrived, self._then
        self._handling = True
        try:
            while arrived:
                interest, message = arrived.popleft()
                interest.pending -= 1
                try:
                    interest.handle(message)
                except Exception:
                    log.exception("a handler of the bus failed")
                if interest.then is not None and interest.then not in after:
                    after.append(interest.then)
                if self._unsent_bytes >= SAID_BYTES:
                    self.flush()
            self.flush()
            while after:
                try:
                    after.pop(0)()
                except Exception:
                    log.exception("what follows a handler of the bus failed")
            self.flush()
        finally:
            self._handling = False

    def _write(self, data: bytes) -> None:
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if len(self._unsent) == 1 and not self._handling:
            self._loop.call_soon(self.flush)

    async def _start_tls(self, context: ssl.SSLContext, host: str) -> None:
        transport = self._transport
        if transport is None:
            raise ConnectError(self.cause)
        protocol = cast(asyncio.Protocol, self)
        secured = await self._loop.start_tls(transport, protocol, context, server_hostname=host)
        self._transport = cast(asyncio.Transport, secured)
