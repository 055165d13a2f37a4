"""One connection to NATS that is always being kept: connect, prove alive, replace.

Each connection is a fresh nats-py client without its own reconnecting: that one waits for a frozen
server's socket to close and keeps messages for later, while here a lost connection fails what is
pending at once, so that callers degrade instead of waiting (DESIGN D5).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import nats.errors
import nats.micro
from nats.aio.client import Client
from nats.micro.service import ServiceConfig

from penstock.common.errors import BusTimeout, BusUnavailable
from penstock.common.settings import BusSettings
from penstock.common.telemetry import Metrics

log = logging.getLogger(__name__)

PING_EVERY_S = 1.0
PINGS_MISSED = 2
CONNECT_TIMEOUT_S = 2
RETRY_S = 0.1
MAX_PENDING_REQUESTS = 65_536
# Bytes that may wait to be sent while the server reads slowly; past it messages are dropped and counted.
MAX_UNSENT_BYTES = 8 * 1024 * 1024

Headers = Mapping[str, str]


class RawMessage(Protocol):
    """What nats-py hands over."""

    subject: str
    reply: str
    data: bytes
    headers: dict[str, str] | None


@dataclass
class RawSubscription:
    """Interest that is renewed on every connection."""

    connection: NatsConnection
    subject: str
    queue: str
    handle: Callable[[RawMessage], None]
    pending_messages: int
    current: Any = None

    async def start(self, client: Client) -> None:
        """Subscribe on `client`."""

        async def deliver(message: RawMessage) -> None:
            self.handle(message)

        self.current = await client.subscribe(
            self.subject, queue=self.queue, cb=deliver, pending_msgs_limit=self.pending_messages
        )

    async def close(self) -> None:
        """End the interest."""
        self.connection.subscriptions.discard(self)
        if self.current is not None and self.connection.connected:
            try:
                await self.current.unsubscribe()
            except (nats.errors.Error, OSError) as exc:
                log.debug("unsubscribe of %s failed: %s", self.subject, exc)

    __hash__ = object.__hash__


class NatsConnection:
    """Publish, request and subscribe in bytes, over whichever client is alive."""

    def __init__(self, settings: BusSettings, name: str, metrics: Metrics) -> None:
        self._settings, self._name = settings, name
        self._servers = itertools.cycle([url.strip() for url in settings.nats_url.split(",") if url.strip()])
        self._client: Client | None = None
        self._up = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._background: set[asyncio.Task[None]] = set()
        self._outbox: deque[tuple[str, bytes, str, dict[str, str] | None]] = deque()
        self._outbox_bytes = 0
        self._outbox_filled = asyncio.Event()
        self._inbox = f"_INBOX.{name}.{random.getrandbits(64):016x}"
        self._answers: dict[str, asyncio.Future[RawMessage]] = {}
        self._answer_ids = itertools.count(1)
        self._registrations: list[ServiceConfig] = []
        self._last_trouble = ""
        self.subscriptions: set[RawSubscription] = set()
        self.listeners: list[Callable[[bool], None]] = []
        self.dropped = metrics.counter(
            "penstock_bus_dropped_total", "Bus messages dropped", "subject", "reason"
        )
        self._reconnects = metrics.counter("penstock_bus_connections_total", "Connections made to the bus")
        metrics.gauge("penstock_bus_connected", "1 while the bus answers", lambda: float(self.connected))

    @property
    def connected(self) -> bool:
        """Whether the server answered the last ping."""
        return self._client is not None

    async def start(self) -> None:
        """Begin to connect; returns at once."""
        mux = RawSubscription(self, f"{self._inbox}.*", "", self._on_answer, MAX_PENDING_REQUESTS)
        self.subscriptions.add(mux)
        self._supervisor = asyncio.create_task(self._supervise(), name="nats-connection")

    async def wait_connected(self) -> None:
        """Return once there is a connection."""
        await self._up.wait()

    async def close(self) -> None:
        """Send what waits, then leave; a server that does not answer is given two seconds."""
        client = self._client
        if client is not None:
            await _bounded(self._flush_outbox(client), 1)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if client is not None:
            self._client = None
            await self._discard(client)
        await asyncio.gather(*self._background, return_exceptions=True)

    def send(self, subject: str, payload: bytes, reply: str = "", headers: Headers | None = None) -> str:
        """Queue a message for the socket. Returns "" or the reason why it was dropped."""
        if self._client is None:
            return "disconnected"
        if self._outbox_bytes + self._client.pending_data_size + len(payload) > MAX_UNSENT_BYTES:
            return "send buffer full"
        self._outbox.append((subject, payload, reply, dict(headers) if headers else None))
        self._outbox_bytes += len(payload)
        self._outbox_filled.set()
        return ""

    def ask(self, subject: str, payload: bytes, headers: Headers | None = None) -> asyncio.Future[RawMessage]:
        """Send with a reply address. The future fails with BusUnavailable when nobody can answer; who
        stops waiting cancels it."""
        future: asyncio.Future[RawMessage] = asyncio.get_running_loop().create_future()
        if len(self._answers) >= MAX_PENDING_REQUESTS:
            future.set_exception(BusUnavailable(subject, "too many requests without an answer"))
            return future
        token = f"{next(self._answer_ids):x}"
        trouble = self.send(subject, payload, f"{self._inbox}.{token}", headers)
        if trouble:
            future.set_exception(BusUnavailable(subject, trouble))
            return future
        self._answers[token] = future
        future.add_done_callback(lambda _: self._answers.pop(token, None))
        return future

    async def request(
        self, subject: str, payload: bytes, deadline_s: float, headers: Headers | None = None
    ) -> RawMessage:
        """`ask`, with a deadline. Raises BusUnavailable, BusTimeout."""
        future = self.ask(subject, payload, headers)
        try:
            async with asyncio.timeout(deadline_s):
                return await future
        except TimeoutError:
            raise BusTimeout(subject, deadline_s) from None

    async def subscribe(
        self, subject: str, handle: Callable[[RawMessage], None], *, queue: str = "", pending_messages: int
    ) -> RawSubscription:
        """Deliver to `handle` on this and every later connection."""
        subscription = RawSubscription(self, subject, queue, handle, pending_messages)
        self.subscriptions.add(subscription)
        if self._client is not None:
            await subscription.start(self._client)
            await self._client.flush()
        return subscription

    async def register(self, config: ServiceConfig) -> None:
        """Appear as a NATS micro-service on this and every later connection."""
        self._registrations.append(config)
        if self._client is not None:
            await nats.micro.add_service(self._client, config)

    async def _supervise(self) -> None:
        while True:
            client = await self._connect()
            if client is None:
                await asyncio.sleep(RETRY_S * (1 + random.random()))
                continue
            writer = asyncio.create_task(self._write(client), name="nats-writer")
            try:
                cause = await self._until_lost(client, writer)
            finally:
                writer.cancel()
            self._trouble(f"connection to the bus lost: {cause}")
            self._disconnected()
            self._spawn(self._discard(client), "nats-discard")

    async def _connect(self) -> Client | None:
        client, server = Client(), next(self._servers)
        self._lost = asyncio.Event()
        try:
            await client.connect(**self._options(server))
            for subscription in list(self.subscriptions):
                await subscription.start(client)
            for config in self._registrations:
                await nats.micro.add_service(client, config)
            await client.flush(timeout=CONNECT_TIMEOUT_S)
        except (OSError, nats.errors.Error, TimeoutError, ssl.SSLError) as exc:
            self._trouble(f"bus at {_without_secret(server)}: {exc or type(exc).__name__}")
            self._spawn(self._discard(client), "nats-discard")
            return None
        self._client = client
        self._reconnects.inc()
        if self._last_trouble:
            log.warning("bus connected: %s", _without_secret(server))
        self._last_trouble = ""
        self._up.set()
        for listener in list(self.listeners):
            listener(True)
        return client

    def _options(self, server: str) -> dict[str, Any]:
        s = self._settings

        async def on_closed() -> None:
            self._lost.set()

        async def on_error(exc: Exception) -> None:
            if isinstance(exc, nats.errors.SlowConsumerError):
                self.dropped.inc(exc.subject.rsplit(".", 1)[0], "pending limit")
            else:
                log.debug("nats client: %r", exc)

        options: dict[str, Any] = {
            "servers": [server],
            "name": self._name,
            "allow_reconnect": False,
            "connect_timeout": CONNECT_TIMEOUT_S,
            "disconnected_cb": on_closed,
            "closed_cb": on_closed,
            "error_cb": on_error,
            "ping_interval": 3600,
        }
        if s.nats_user:
            options |= {"user": s.nats_user, "password": s.nats_password.get_secret_value()}
        if s.nats_creds:
            options["user_credentials"] = str(s.nats_creds)
        if s.nats_tls_ca or s.nats_tls_cert:
            context = ssl.create_default_context(cafile=str(s.nats_tls_ca) if s.nats_tls_ca else None)
            if s.nats_tls_cert:
                context.load_cert_chain(str(s.nats_tls_cert), str(s.nats_tls_key))
            options["tls"] = context
        return options

    async def _until_lost(self, client: Client, writer: asyncio.Task[None]) -> str:
        missed = 0
        while missed < PINGS_MISSED:
            try:
                async with asyncio.timeout(PING_EVERY_S):
                    await self._lost.wait()
                return "closed by the server"
            except TimeoutError:
                pass
            if writer.done():
                return f"sending failed: {writer.exception()}"
            try:
                async with asyncio.timeout(PING_EVERY_S):
                    await client.flush()
                missed = 0
            except TimeoutError:
                missed += 1
            except (nats.errors.Error, OSError) as exc:
                return str(exc)
        return f"no answer to {PINGS_MISSED} pings"

    async def _write(self, client: Client) -> None:
        while True:
            await self._outbox_filled.wait()
            await self._flush_outbox(client)

    async def _flush_outbox(self, client: Client) -> None:
        self._outbox_filled.clear()
        while self._outbox:
            subject, payload, reply, headers = self._outbox.popleft()
            self._outbox_bytes -= len(payload)
            try:
                await client.publish(subject, payload, reply, headers)
            except (nats.errors.MaxPayloadError, nats.errors.BadSubjectError) as exc:
                log.error("message to %s (%d bytes) refused by the client: %s", subject, len(payload), exc)
                self.dropped.inc(subject.rsplit(".", 1)[0], "refused")

    def _on_answer(self, message: RawMessage) -> None:
        future = self._answers.get(message.subject.rsplit(".", 1)[1])
        if future is None or future.done():
            return
        if message.headers and message.headers.get("Status") == "503":
            future.set_exception(BusUnavailable(message.subject, "nobody serves it"))
        else:
            future.set_result(message)

    def _disconnected(self) -> None:
        self._client = None
        self._up.clear()
        self._outbox.clear()
        self._outbox_bytes = 0
        for future in list(self._answers.values()):
            if not future.done():
                future.set_exception(BusUnavailable("bus", "connection lost"))
        for listener in list(self.listeners):
            listener(False)

    def _trouble(self, text: str) -> None:
        if text != self._last_trouble:
            log.warning("%s", text)
        self._last_trouble = text

    async def _discard(self, client: Client) -> None:
        """Close a client for good; one whose server hangs is cut off, or its socket would stay open."""
        transport = getattr(
            getattr(getattr(client, "_transport", None), "_io_writer", None), "transport", None
        )
        await _bounded(client.close(), 1)
        if transport is not None:
            transport.abort()

    def _spawn(self, work: Any, name: str) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _bounded(work: Awaitable[None], seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await work
    except (TimeoutError, OSError, nats.errors.Error, AttributeError, RuntimeError) as exc:
        log.debug("closing a bus client: %r", exc)


def _without_secret(url: str) -> str:
    scheme, _, rest = url.rpartition("://")
    return f"{scheme or 'nats'}://{rest.rpartition('@')[2]}"
