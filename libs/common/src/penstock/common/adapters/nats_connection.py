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
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import nats.errors
import nats.micro
from nats.aio.client import Client
from nats.micro.service import ServiceConfig

from penstock.common.adapters.nats_link import CONNECT_TIMEOUT_S, Link, bounded
from penstock.common.errors import BusTimeout, BusUnavailable
from penstock.common.settings import BusSettings
from penstock.common.telemetry import Metrics

log = logging.getLogger(__name__)

PING_EVERY_S = 1.0
PINGS_MISSED = 2
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
    """Interest that is renewed on every connection; drops are counted under `label`."""

    connection: NatsConnection
    subject: str
    queue: str
    handle: Callable[[RawMessage], None]
    pending_messages: int
    label: str
    current: Any = None

    async def start(self, client: Client) -> None:
        """Subscribe on `client`, unless the interest has ended."""
        if self not in self.connection.subscriptions:
            return

        async def deliver(message: RawMessage) -> None:
            self.handle(message)

        self.current = await client.subscribe(
            self.subject, queue=self.queue, cb=deliver, pending_msgs_limit=self.pending_messages
        )

    async def close(self) -> None:
        """End the interest; what was delivered is handled first, within a second."""
        self.connection.subscriptions.discard(self)
        if self.current is not None:
            await bounded(self.current.drain(), 1)

    __hash__ = object.__hash__


