"""The bus within one process: for tests of services and for the simulator.

Messages cross it encoded, in order, one loop turn later, so that what works here works on NATS.
"""

from __future__ import annotations

import asyncio
import fnmatch
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

import msgspec

from penstock.common.adapters.memory_buckets import MemoryBucket
from penstock.common.adapters.memory_streams import MemoryStream, MemoryStreams
from penstock.common.bus import Change, Entry, Listing, M, R, Stored, Taken, WatchEvent
from penstock.common.codec import DecodeError, decode, encode
from penstock.common.errors import BusError, BusTimeout, BusUnavailable, MessageTooLarge, RevisionConflict
from penstock.common.subjects import Bucket, Counters, Service, Stream, Subject
from penstock.common.telemetry import Cell, Metrics

MAX_WATCH_EVENTS = 65_536


class MemoryBroker:
    """What the processes of a test share: subscriptions, buckets, streams."""

    def __init__(self) -> None:
        self.up = True
        self.subscriptions: list[_Subscription] = []
        self.buckets: dict[str, MemoryBucket] = {}
        self.stored = MemoryStreams()
        # Sums by the name of the counters and the key.
        self.counters: dict[str, dict[str, int]] = {}
        self.services: dict[tuple[str, str], Mapping[str, str]] = {}
        self.buses: list[MemoryBus] = []
        self._turns = itertools.count()

    @property
    def streams(self) -> dict[str, MemoryStream]:
        """Streams by name."""
        return self.stored.by_name

    def set_up(self, up: bool) -> None:
        """Take the broker down, or bring it back; buses notice at once."""
        if up != self.up:
            self.up = up
            for bus in self.buses:
                bus.connection_changed(up)
            self.stored.wake()
            for bucket in self.buckets.values():
                bucket.reconnected() if up else bucket.lost("the bus is down")

    def drop_storage(self) -> None:
        """Forget every bucket and stream, as a server restarted without its store does."""
        for bucket in self.buckets.values():
            bucket.lost("the bucket is gone")
            bucket.exists = False
        self.streams.clear()
        self.counters.clear()

    def deliver(self, subject: str, payload: bytes, reply: Callable[[bytes], None] | None) -> int:
        """Hand a message to every plain subscription and to one member of each queue group."""
        matching = [s for s in self.subscriptions if fnmatch.fnmatchcase(subject, s.pattern)]
        turn = next(self._turns)
        groups: dict[str, list[_Subscription]] = {}
        for subscription in matching:
            if subscription.group:
                groups.setdefault(subscription.group, []).append(subscription)
            else:
                subscription.push(payload, reply)
        for members in groups.values():
            members[turn % len(members)].push(payload, reply)
        return len(matching)


class _Subscription:
    def __init__(
        self,
        broker: MemoryBroker,
        pattern: str,
        group: str,
        limit: int,
        handle: Callable[..., None],
        drops: Cell,
    ) -> None:
        self.pattern, self.group = pattern, group
        self._broker, self._limit, self._handle, self._drops, self._pending = broker, limit, handle, drops, 0
        broker.subscriptions.append(self)

    def push(self, payload: bytes, reply: Callable[[bytes], None] | None) -> None:
        if self._pending >= self._limit:
            self._drops.value += 1
            return
        self._pending += 1
        asyncio.get_running_loop().call_soon(self._run, payload, reply)

    def _run(self, payload: bytes, reply: Callable[[bytes], None] | None) -> None:
        self._pending -= 1
        self._handle(payload, reply)

    async def close(self) -> None:
        if self in self._broker.subscriptions:
            self._broker.subscriptions.remove(self)


