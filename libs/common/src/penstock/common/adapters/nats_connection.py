"""A connection to NATS that is always being kept: connect, prove alive, replace.

Each connection is a NatsClient of its own. A lost one fails what waits for an answer at once, so that
callers degrade instead of waiting (DESIGN D5); interests are renewed on the next.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Final

from penstock.common.adapters.nats_calls import Call, Settled
from penstock.common.adapters.nats_client import Interest, NatsClient
from penstock.common.adapters.nats_login import ConnectError
from penstock.common.adapters.nats_wire import Message, WireError
from penstock.common.errors import BusError, BusTimeout, BusUnavailable
from penstock.common.settings import BusSettings
from penstock.common.subjects import token
from penstock.common.telemetry import FAST_SECONDS_BUCKETS, Metrics

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 4.0
PING_EVERY_S: Final = 1.0
PINGS_MISSED: Final = 2
DRAIN_TIMEOUT_S: Final = 1.0
RETRY_S: Final = 0.1
MAX_PENDING_REQUESTS: Final = 65_536
REFUSALS_SHOWN: Final = 20
# Bytes that may wait to be sent while the server reads slowly; past it messages are dropped and counted.
MAX_UNSENT_BYTES: Final = 8 * 1024 * 1024


Headers = Mapping[str, str]


class RawSubscription:
    """Interest that is renewed on every connection; drops are counted under `label`."""

    def __init__(
        self,
        connection: NatsConnection,
        subject: str,
        queue: str,
        handle: Callable[[Message], None],
        pending_messages: int,
        label: str,
        then: Callable[[], None] | None = None,
    ) -> None:
        self.connection, self.subject, self.queue, self.handle = connection, subject, queue, handle
        self.pending_messages, self._then = pending_messages, then
        self._dropped = connection.dropped.labels(label, "pending limit")
        self._interest: Interest | None = None

    def start(self, client: NatsClient) -> None:
        """Subscribe on `client`."""
        self._interest = client.subscribe(
            self.subject, self.queue, self.handle, self.pending_messages, self._count_drop, self._then
        )

    async def close(self) -> None:
        """End the interest; what was delivered is handled first, within a second."""
        self.connection.subscriptions.discard(self)
        interest, self._interest = self._interest, None
        if interest is None:
            return
        interest.client.unsubscribe(interest)
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S):
                await interest.client.ping()
        except (TimeoutError, ConnectionError) as exc:
            log.debug("drain of %s: %r", self.subject, exc)
        finally:
            interest.client.forget(interest)

    def abandon(self) -> None:
        """End the interest at once, with what was delivered."""
        self.connection.subscriptions.discard(self)
        interest, self._interest = self._interest, None
        if interest is not None:
            interest.client.unsubscribe(interest)
            interest.client.forget(interest)

    def _count_drop(self) -> None:
        self._dropped.value += 1


class NatsConnection:
    """Publish, request and subscribe in bytes, over whichever client is alive."""

    def __init__(self, settings: BusSettings, name: str, metrics: Metrics) -> None:
        """`name` is what the server shows, `service/id` for a service; below its parts lie the inboxes."""
        self._settings, self._name = settings, name
        self._servers = itertools.cycle([url.strip() for url in settings.nats_url.split(",") if url.strip()])
        self._client: NatsClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._up = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._answers: dict[str, tuple[Settled, str]] = {}
        self._answer_ids = itertools.count(1)
        self._last_trouble = ""
        # Every inbox of the process lies below this, so that permissions can be as narrow.
        self.inbox = ".".join(("_INBOX", *map(token, name.split("/", 1)), f"{random.getrandbits(64):016x}"))
        self.subscriptions: set[RawSubscription] = set()
        self.listeners: list[Callable[[bool], None]] = []
        self.dropped = metrics.counter(
            "penstock_bus_dropped_total", "Bus messages dropped", "subject", "reason"
        )
        self._refused = self.dropped.labels("any", "not permitted")
        self._connections = metrics.counter("penstock_bus_connections_total", "Connections made to the bus")
        metrics.gauge(
            "penstock_bus_connected", "1 while the bus answers", lambda: float(self.connected), over="min"
        )
        self._ping_seconds = metrics.histogram(
            "penstock_bus_ping_seconds",
            "Time until the bus's server has taken in all that was sent to it, asked every second",
            bounds=FAST_SECONDS_BUCKETS,
        ).labels()
        # When a bucket's watch last proved that it misses nothing.
        self.proved_at: dict[str, float] = {}
        metrics.gauge(
            "penstock_bus_watch_age_seconds",
            "Time since the watch of a bucket proved that it misses nothing; every 2 s while the bus is well",
            lambda: [((name,), time.monotonic() - at) for name, at in self.proved_at.items()],
            "bucket",
            over="max",
        )

    @property
    def connected(self) -> bool:
        """Whether there is a connection whose server answers pings."""
        return self._client is not None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that the connection lives on."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    async def start(self) -> None:
        """Begin to connect; returns at once."""
        answers = RawSubscription(
            self, f"{self.inbox}.answers.*", "", self._on_answer, MAX_PENDING_REQUESTS, "answers"
        )
        self.subscriptions.add(answers)
        self._supervisor = asyncio.create_task(self._supervise(), name="nats-connection")

    async def wait_connected(self) -> None:
        """Return once there is a connection."""
        await self._up.wait()

    async def close(self) -> None:
        """Send what waits, then leave; a server that does not answer is given a second."""
        if self._client is not None:
            await self._ping(self._client, PING_EVERY_S)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._client is not None:
            self._lose(self._client)

    def send(
        self,
        subject: str,
        payload: bytes,
        reply: str = "",
        headers: Headers | None = None,
        unsent_bytes: int = MAX_UNSENT_BYTES,
    ) -> str:
        """Send with the other messages of this turn. Returns "" or the reason why it was dropped."""
        client = self._client
        if client is None:
            return "disconnected"
        if client.unsent_bytes + len(payload) > unsent_bytes:
            return "send buffer full"
        try:
            client.publish(subject, payload, reply, headers)
        except ValueError as exc:
            # Whoever sends counts it; an address to reply to may be anything.
            log.debug("message to %s refused: %s", subject[:200], exc)
            return "refused"
        return ""

    def ask(self, subject: str, payload: bytes, headers: Headers | None = None) -> asyncio.Future[Message]:
        """Send with a reply address. The future fails with BusUnavailable when nobody can answer; who
        stops waiting cancels it."""
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()

        def settle(result: Message | BusError) -> None:
            if future.done():
                return
            if isinstance(result, BusError):
                future.set_exception(result)
            else:
                future.set_result(result)

        token = self.expect(subject, payload, headers, settle)
        future.add_done_callback(lambda _: self._answers.pop(token, None))
        return future

    def call(
        self,
        subject: str,
        payload: bytes,
        deadline_s: float,
        settled: Settled,
        headers: Headers | None = None,
    ) -> None:
        """`request` without a task: `settled` gets the answer, BusUnavailable or BusTimeout, once, and
        perhaps before this returns."""
        call = Call(self, deadline_s, settled)
        call.wait(self.expect(subject, payload, headers, call.settle))

    def expect(
        self, subject: str, payload: bytes, headers: Headers | None, settle: Settled, *, flush: bool = True
    ) -> str:
        """Send and remember who waits; "" if that failed, which `settle` is told. With `flush` at once."""
        if len(self._answers) >= MAX_PENDING_REQUESTS:
            settle(BusUnavailable(subject, "too many requests without an answer"))
            return ""
        token = f"{next(self._answer_ids):x}"
        trouble = self.send(subject, payload, f"{self.inbox}.answers.{token}", headers)
        if trouble:
            settle(BusUnavailable(subject, trouble))
            return ""
        if flush and self._client is not None:
            # Who waits for an answer has gathered what belongs together; a turn more is 50 us of latency.
            self._client.flush()
        self._answers[token] = settle, subject
        return token

    def waits(self, token: str) -> bool:
        """Whether somebody still waits for this answer."""
        return token in self._answers

    def give_up(self, token: str, deadline_s: float) -> None:
        """Nobody waits for an answer any more, if somebody does: tell them."""
        waiting = self._answers.pop(token, None)
        if waiting is not None:
            settle, subject = waiting
            settle(BusTimeout(subject, deadline_s))

    async def request(
        self, subject: str, payload: bytes, deadline_s: float, headers: Headers | None = None
    ) -> Message:
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
        handle: Callable[[Message], None],
        *,
        queue: str = "",
        pending_messages: int,
        label: str,
        then: Callable[[], None] | None = None,
    ) -> RawSubscription:
        """Deliver to `handle` on this and every later connection; returns once the server knows. `then` is
        called once what was said to messages that came together has left."""
        subscription = RawSubscription(self, subject, queue, handle, pending_messages, label, then)
        self.subscriptions.add(subscription)
        client = self._client
        if client is None:
            return subscription
        subscription.start(client)
        try:
            await client.ping()
        except ConnectionError as exc:
            log.debug("%s waits for the next connection: %s", subject, exc)
        except asyncio.CancelledError:
            subscription.abandon()
            raise
        return subscription

    async def _supervise(self) -> None:
        while True:
            client = await self._connect(next(self._servers))
            if client is None:
                await asyncio.sleep(RETRY_S * (1 + random.random()))
                continue
            try:
                cause = await self._until_lost(client)
            except asyncio.CancelledError:
                self._lose(client)
                raise
            self._trouble(f"connection to the bus lost: {cause}")
            self._lose(client)

    async def _connect(self, server: str) -> NatsClient | None:
        client = NatsClient(self._on_refusal)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await client.connect(self._settings, server, self._name)
                for subscription in self.subscriptions:
                    subscription.start(client)
                known = set(self.subscriptions)
                await client.ping()
        except asyncio.CancelledError:
            client.discard()
            raise
        except (OSError, ConnectError, WireError, ssl.SSLError, TimeoutError, ValueError) as exc:
            self._trouble(f"bus at {_without_secret(server)}: {exc or type(exc).__name__}")
            client.discard()
            return None
        for subscription in self.subscriptions - known:
            subscription.start(client)
        self._client = client
        self._connections.inc()
        if self._last_trouble:
            log.warning("bus connected: %s", _without_secret(server))
        self._last_trouble = ""
        self._up.set()
        for listener in list(self.listeners):
            listener(True)
        return client

    async def _until_lost(self, client: NatsClient) -> str:
        missed = 0
        while missed < PINGS_MISSED:
            try:
                async with asyncio.timeout(PING_EVERY_S):
                    await client.closed.wait()
            except TimeoutError:
                missed = 0 if await self._ping(client, PING_EVERY_S) else missed + 1
            if client.closed.is_set():
                return client.cause
        return f"no answer to {PINGS_MISSED} pings"

    async def _ping(self, client: NatsClient, within_s: float) -> bool:
        """Whether the server takes in all that was sent, in time."""
        asked_at = time.monotonic()
        try:
            async with asyncio.timeout(within_s):
                await client.ping()
        except (TimeoutError, ConnectionError):
            return False
        self._ping_seconds.observe(time.monotonic() - asked_at)
        return True

    def _on_answer(self, message: Message) -> None:
        waiting = self._answers.pop(message.subject.rsplit(".", 1)[1], None)
        if waiting is None:
            return
        settle, subject = waiting
        settle(BusUnavailable(subject, "nobody serves it") if message.no_responders else message)

    def _lose(self, client: NatsClient) -> None:
        client.discard()
        if self._client is not client:
            return
        self._client = None
        self._up.clear()
        waiting, self._answers = self._answers, {}
        for settle, subject in waiting.values():
            settle(BusUnavailable(subject, "connection lost"))
        for listener in list(self.listeners):
            listener(False)

    def _on_refusal(self, text: str) -> None:
        self._refused.value += 1
        # Somebody who asks for replies to forbidden places must not fill the log.
        level = logging.WARNING if self._refused.value <= REFUSALS_SHOWN else logging.DEBUG
        log.log(level, "the bus refuses: %s", text)

    def _trouble(self, text: str) -> None:
        if text != self._last_trouble:
            log.warning("%s", text)
        self._last_trouble = text


def _without_secret(url: str) -> str:
    scheme, _, rest = url.rpartition("://")
    return f"{scheme or 'nats'}://{rest.rpartition('@')[2]}"
