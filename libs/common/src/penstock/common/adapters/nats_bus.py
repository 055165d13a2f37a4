"""The bus on NATS: core messages, JetStream's API spoken directly, micro-service directory.

The JetStream calls are the JSON requests of NATS's ADR-1 and ADR-8 (key-value buckets).
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from functools import partial
from typing import Any

import msgspec

from penstock.common.adapters.nats_connection import NatsConnection, RawSubscription
from penstock.common.adapters.nats_counting import add_all
from penstock.common.adapters.nats_directory import Directory
from penstock.common.adapters.nats_log import follow, read
from penstock.common.adapters.nats_messages import WRITE_DEADLINE_S, NatsMessages
from penstock.common.adapters.nats_streams import TTL, api, watch_bucket
from penstock.common.adapters.nats_taking import take
from penstock.common.adapters.nats_wire import Message
from penstock.common.bus import M, R, Stored, Taken, WatchEvent
from penstock.common.errors import BusError, BusUnavailable, MessageTooLarge, RevisionConflict
from penstock.common.settings import BusSettings
from penstock.common.subjects import Bucket, Counters, Service, Stream, Subject
from penstock.common.telemetry import Metrics

log = logging.getLogger(__name__)

WRONG_LAST_SEQUENCE = 10071
DELETED = {"KV-Operation": "DEL"}


class NatsBus:
    """One process's view of the bus; `start` it, then use it as `penstock.common.bus.Bus`."""

    def __init__(self, settings: BusSettings, name: str, metrics: Metrics) -> None:
        self._replicas = settings.nats_replicas
        self._connection = NatsConnection(settings, name, metrics)
        self._messages = NatsMessages(self._connection)

    async def start(self) -> None:
        """Begin to connect, and keep connected until `close`."""
        await self._connection.start()

    @property
    def connected(self) -> bool:
        return self._connection.connected

    def on_connection(self, listener: Callable[[bool], None]) -> None:
        self._connection.listeners.append(listener)

    async def close(self) -> None:
        await self._connection.close()

    def publish(self, subject: Subject[M], message: M, *tokens: str) -> bool:
        return self._messages.publish(subject, message, tokens)

    async def request(self, service: Service[M, R], message: M, *tokens: str, deadline_s: float) -> R:
        return await self._messages.request(service, message, tokens, deadline_s)

    def call(
        self,
        service: Service[M, R],
        message: M,
        *tokens: str,
        deadline_s: float,
        settled: Callable[[R | BusError], None],
    ) -> None:
        self._messages.call(service, message, tokens, deadline_s, settled)

    async def subscribe(
        self,
        subject: Subject[M],
        handler: Callable[[M], None],
        *tokens: str,
        skip: Callable[[bytes], bool] | None = None,
    ) -> RawSubscription:
        return await self._messages.subscribe(subject, handler, tokens, skip)

    async def serve(
        self,
        service: Service[M, R],
        handler: Callable[[M], R | None],
        *tokens: str,
        then: Callable[[], None] | None = None,
    ) -> RawSubscription:
        return await self._messages.serve(service, handler, tokens, then)

    async def ensure_stream(self, stream: Stream) -> None:
        config = {
            "name": stream.name,
            "subjects": list(stream.subjects),
            "retention": "limits",
            "storage": stream.storage,
            "discard": "old",
            "max_bytes": stream.max_bytes,
            "max_age": int(stream.max_age_s * 1e9),
            "max_msg_size": stream.max_message_bytes,
            "num_replicas": self._replicas,
            "duplicate_window": int(min(120, stream.max_age_s) * 1e9),
            "allow_direct": True,
        }
        await self._ensure(stream.name, config)

    async def ensure_counters(self, counters: Counters) -> float:
        config = {
            "name": counters.name,
            "subjects": [counters.subject(">")],
            "retention": "limits",
            "storage": "memory",
            "discard": "old",
            "max_bytes": counters.max_bytes,
            "max_age": int(counters.max_age_s * 1e9),
            "max_msgs_per_subject": 1,
            "num_replicas": self._replicas,
            "allow_msg_counter": True,
        }
        await self._ensure(counters.name, config)
        asked_at = time.monotonic()
        info = await api(self._connection, f"STREAM.INFO.{counters.name}", None)
        try:
            now = datetime.fromisoformat(str((info or {})["ts"])).timestamp()
        except (KeyError, ValueError) as exc:
            raise BusUnavailable(counters.name, f"an answer without the server's time: {exc!r}") from exc
        return now + (time.monotonic() - asked_at) / 2

    def add(self, counters: Counters, deltas: Sequence[tuple[str, int]]) -> asyncio.Future[list[int]]:
        added: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()

        def settle(answers: Sequence[Message | BusError]) -> None:
            if added.done():
                return
            try:
                added.set_result([_sum_of(counters.name, answer) for answer in answers])
            except BusError as exc:
                added.set_exception(exc)

        subjects = [(counters.subject(key), delta) for key, delta in deltas]
        add_all(self._connection, subjects, WRITE_DEADLINE_S, settle)
        return added

    async def ensure_bucket(self, bucket: Bucket) -> bool:
        config = {
            "name": bucket.stream,
            "subjects": [bucket.subject(">")],
            "retention": "limits",
            "storage": "file",
            "discard": "new",
            "max_bytes": bucket.max_bytes,
            "max_age": int(bucket.max_age_s * 1e9),
            "max_msg_size": bucket.max_value_bytes + 1024,
            "max_msgs_per_subject": 1,
            "num_replicas": self._replicas,
            # Records leave one by one, with a mark that watches see. What a purge, or the header of one
            # message, takes away leaves none; who wants an empty bucket deletes it, which is noticed.
            "allow_rollup_hdrs": False,
            "deny_delete": True,
            "deny_purge": True,
            "allow_direct": True,
        }
        if bucket.marks_max_age_s:
            config["allow_msg_ttl"] = True
        return await self._ensure(bucket.stream, config)

    async def _ensure(self, name: str, config: dict[str, Any]) -> bool:
        info = await api(self._connection, f"STREAM.INFO.{name}", None, missing_ok=True)
        if info is None:
            await api(self._connection, f"STREAM.CREATE.{name}", config)
            return True
        held = info["config"]
        if any(held.get(key) != value for key, value in config.items()):
            await api(self._connection, f"STREAM.UPDATE.{name}", held | config)
        return False

    def append(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> asyncio.Future[int]:
        return self._messages.write(subject, payload, headers, _sequence_of)

    async def put(self, bucket: Bucket, key: str, value: bytes, *, expected: int | None = None) -> int:
        if len(value) > bucket.max_value_bytes:
            raise MessageTooLarge(bucket.subject(key), len(value), bucket.max_value_bytes)
        return await self._write(bucket, key, value, {}, expected)

    async def delete(self, bucket: Bucket, key: str, *, expected: int | None = None) -> None:
        ttl = {TTL: f"{bucket.marks_max_age_s}s"} if bucket.marks_max_age_s else {}
        await self._write(bucket, key, b"", DELETED | ttl, expected)

    async def _write(
        self, bucket: Bucket, key: str, value: bytes, headers: dict[str, str], expected: int | None
    ) -> int:
        subject = bucket.subject(key)
        if expected is None:
            return await self.append(subject, value, headers)
        try:
            return await self.append(subject, value, headers | {_EXPECT: str(expected)})
        except _WrongRevision:
            deleted = await self._deletion_of(bucket, key) if expected == 0 else None
            if deleted is None:
                raise RevisionConflict(key, expected) from None
        try:
            return await self.append(subject, value, headers | {_EXPECT: str(deleted)})
        except _WrongRevision:
            raise RevisionConflict(key, expected) from None

    async def _deletion_of(self, bucket: Bucket, key: str) -> int | None:
        """The sequence of the key's deletion mark, if that is what it holds: such a key does not exist."""
        body = {"last_by_subj": bucket.subject(key)}
        answer = await api(self._connection, f"STREAM.MSG.GET.{bucket.stream}", body, missing_ok=True)
        message = (answer or {}).get("message", {})
        headers = base64.b64decode(message.get("hdrs", ""))
        gone = b"KV-Operation" in headers or TTL.encode() in headers
        return message.get("seq") if gone else None

    async def watch(self, bucket: Bucket) -> AsyncGenerator[WatchEvent, None]:
        async for event in watch_bucket(self._connection, bucket):
            yield event

    async def read(
        self, stream: Stream, subject: str, since_s: float | None, after: int = 0
    ) -> AsyncGenerator[Stored, None]:
        async with aclosing(read(self._connection, stream, subject, since_s, after)) as messages:
            async for stored in messages:
                yield stored

    async def follow(
        self, stream: Stream, subject: str, since_s: float | None
    ) -> AsyncGenerator[Stored, None]:
        async for stored in follow(self._connection, stream, subject, since_s):
            yield stored

    async def take(self, stream: Stream, subject: Subject[M]) -> AsyncGenerator[Taken[M], None]:
        ensure = partial(self.ensure_stream, stream)
        async for message, left in take(self._connection, stream.name, subject.queue_group, ensure):
            messages: list[M] = []
            self._messages.guarded(subject, message.data, messages.append)
            for taken in messages:
                yield Taken(taken, left)

    async def register(self, service: str, instance: str, version: str, metadata: Mapping[str, str]) -> None:
        await Directory(self._connection, f"penstock-{service}", instance, version, metadata).open()


_EXPECT = "Nats-Expected-Last-Subject-Sequence"


class _WrongRevision(BusError):
    """JetStream's "wrong last sequence"."""


class _AckError(msgspec.Struct):
    code: int = 0
    err_code: int = 0
    description: str = ""


class _Ack(msgspec.Struct):
    seq: int = 0
    # The sum of a counter, in digits.
    val: str = ""
    error: _AckError | None = None


_ack_decoder = msgspec.json.Decoder(_Ack)


def _sequence_of(subject: str, data: bytes) -> int:
    return _acknowledged(subject, data).seq


def _sum_of(subject: str, answer: Message | BusError) -> int:
    if isinstance(answer, BusError):
        raise answer
    digits = _acknowledged(subject, answer.data).val
    try:
        return int(digits)
    except ValueError:
        raise BusUnavailable(subject, "no counter: it needs NATS 2.12 or newer") from None


def _acknowledged(subject: str, data: bytes) -> _Ack:
    try:
        ack = _ack_decoder.decode(data)
    except msgspec.MsgspecError as exc:
        raise BusUnavailable(subject, f"unreadable acknowledgement: {exc}") from exc
    if ack.error is None:
        return ack
    if ack.error.err_code == WRONG_LAST_SEQUENCE:
        raise _WrongRevision(subject)
    raise BusUnavailable(subject, f"not stored: {ack.error.description}")
