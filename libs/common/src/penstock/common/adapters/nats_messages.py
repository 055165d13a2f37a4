"""What the bus does all the time on NATS: messages out and in, requests, and what a stream has stored.

Apart from `nats_bus`, since this is compiled where a data path is (decision 0066).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec

from penstock.common.adapters.nats_connection import NatsConnection, RawSubscription
from penstock.common.adapters.nats_wire import Message
from penstock.common.bus import M, R
from penstock.common.codec import DecodeError, decode, encode
from penstock.common.errors import BusError, BusTimeout, MessageTooLarge
from penstock.common.subjects import Service, Subject

log = logging.getLogger(__name__)

T = TypeVar("T")

WRITE_DEADLINE_S: Final = 5.0
# Of names by pattern and tokens: to put one together costs 2 us.
MAX_NAMES: Final = 1024


class NatsMessages:
    """Messages over one connection. Its methods are those of `penstock.common.bus.Bus`."""

    def __init__(self, connection: NatsConnection) -> None:
        self._connection = connection
        self._dropped = connection.dropped
        self._names: dict[tuple[str, tuple[str, ...]], str] = {}

    def publish(self, subject: Subject[Any], message: msgspec.Struct, tokens: tuple[str, ...]) -> bool:
        """Send without waiting; False if it was dropped, and counted."""
        payload = _checked(subject, message)
        trouble = self._connection.send(
            self.name(subject, tokens), payload, "", None, subject.unsent_bytes + len(payload)
        )
        if trouble:
            self._dropped.inc(subject.pattern, trouble)
        return not trouble

    def name(self, subject: Subject[Any], tokens: tuple[str, ...]) -> str:
        """The concrete subject."""
        key = subject.pattern, tokens
        name = self._names.get(key)
        if name is None:
            if len(self._names) >= MAX_NAMES:
                self._names.clear()
            name = self._names[key] = subject.name(*tokens)
        return name

    async def request(
        self, service: Service[M, R], message: M, tokens: tuple[str, ...], deadline_s: float
    ) -> R:
        """Ask, and wait for the answer."""
        subject = self.name(service.request, tokens)
        answer = await self._connection.request(subject, _checked(service.request, message), deadline_s)
        try:
            return decode(service.reply, answer.data)
        except DecodeError as exc:
            self._dropped.inc(service.request.pattern, "undecodable reply")
            raise BusTimeout(subject, deadline_s) from exc

    def call(
        self,
        service: Service[Any, Any],
        message: msgspec.Struct,
        tokens: tuple[str, ...],
        deadline_s: float,
        settled: Callable[[Any], None],
    ) -> None:
        """Ask, and have `settled` called with the answer."""
        subject = self.name(service.request, tokens)

        def settle(answer: Message | BusError) -> None:
            if isinstance(answer, BusError):
                settled(answer)
                return
            try:
                reply = decode(service.reply, answer.data)
            except DecodeError:
                self._dropped.inc(service.request.pattern, "undecodable reply")
                settled(BusTimeout(subject, deadline_s))
                return
            settled(reply)

        self._connection.call(subject, _checked(service.request, message), deadline_s, settle)

    async def subscribe(
        self,
        subject: Subject[Any],
        handler: Callable[[Any], None],
        tokens: tuple[str, ...],
        skip: Callable[[bytes], bool] | None,
    ) -> RawSubscription:
        """Deliver every message but those to skip."""

        def handle(message: Message) -> None:
            if skip is None or not skip(message.data):
                self.guarded(subject, message.data, handler)

        return await self._subscribe(subject, handle, tokens, "", None)

    async def serve(
        self,
        service: Service[Any, Any],
        handler: Callable[[Any], Any],
        tokens: tuple[str, ...],
        then: Callable[[], None] | None,
    ) -> RawSubscription:
        """Answer requests; `then` is called once answers are on their way."""
        request = service.request

        def handle(message: Message) -> None:
            answer = self.guarded(request, message.data, handler)
            if answer is not None and message.reply:
                trouble = self._connection.send(message.reply, encode(answer))
                if trouble:
                    self._dropped.inc(request.pattern, f"reply: {trouble}")

        return await self._subscribe(request, handle, tokens, request.queue_group, then)

    async def _subscribe(
        self,
        subject: Subject[Any],
        handle: Callable[[Message], None],
        tokens: tuple[str, ...],
        queue: str,
        then: Callable[[], None] | None,
    ) -> RawSubscription:
        name = subject.name(*tokens) if tokens else subject.pattern
        return await self._connection.subscribe(
            name,
            handle,
            queue=queue,
            pending_messages=subject.pending_messages,
            label=subject.pattern,
            then=then,
        )

    def guarded(self, subject: Subject[Any], data: bytes, handler: Callable[[Any], Any]) -> Any:
        """What `handler` makes of a message, None of one that is not to be had or made it fail."""
        if len(data) > subject.max_bytes:
            self._dropped.inc(subject.pattern, "over the bound")
            return None
        try:
            return handler(decode(subject.message, data))
        except DecodeError as exc:
            self._dropped.inc(subject.pattern, "undecodable")
            log.debug("%s: %s", subject.pattern, exc)
        except Exception:
            # The port's contract: a handler's fault costs its message, not the subscription.
            self._dropped.inc(subject.pattern, "handler failed")
            log.exception("handler of %s failed", subject.pattern)
        return None

    def write(
        self, subject: str, payload: bytes, headers: Mapping[str, str], read: Callable[[str, bytes], T]
    ) -> asyncio.Future[T]:
        """Store one message; `read` makes the result of its subject and acknowledgement."""
        stored: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def settle(answer: Message | BusError) -> None:
            if stored.done():
                return
            if isinstance(answer, BusError):
                stored.set_exception(answer)
                return
            try:
                stored.set_result(read(subject, answer.data))
            except BusError as exc:
                stored.set_exception(exc)

        self._connection.call(subject, payload, WRITE_DEADLINE_S, settle, headers)
        return stored


def _checked(subject: Subject[Any], message: msgspec.Struct) -> bytes:
    payload = encode(message)
    if len(payload) > subject.max_bytes:
        raise MessageTooLarge(subject.pattern, len(payload), subject.max_bytes)
    return payload
