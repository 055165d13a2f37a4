"""Reading JetStream: the API call, and the registry watch of DESIGN D4."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from penstock.common.adapters.nats_connection import NatsConnection, RawSubscription
from penstock.common.adapters.nats_wire import Message
from penstock.common.bus import Change, Entry, Listing, Lost, Position, WatchEvent
from penstock.common.errors import BusError, BusUnavailable
from penstock.common.subjects import Bucket

log = logging.getLogger(__name__)

API_DEADLINE_S = 5.0
# A watch proves that it is complete at least this often (DESIGN D4).
CHECK_EVERY_S = 2.0
RETRY_S = 0.25
MAX_UNREAD = 65_536
NANOSECONDS = 1_000_000_000
# How long a message stays, by its own header (ADR-43).
TTL = "Nats-TTL"
_consumers = itertools.count(1)


async def api(
    connection: NatsConnection, call: str, body: dict[str, Any] | None, *, missing_ok: bool = False
) -> dict[str, Any] | None:
    """One call of the JetStream API. None for "not found" if `missing_ok`; raises BusError."""
    payload = msgspec.json.encode(body) if body is not None else b""
    message = await connection.request(f"$JS.API.{call}", payload, API_DEADLINE_S)
    try:
        answer: dict[str, Any] = msgspec.json.decode(message.data, type=dict[str, Any])
    except msgspec.MsgspecError as exc:
        raise BusUnavailable(call, f"unreadable answer: {exc}") from exc
    error = answer.get("error")
    if error is None:
        return answer
    if missing_ok and error.get("code") == 404:
        return None
    raise BusUnavailable(call, str(error.get("description", "refused")))


class _Gap(BusError):
    """The watch may have missed something."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """A message of a consumer, with the sequences that its reply subject carries."""

    message: Message
    stream_sequence: int
    consumer_sequence: int
    pending: int

    @classmethod
    def parse(cls, message: Message) -> Delivered:
        """`$JS.ACK[.domain.account].stream.consumer.delivered.sseq.cseq.time.pending[.token]` (ADR-15)."""
        tokens = message.reply.split(".")
        fields = tokens[4:9] if len(tokens) == 9 else tokens[6:11]
        try:
            _, sseq, cseq, _, pending = (int(f) for f in fields)
        except ValueError as exc:
            raise _Gap(f"a message without position: {message.reply!r}") from exc
        return cls(message, sseq, cseq, pending)


@dataclass
class _Consumer:
    """An ephemeral push consumer that ends with the connection it was made on."""

    connection: NatsConnection
    stream: str
    unread: asyncio.Queue[Message | None] = field(default_factory=lambda: asyncio.Queue(MAX_UNREAD))
    lost: str = ""
    expected: int = 1
    inbox: str = ""
    _subscription: RawSubscription | None = None

    async def open(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Create it; what the server says of it, None if there is no such stream."""
        self.connection.listeners.append(self._on_connection)
        self.inbox = f"{self.connection.inbox}.consumer.{next(_consumers):x}"
        self._subscription = await self.connection.subscribe(
            self.inbox, self._on_message, pending_messages=MAX_UNREAD, label=self.stream
        )
        body = {
            "stream_name": self.stream,
            "config": {
                "deliver_subject": self.inbox,
                "ack_policy": "none",
                "max_deliver": 1,
                "mem_storage": True,
                "num_replicas": 1,
                "inactive_threshold": 10 * NANOSECONDS,
                "flow_control": True,
                "idle_heartbeat": 5 * NANOSECONDS,
                **config,
            },
        }
        return await api(self.connection, f"CONSUMER.CREATE.{self.stream}", body, missing_ok=True)

    async def close(self) -> None:
        if self._on_connection in self.connection.listeners:
            self.connection.listeners.remove(self._on_connection)
        if self._subscription is not None:
            await self._subscription.close()

    def _on_connection(self, up: bool) -> None:
        self._give_up("connection lost")

    def _give_up(self, cause: str) -> None:
        self.lost = self.lost or cause
        if not self.unread.full():
            self.unread.put_nowait(None)

    def _on_message(self, message: Message) -> None:
        if self.unread.full():
            self.lost = self.lost or "too many changes at once"
        else:
            self.unread.put_nowait(message)

    async def next(self, timeout_s: float) -> Delivered | None:
        """The next message in order, None after `timeout_s`. Raises _Gap."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    message = await self.unread.get()
            except TimeoutError:
                return None
            if self.lost or message is None:
                raise _Gap(self.lost)
            if message.subject == self.inbox:
                # The server's own word, by its subject: a status can be forged, and stored with a record.
                if message.reply:
                    self.connection.send(message.reply, b"")
                continue
            delivered = Delivered.parse(message)
            if delivered.consumer_sequence != self.expected:
                raise _Gap(f"message {self.expected} of the watch is missing")
            self.expected += 1
            return delivered


async def watch_bucket(connection: NatsConnection, bucket: Bucket) -> AsyncGenerator[WatchEvent, None]:
    """List, follow, prove; and list again whenever completeness cannot be proved."""
    while True:
        await connection.wait_connected()
        consumer = _Consumer(connection, bucket.stream)
        listed = False
        try:
            async for event in _watch_once(connection, consumer, bucket):
                listed = True
                yield event
        except BusError as exc:
            if listed:
                yield Lost(str(exc))
            else:
                log.debug("watch of %s: %s", bucket.name, exc)
        finally:
            await consumer.close()
        await asyncio.sleep(RETRY_S)


async def _watch_once(
    connection: NatsConnection, consumer: _Consumer, bucket: Bucket
) -> AsyncGenerator[WatchEvent, None]:
    info = await api(connection, f"STREAM.INFO.{bucket.stream}", None)
    incarnation, seen = _incarnation(info), _last_sequence(info)
    opened = await consumer.open(
        {"deliver_policy": "last_per_subject", "filter_subject": bucket.subject(">")}
    )
    pending = int((opened or {}).get("num_pending", 0))
    entries: dict[str, Entry] = {}
    while pending:
        delivered = await consumer.next(API_DEADLINE_S)
        if delivered is None:
            raise _Gap("the listing did not end")
        pending, seen = delivered.pending, max(seen, delivered.stream_sequence)
        key, entry = _entry(bucket, delivered)
        if entry is not None:
            entries[key] = entry
    if _incarnation(await api(connection, f"STREAM.INFO.{bucket.stream}", None)) != incarnation:
        raise _Gap("the bucket was created anew while it was listed")
    connection.proved_at[bucket.name] = time.monotonic()
    yield Listing(Position(incarnation, seen), entries)
    owed = 0
    next_check = time.monotonic() + CHECK_EVERY_S
    while True:
        delivered = await consumer.next(next_check - time.monotonic())
        if delivered is not None:
            seen = max(seen, delivered.stream_sequence)
            key, entry = _entry(bucket, delivered)
            yield Change(Position(incarnation, delivered.stream_sequence), key, entry)
        if time.monotonic() < next_check:
            continue
        info = await api(connection, f"STREAM.INFO.{bucket.stream}", None)
        last = _last_sequence(info)
        if _incarnation(info) != incarnation or last < seen:
            raise _Gap("the bucket was created anew")
        if seen < owed and consumer.unread.empty():
            raise _Gap(f"change {owed} of the bucket never came")
        now = time.monotonic()
        if seen >= last:
            connection.proved_at[bucket.name] = now
        owed, next_check = last, now + CHECK_EVERY_S


def _incarnation(info: dict[str, Any] | None) -> str:
    return str((info or {}).get("created", ""))


def _last_sequence(info: dict[str, Any] | None) -> int:
    return int((info or {}).get("state", {}).get("last_seq", 0))


def _entry(bucket: Bucket, delivered: Delivered) -> tuple[str, Entry | None]:
    message = delivered.message
    key = message.subject.removeprefix(bucket.subject(""))
    # A record that leaves by itself would do so without a mark: none of ours has this, and it counts as none.
    if message.headers and (message.headers.get("KV-Operation") or message.headers.get(TTL)):
        return key, None
    return key, Entry(message.data, delivered.stream_sequence)
