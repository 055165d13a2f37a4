"""Taking messages out of a stream as one of a group: a durable pull consumer of JetStream (ADR-13, ADR-15),
asked for one message at a time and without acknowledgements, so that each is given out at most once."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec

from penstock.common.adapters.nats_connection import NatsConnection, RawSubscription
from penstock.common.adapters.nats_streams import NANOSECONDS, Delivered, api
from penstock.common.adapters.nats_wire import Message
from penstock.common.errors import BusError, BusUnavailable

log = logging.getLogger(__name__)

# One request waits this long at the server; a frozen server is noticed this much later.
PULL_S, MARGIN_S = 5.0, 2.0
RETRY_S = 0.25
# One is asked for at a time; a few more can be left of requests that were given up.
MAX_ARRIVED = 8
_NOTHING_CAME = frozenset({"404", "408"})
_takers = itertools.count(1)


async def take(
    connection: NatsConnection, stream: str, group: str, ensure_stream: Callable[[], Awaitable[None]]
) -> AsyncGenerator[tuple[Message, int], None]:
    """Messages, each with the number of those that left the stream before the group could take them."""
    taker = _Taker(connection, stream, group)
    await taker.open()
    known = False
    try:
        while True:
            await connection.wait_connected()
            try:
                if not known:
                    await ensure_stream()
                    await taker.ensure()
                    known = True
                message = await taker.next()
                delivered = message and Delivered.parse(message)
            except BusError as exc:
                # Also when the server has come back without the stream.
                log.debug("taking from %s: %s", stream, exc)
                known = False
                await asyncio.sleep(RETRY_S)
                continue
            if delivered:
                yield delivered.message, delivered.stream_sequence - delivered.consumer_sequence
    finally:
        await taker.close()


class _Taker:
    def __init__(self, connection: NatsConnection, stream: str, group: str) -> None:
        self._connection, self._stream, self._group = connection, stream, group
        self._inbox = f"{connection.inbox}.taken.{next(_takers):x}"
        self._arrived: asyncio.Queue[Message | None] = asyncio.Queue(MAX_ARRIVED)
        self._subscription: RawSubscription | None = None

    async def open(self) -> None:
        self._connection.listeners.append(self._on_connection)
        self._subscription = await self._connection.subscribe(
            self._inbox, self._put, pending_messages=MAX_ARRIVED, label=f"taken from {self._stream}"
        )

    async def close(self) -> None:
        self._connection.listeners.remove(self._on_connection)
        if self._subscription is not None:
            await self._subscription.close()

    async def ensure(self) -> None:
        """Make the consumer unless it exists. Raises BusError."""
        config = {
            "durable_name": self._group,
            "name": self._group,
            "ack_policy": "none",
            "deliver_policy": "all",
            "mem_storage": True,
        }
        body = {"stream_name": self._stream, "config": config}
        await api(self._connection, f"CONSUMER.CREATE.{self._stream}.{self._group}", body)

    async def next(self) -> Message | None:
        """The next message; None if none came for a while. Raises BusError."""
        # What a request left behind that was given up is as good as what this one brings.
        if self._arrived.empty():
            request = msgspec.json.encode({"batch": 1, "expires": int(PULL_S * NANOSECONDS)})
            call = f"$JS.API.CONSUMER.MSG.NEXT.{self._stream}.{self._group}"
            trouble = self._connection.send(call, request, self._inbox)
            if trouble:
                raise BusUnavailable(call, trouble)
        try:
            async with asyncio.timeout(PULL_S + MARGIN_S):
                message = await self._arrived.get()
        except TimeoutError:
            return None
        if message is None:
            raise BusUnavailable(self._stream, "connection lost")
        if message.subject != self._inbox:
            return message
        # The server's own word.
        status = message.headers.get("Status")
        if status in _NOTHING_CAME:
            return None
        raise BusUnavailable(self._stream, f"status {status} {message.headers.get('Description', '')}")

    def _on_connection(self, up: bool) -> None:
        if not up:
            self._put(None)

    def _put(self, message: Message | None) -> None:
        if not self._arrived.full():
            self._arrived.put_nowait(message)