class MemoryBus:
    """One process's connection to a MemoryBroker."""

    def __init__(self, broker: MemoryBroker, metrics: Metrics | None = None) -> None:
        self._broker = broker
        self._dropped = (metrics or Metrics()).counter(
            "penstock_bus_dropped_total", "Bus messages dropped", "subject", "reason"
        )
        self._listeners: list[Callable[[bool], None]] = []
        self._answers: dict[asyncio.Future[bytes], str] = {}
        self._calls: set[asyncio.Task[None]] = set()
        broker.buses.append(self)

    @property
    def connected(self) -> bool:
        return self._broker.up

    def on_connection(self, listener: Callable[[bool], None]) -> None:
        self._listeners.append(listener)

    def connection_changed(self, up: bool) -> None:
        """The broker went down or came back; nobody waits for an answer across that."""
        for answer, subject in self._answers.items():
            if not answer.done():
                answer.set_exception(BusUnavailable(subject, "connection lost"))
        for listener in self._listeners:
            listener(up)

    def publish(self, subject: Subject[M], message: M, *tokens: str) -> bool:
        payload = _checked(subject, message)
        if not self._broker.up:
            self._dropped.inc(subject.pattern, "disconnected")
            return False
        name = subject.name(*tokens)
        self._broker.deliver(name, payload, None)
        self._broker.stored.store(name, payload, {})
        return True

    async def request(self, service: Service[M, R], message: M, *tokens: str, deadline_s: float) -> R:
        subject = service.request.name(*tokens)
        payload = _checked(service.request, message)
        if not self._broker.up:
            raise BusUnavailable(subject, "the bus is down")
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._answers[answer] = subject
        answer.add_done_callback(self._answers.pop)

        def reply(data: bytes) -> None:
            if not answer.done():
                answer.set_result(data)

        if not self._broker.deliver(subject, payload, reply):
            answer.cancel()
            raise BusUnavailable(subject, "nobody serves it")
        try:
            # Not wait_for, which may swallow a cancellation that comes with the answer (CPython 3.11).
            async with asyncio.timeout(deadline_s):
                return decode(service.reply, await answer)
        except TimeoutError:
            raise BusTimeout(subject, deadline_s) from None
        except DecodeError as exc:
            self._dropped.inc(service.request.pattern, "undecodable reply")
            raise BusTimeout(subject, deadline_s) from exc

    def call(
        self,
        service: Service[M, R],
        message: M,
        *tokens: str,
        deadline_s: float,
        settled: Callable[[R | BusError], None],
    ) -> None:
        _checked(service.request, message)

        async def ask() -> None:
            try:
                reply: R | BusError = await self.request(service, message, *tokens, deadline_s=deadline_s)
            except BusError as exc:
                reply = exc
            settled(reply)

        task = asyncio.get_running_loop().create_task(ask(), name="call")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)

    async def subscribe(
        self,
        subject: Subject[M],
        handler: Callable[[M], None],
        *tokens: str,
        skip: Callable[[bytes], bool] | None = None,
    ) -> _Subscription:
        def handle(payload: bytes, reply: Callable[[bytes], None] | None) -> None:
            if skip is None or not skip(payload):
                self._guarded(subject, payload, handler)

        return self._subscribe(subject, "", handle, tokens)

    async def serve(
        self,
        service: Service[M, R],
        handler: Callable[[M], R | None],
        *tokens: str,
        then: Callable[[], None] | None = None,
    ) -> _Subscription:
        def handle(payload: bytes, reply: Callable[[bytes], None] | None) -> None:
            answer = self._guarded(service.request, payload, handler)
            if answer is not None and reply is not None and self._broker.up:
                reply(encode(answer))
            if then is not None:
                then()

        return self._subscribe(service.request, service.request.queue_group, handle, tokens)

    def _subscribe(
        self, subject: Subject[Any], group: str, handle: Callable[..., None], tokens: tuple[str, ...]
    ) -> _Subscription:
        pattern = subject.name(*tokens) if tokens else subject.pattern
        drops = self._dropped.labels(subject.pattern, "pending limit")
        return _Subscription(self._broker, pattern, group, subject.pending_messages, handle, drops)

    def _guarded(self, subject: Subject[Any], payload: bytes, handler: Callable[[Any], Any]) -> Any:
        if len(payload) > subject.max_bytes:
            self._dropped.inc(subject.pattern, "over the bound")
            return None
        try:
            return handler(decode(subject.message, payload))
        except DecodeError:
            self._dropped.inc(subject.pattern, "undecodable")
        except Exception:  # noqa: BLE001  # a handler's fault is counted, the subscription lives (port contract)
            self._dropped.inc(subject.pattern, "handler failed")
        return None

    async def ensure_stream(self, stream: Stream) -> None:
        self._require_up(stream.name)
        self._broker.stored.ensure(stream)

    def append(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> asyncio.Future[int]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        sequence = self._broker.stored.store(subject, payload, headers) if self._broker.up else None
        if sequence is None:
            future.set_exception(BusUnavailable(subject, "no stream covers it"))
        else:
            future.set_result(sequence)
        return future

    async def read(
        self, stream: Stream, subject: str, since_s: float | None, after: int = 0
    ) -> AsyncGenerator[Stored, None]:
        if not self._broker.up:
            raise BusUnavailable(stream.name, "no connection")
        async for stored in self._broker.stored.read(stream.name, subject, since_s, after):
            yield stored

    async def follow(
        self, stream: Stream, subject: str, since_s: float | None
    ) -> AsyncGenerator[Stored, None]:
        async for stored in self._broker.stored.follow(stream.name, subject, since_s):
            yield stored

    async def take(self, stream: Stream, subject: Subject[M]) -> AsyncGenerator[Taken[M], None]:
        streams = self._broker.stored
        while True:
            taken = None
            if self._broker.up:
                streams.ensure(stream)
                taken = streams.by_name[stream.name].take(subject.queue_group)
            if taken is None:
                await streams.stored()
                continue
            stored, left = taken
            messages: list[M] = []
            self._guarded(subject, stored.payload, messages.append)
            for message in messages:
                yield Taken(message, left)

    async def ensure_counters(self, counters: Counters) -> float:
        self._require_up(counters.name)
        self._broker.counters.setdefault(counters.name, {})
        return time.time()

    def add(self, counters: Counters, deltas: Sequence[tuple[str, int]]) -> asyncio.Future[list[int]]:
        added: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        held = self._broker.counters.get(counters.name)
        if not self._broker.up or held is None:
            added.set_exception(BusUnavailable(counters.name, "there are no such counters"))
            return added
        sums = []
        for key, delta in deltas:
            held[key] = total = held.get(key, 0) + delta
            sums.append(total)
        added.set_result(sums)
        return added

    async def ensure_bucket(self, bucket: Bucket) -> bool:
        self._require_up(bucket.name)
        held = self._bucket(bucket)
        if held.exists:
            return False
        held.create()
        return True

    async def put(self, bucket: Bucket, key: str, value: bytes, *, expected: int | None = None) -> int:
        if len(value) > bucket.max_value_bytes:
            raise MessageTooLarge(bucket.subject(key), len(value), bucket.max_value_bytes)
        return self._write(bucket, key, value, expected)

    async def delete(self, bucket: Bucket, key: str, *, expected: int | None = None) -> None:
        self._write(bucket, key, None, expected)

    def _write(self, bucket: Bucket, key: str, value: bytes | None, expected: int | None) -> int:
        self._require_up(bucket.name)
        held = self._bucket(bucket)
        if not held.exists:
            raise BusUnavailable(bucket.name, "the bucket does not exist")
        current = held.entries.get(key)
        if expected is not None and expected != (current.revision if current else 0):
            raise RevisionConflict(key, expected)
        held.sequence += 1
        entry = None if value is None else Entry(value, held.sequence)
        if entry is None:
            held.entries.pop(key, None)
        else:
            held.entries[key] = entry
        held.tell(Change(held.position(), key, entry))
        return held.sequence

    async def watch(self, bucket: Bucket) -> AsyncGenerator[WatchEvent, None]:
        held = self._bucket(bucket)
        queue: asyncio.Queue[WatchEvent] = asyncio.Queue(MAX_WATCH_EVENTS)
        if held.exists and self._broker.up:
            queue.put_nowait(Listing(held.position(), dict(held.entries)))
        held.queues.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            held.queues.remove(queue)

    async def register(self, service: str, instance: str, version: str, metadata: Mapping[str, str]) -> None:
        self._broker.services[service, instance] = dict(metadata)

    async def close(self) -> None:
        if self in self._broker.buses:
            self._broker.buses.remove(self)

    def _bucket(self, bucket: Bucket) -> MemoryBucket:
        return self._broker.buckets.setdefault(bucket.name, MemoryBucket())

    def _require_up(self, what: str) -> None:
        if not self._broker.up:
            raise BusUnavailable(what, "the bus is down")


def _checked(subject: Subject[Any], message: msgspec.Struct) -> bytes:
    payload = encode(message)
    if len(payload) > subject.max_bytes:
        raise MessageTooLarge(subject.pattern, len(payload), subject.max_bytes)
    return payload