class NatsConnection:
    """Publish, request and subscribe in bytes, over whichever client is alive."""

    def __init__(self, settings: BusSettings, name: str, metrics: Metrics) -> None:
        self._settings, self._name = settings, name
        self._servers = itertools.cycle([url.strip() for url in settings.nats_url.split(",") if url.strip()])
        self._link: Link | None = None
        self._up = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._discarding: set[asyncio.Task[None]] = set()
        self._outbox: deque[tuple[str, bytes, str, dict[str, str] | None]] = deque()
        self._outbox_bytes = 0
        self._outbox_filled = asyncio.Event()
        self._inbox = f"_INBOX.{name}.{random.getrandbits(64):016x}"
        self._answers: dict[str, tuple[asyncio.Future[RawMessage], str]] = {}
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
        """Whether there is a connection whose server answers pings."""
        return self._link is not None

    async def start(self) -> None:
        """Begin to connect; returns at once."""
        mux = RawSubscription(self, f"{self._inbox}.*", "", self._on_answer, MAX_PENDING_REQUESTS, "answers")
        self.subscriptions.add(mux)
        self._supervisor = asyncio.create_task(self._supervise(), name="nats-connection")

    async def wait_connected(self) -> None:
        """Return once there is a connection."""
        await self._up.wait()

    async def close(self) -> None:
        """Send what waits, then leave; a server that does not answer is given two seconds."""
        link = self._link
        if link is not None:
            await bounded(self._flush_outbox(link.client), 1)
        while self._supervisor is not None and not self._supervisor.done():
            # Once is not enough: in Python 3.11 asyncio.wait_for, which nats-py connects with, can lose it.
            self._supervisor.cancel()
            await asyncio.wait({self._supervisor}, timeout=0.02)
        if self._link is not None:
            self._lose(self._link)
        await asyncio.gather(*self._discarding)

    def send(self, subject: str, payload: bytes, reply: str = "", headers: Headers | None = None) -> str:
        """Queue a message for the socket. Returns "" or the reason why it was dropped."""
        if self._link is None:
            return "disconnected"
        if self._outbox_bytes + self._link.client.pending_data_size + len(payload) > MAX_UNSENT_BYTES:
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
        self._answers[token] = future, subject
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
        self,
        subject: str,
        handle: Callable[[RawMessage], None],
        *,
        queue: str = "",
        pending_messages: int,
        label: str,
    ) -> RawSubscription:
        """Deliver to `handle` on this and every later connection."""
        subscription = RawSubscription(self, subject, queue, handle, pending_messages, label)
        self.subscriptions.add(subscription)
        try:
            await self._at_once(subscription.start)
        except asyncio.CancelledError:
            await subscription.close()
            raise
        return subscription

    async def register(self, config: ServiceConfig) -> None:
        """Appear as a NATS micro-service on this and every later connection."""
        self._registrations.append(config)

        async def start(client: Client) -> None:
            await nats.micro.add_service(client, config)

        await self._at_once(start)

    async def _at_once(self, start: Callable[[Client], Coroutine[Any, Any, None]]) -> None:
        """Start an interest on the connection there is; where that fails, the next connection will."""
        link = self._link
        if link is None:
            return
        try:
            await start(link.client)
            await asyncio.wait({link.ping()})  # ends with the link at the latest
        except (OSError, nats.errors.Error) as exc:
            log.debug("interest waits for the next connection: %r", exc)

    async def _supervise(self) -> None:
        while True:
            link = await self._connect(next(self._servers))
            if link is None:
                await asyncio.sleep(RETRY_S * (1 + random.random()))
                continue
            writer = asyncio.create_task(self._write(link.client), name="nats-writer")
            try:
                cause = await self._until_lost(link, writer)
            finally:
                writer.cancel()
            self._trouble(f"connection to the bus lost: {cause}")
            self._lose(link)

    async def _connect(self, server: str) -> Link | None:
        link = Link()
        try:
            async with asyncio.timeout(2 * CONNECT_TIMEOUT_S):
                await link.connect(self._settings, server, self._name, self._on_slow)
                await self._renew(link)
        except asyncio.CancelledError:
            self._discard(link)
            raise
        except Exception as exc:  # noqa: BLE001  # what a peer that is no NATS server makes nats-py raise is open
            self._trouble(f"bus at {_without_secret(server)}: {exc or type(exc).__name__}")
            self._discard(link)
            return None
        self._link = link
        self._reconnects.inc()
        if self._last_trouble:
            log.warning("bus connected: %s", _without_secret(server))
        self._last_trouble = ""
        self._up.set()
        for listener in list(self.listeners):
            listener(True)
        return link

    async def _renew(self, link: Link) -> None:
        """Start every interest, those included that come up meanwhile."""
        renewed: set[RawSubscription] = set()
        registered = 0
        while (fresh := self.subscriptions - renewed) or registered < len(self._registrations):
            for subscription in fresh:
                await subscription.start(link.client)
            for config in self._registrations[registered:]:
                await nats.micro.add_service(link.client, config)
                registered += 1
            renewed |= fresh
            await link.ping()

    def _on_slow(self, exc: nats.errors.SlowConsumerError) -> None:
        label = next((s.label for s in self.subscriptions if s.current is exc.sub), "unknown")
        self.dropped.inc(label, "pending limit")

    async def _until_lost(self, link: Link, writer: asyncio.Task[None]) -> str:
        closed = asyncio.create_task(link.closed.wait(), name="nats-closed")
        missed = 0
        try:
            while missed < PINGS_MISSED:
                ends: set[asyncio.Task[Any]] = {closed, writer}
                await asyncio.wait(ends, timeout=PING_EVERY_S, return_when=asyncio.FIRST_COMPLETED)
                if closed.done() or link.client.is_closed:
                    return "closed by the server"
                if writer.done():
                    return f"sending failed: {writer.exception()}"
                missed = 0 if await link.answers(PING_EVERY_S) else missed + 1
        finally:
            closed.cancel()
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
        future, subject = self._answers.get(message.subject.rsplit(".", 1)[1], (None, ""))
        if future is None or future.done():
            return
        if message.headers and message.headers.get("Status") == "503":
            future.set_exception(BusUnavailable(subject, "nobody serves it"))
        else:
            future.set_result(message)

    def _lose(self, link: Link) -> None:
        self._link = None
        self._up.clear()
        self._outbox.clear()
        self._outbox_bytes = 0
        for future, subject in list(self._answers.values()):
            if not future.done():
                future.set_exception(BusUnavailable(subject, "connection lost"))
        for listener in list(self.listeners):
            listener(False)
        self._discard(link)

    def _discard(self, link: Link) -> None:
        task = asyncio.create_task(link.discard(), name="nats-discard")
        self._discarding.add(task)
        task.add_done_callback(self._discarding.discard)

    def _trouble(self, text: str) -> None:
        if text != self._last_trouble:
            log.warning("%s", text)
        self._last_trouble = text


def _without_secret(url: str) -> str:
    scheme, _, rest = url.rpartition("://")
    return f"{scheme or 'nats'}://{rest.rpartition('@')[2]}"
