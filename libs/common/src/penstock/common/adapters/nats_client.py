"""One connection to one NATS server, from connecting to discarding: an asyncio protocol without tasks.

Publishing is a plain call, messages of one loop turn leave in one write, and handlers are called once the
bytes at hand have been cut into messages. It never reconnects: whoever holds it makes another.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import msgspec
import nkeys

from penstock.common.adapters.nats_wire import Message, Parser, WireError, encode_publish
from penstock.common.settings import BusSettings

log = logging.getLogger(__name__)

DEFAULT_PORT = 4222
# A server that reads this slowly is behind by seconds; callers stop sending at their own, lower bounds.
READ_LIMIT_BYTES = 256 * 1024
# What handlers have said is sent once it is this much, half of what 64 placements take: who asked first in
# a burst need not wait until all have been served.
SAID_BYTES = 2048


class ConnectError(Exception):
    """The server could not be connected to, or refused."""


class ServerInfo(msgspec.Struct):
    """What the server says of itself first (INFO)."""

    max_payload: int = 1024 * 1024
    tls_required: bool = False
    auth_required: bool = False
    nonce: str = ""
    headers: bool = False


class Interest:
    """One subscription on one connection; holds at most `limit` messages that are not handled yet."""

    __slots__ = ("client", "dropped", "handle", "limit", "number", "pending")

    def __init__(
        self,
        client: NatsClient,
        number: int,
        handle: Callable[[Message], None],
        limit: int,
        dropped: Callable[[], None],
    ) -> None:
        self.client, self.number, self.handle, self.limit, self.dropped = (
            client,
            number,
            handle,
            limit,
            dropped,
        )
        self.pending = 0

    def end(self) -> None:
        """Take nothing more; what has come is still handled."""
        self.client.unsubscribe(self)


class NatsClient(asyncio.Protocol):
    """Use `connect`, then the rest until `closed` is set."""

    def __init__(self, refused: Callable[[str], None]) -> None:
        """`refused` is told what the server does not permit."""
        self._refused = refused
        self.closed = asyncio.Event()
        self.cause = ""
        self._transport: asyncio.Transport | None = None
        self._parser = Parser(self._on_message, self._on_line)
        self._info: asyncio.Future[ServerInfo] = asyncio.get_running_loop().create_future()
        self._max_payload = ServerInfo().max_payload
        self._numbers = itertools.count(1)
        self._interests: dict[int, Interest] = {}
        self._arrived: deque[tuple[Interest, Message]] = deque()
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._pongs: deque[asyncio.Future[None]] = deque()

    # -- for its owner -----------------------------------------------------------------------------

    async def connect(self, settings: BusSettings, server: str, name: str) -> None:
        """Connect and prove that the server accepts us. Raises ConnectError, OSError, WireError."""
        parts = urlsplit(server if "://" in server else f"nats://{server}")
        loop = asyncio.get_running_loop()
        host = parts.hostname or "127.0.0.1"
        await loop.create_connection(lambda: self, host, parts.port or DEFAULT_PORT)
        info = await self._info
        if info.tls_required or settings.nats_tls_ca or settings.nats_tls_cert or parts.scheme == "tls":
            await self._start_tls(_tls_context(settings), host)
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
            **_credentials(
                settings, info.nonce, unquote(parts.username or ""), unquote(parts.password or "")
            ),
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
    ) -> Interest:
        """Call `handle` for every message, `dropped` for each over `limit`."""
        interest = Interest(self, next(self._numbers), handle, limit, dropped)
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
        pong: asyncio.Future[None] = asyncio.get_running_loop().create_future()
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
        arrived = self._arrived
        while arrived:
            interest, message = arrived.popleft()
            interest.pending -= 1
            try:
                interest.handle(message)
            except Exception:
                log.exception("a handler of the bus failed")
            if self._unsent_bytes >= SAID_BYTES:
                self.flush()
        self.flush()

    def _write(self, data: bytes) -> None:
        self._unsent.append(data)
        self._unsent_bytes += len(data)
        if len(self._unsent) == 1:
            asyncio.get_running_loop().call_soon(self.flush)

    async def _start_tls(self, context: ssl.SSLContext, host: str) -> None:
        transport = self._transport
        if transport is None:
            raise ConnectError(self.cause)
        secured = await asyncio.get_running_loop().start_tls(transport, self, context, server_hostname=host)
        self._transport = cast(asyncio.Transport, secured)


def _tls_context(settings: BusSettings) -> ssl.SSLContext:
    ca = settings.nats_tls_ca
    context = ssl.create_default_context(cafile=str(ca) if ca else None)
    if settings.nats_tls_cert:
        context.load_cert_chain(str(settings.nats_tls_cert), str(settings.nats_tls_key))
    return context


def _credentials(settings: BusSettings, nonce: str, user: str, password: str) -> dict[str, str]:
    if settings.nats_creds:
        return _signed(settings.nats_creds.read_text(encoding="utf-8"), nonce)
    if settings.nats_user:
        return {"user": settings.nats_user, "pass": settings.nats_password.get_secret_value()}
    if user and not password:
        return {"auth_token": user}
    return {"user": user, "pass": password} if user else {}


def _signed(credentials: str, nonce: str) -> dict[str, str]:
    """The file holds a user's JWT and the seed that signs the server's nonce, each between dashed lines."""
    lines = [line.strip() for line in credentials.splitlines()]
    content = [line for line in lines if line and not line.startswith(("-", "*", "NKEYs", "NEVER"))]
    jwt = next((line for line in content if line.count(".") == 2), "")
    seed = next((line for line in content if line.startswith("SU")), "")
    if not jwt or not seed:
        raise ConnectError("--nats-creds: the file holds no user JWT with its seed")
    signature = nkeys.from_seed(seed.encode()).sign(nonce.encode())
    return {"jwt": jwt, "sig": base64.urlsafe_b64encode(signature).rstrip(b"=").decode()}
