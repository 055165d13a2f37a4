"""Following a stream by reading it in pages (JetStream's batched direct get, ADR-31, NATS 2.11 or newer).

A page makes nothing on the server, so that whoever may read a stream like this may do nothing else
(penstock.common.permissions). Live messages say when there is something to read; what is given out is
always what the stream holds, in its order.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime
from typing import Any

import msgspec

from penstock.common.adapters.nats_connection import NatsConnection, RawSubscription
from penstock.common.adapters.nats_wire import Message
from penstock.common.bus import Stored
from penstock.common.errors import BusError, BusTimeout, BusUnavailable
from penstock.common.subjects import Stream

log = logging.getLogger(__name__)

PAGE_MESSAGES = 256
PAGE_BYTES = 4 * 1024 * 1024
PAGE_DEADLINE_S = 5.0
# Messages that come together are read together.
GATHER_S = 0.02
# A live message can be here before it is stored: after the last one the stream is read once more.
SETTLE_S = 0.1
CHECK_EVERY_S = 2.0
RETRY_S = 0.25
# What is read to its end is given up after so many failures in a row.
READ_RETRIES = 20
# Fields that the server adds to the message's own.
_ADDED = frozenset(
    f"Nats-{name}" for name in ("Stream", "Subject", "Sequence", "Time-Stamp", "Num-Pending", "Last-Sequence")
)
_END_OF_PAGE, _NONE_FOUND = "204", "404"
_readers = itertools.count(1)


async def follow(
    connection: NatsConnection, stream: Stream, subject: str, since_s: float | None
) -> AsyncGenerator[Stored, None]:
    """Messages of a stream in order, across reconnects; of a stream that is made anew, from its first."""
    reader, nudge = _Reader(connection, stream, subject, since_s), asyncio.Event()
    live = await connection.subscribe(
        subject, lambda _: nudge.set(), pending_messages=PAGE_MESSAGES, label=f"live {stream.name}"
    )
    wait_s = CHECK_EVERY_S
    try:
        await reader.open()
        while True:
            await connection.wait_connected()
            nudge.clear()
            try:
                while page := await reader.page():
                    for stored in page:
                        yield stored
            except BusError as exc:
                # A server that is there and silent does not permit it, or is older than pages are.
                level = logging.WARNING if isinstance(exc, BusTimeout) else logging.DEBUG
                log.log(level, "the stream %s cannot be read: %s", stream.name, exc)
                await asyncio.sleep(RETRY_S)
                continue
            nudged = await _within(nudge, wait_s)
            wait_s = SETTLE_S if nudged else CHECK_EVERY_S
            if nudged:
                await asyncio.sleep(GATHER_S)
    finally:
        await reader.close()
        await live.close()


async def read(
    connection: NatsConnection, stream: Stream, subject: str, since_s: float | None, after: int
) -> AsyncGenerator[Stored, None]:
    """Messages of a stream in order, up to its end. Raises BusError."""
    reader = _Reader(connection, stream, subject, since_s, after + 1)
    failures = 0
    try:
        await reader.open()
        while True:
            try:
                page = await reader.page()
            except BusError:
                failures += 1
                if failures > READ_RETRIES:
                    raise
                await asyncio.sleep(RETRY_S)
                continue
            failures = 0
            if not page:
                return
            for stored in page:
                yield stored
    finally:
        await reader.close()


class _Reader:
    """Where one follower is in its stream. Every page begins with the last message it has seen: another one
    in its place is of another stream under the same name."""

    def __init__(
        self,
        connection: NatsConnection,
        stream: Stream,
        subject: str,
        since_s: float | None,
        first: int = 0,
    ) -> None:
        """Without `since_s` it begins with the message `first`, or (0) after the last one there is."""
        self._connection, self._subject = connection, subject
        self._call = f"$JS.API.DIRECT.GET.{stream.name}"
        self._inbox = f"{connection.inbox}.pages.{next(_readers):x}"
        self._arrived: asyncio.Queue[Message | None] = asyncio.Queue(2 * PAGE_MESSAGES)
        self._pages = itertools.count(1)
        self._opened_at = time.time()
        self._from: dict[str, Any] = {"seq": first} if first else {}
        if since_s is not None:
            self._from = _since(self._opened_at - since_s)
        self._seen: Stored | None = None
        self._answers: RawSubscription | None = None

    async def open(self) -> None:
        self._connection.listeners.append(self._on_connection)
        self._answers = await self._connection.subscribe(
            f"{self._inbox}.*", self._on_message, pending_messages=2 * PAGE_MESSAGES, label="pages"
        )

    async def close(self) -> None:
        if self._answers is not None:
            self._connection.listeners.remove(self._on_connection)
            await self._answers.close()

    async def page(self) -> list[Stored]:
        """What comes next; empty at the end. Raises BusError."""
        if not self._from:
            await self._begin_at_the_end()
        bounds = {"next_by_subj": self._subject, "batch": PAGE_MESSAGES, "max_bytes": PAGE_BYTES}
        page = await self._ask({**self._from, **bounds})
        if self._seen is not None:
            if await self._is_another_stream(self._seen, page):
                self._seen, self._from = None, {"seq": 1}
                return await self.page()
            if page and page[0].sequence == self._seen.sequence:
                del page[0]
        if page:
            self._go_to(page[-1])
        return page

    async def _begin_at_the_end(self) -> None:
        try:
            last = await self._ask({"last_by_subj": self._subject})
        except BusUnavailable:
            # There is no stream yet: all of it will be new.
            self._from = _since(self._opened_at)
            raise
        if last:
            self._go_to(last[0])
        else:
            self._from = {"seq": 1}

    async def _is_another_stream(self, seen: Stored, page: list[Stored]) -> bool:
        if page:
            return page[0].sequence == seen.sequence and page[0].time_s != seen.time_s
        # What was seen has gone: by age, or with a stream whose successor has not come as far.
        last = await self._ask({"last_by_subj": self._subject})
        return bool(last) and last[0].sequence < seen.sequence and last[0].time_s > seen.time_s

    def _go_to(self, stored: Stored) -> None:
        self._seen, self._from = stored, {"seq": stored.sequence}

    async def _ask(self, request: dict[str, Any]) -> list[Stored]:
        number = f"{next(self._pages):x}"
        trouble = self._connection.send(self._call, msgspec.json.encode(request), f"{self._inbox}.{number}")
        if trouble:
            raise BusUnavailable(self._call, trouble)
        try:
            async with asyncio.timeout(PAGE_DEADLINE_S):
                return await self._collect(number, whole="batch" not in request)
        except TimeoutError:
            raise BusTimeout(self._call, PAGE_DEADLINE_S) from None

    async def _collect(self, number: str, *, whole: bool) -> list[Stored]:
        page: list[Stored] = []
        while True:
            message = await self._arrived.get()
            if message is None:
                raise BusUnavailable(self._call, "connection lost")
            if not message.subject.endswith(f".{number}"):
                continue
            # Not by its status: that can be stored with a message.
            if "Nats-Sequence" not in message.headers:
                status = message.headers.get("Status")
                if status in (_END_OF_PAGE, _NONE_FOUND):
                    return page
                raise BusUnavailable(self._call, f"status {status}")
            stored, before = self._stored(message)
            if before != (page[-1].sequence if page else 0):
                raise BusUnavailable(self._call, f"message {before} of a page is missing")
            page.append(stored)
            if whole:
                return page

    def _stored(self, message: Message) -> tuple[Stored, int]:
        """The message as it was stored, and the sequence of the one before it in the page."""
        headers = message.headers
        try:
            sequence, before = int(headers["Nats-Sequence"]), int(headers.get("Nats-Last-Sequence", 0))
            time_s = datetime.fromisoformat(headers["Nats-Time-Stamp"]).timestamp()
            subject = headers["Nats-Subject"]
        except (KeyError, ValueError) as exc:
            raise BusUnavailable(self._call, f"a message without its place: {exc!r}") from exc
        own = {name: value for name, value in headers.items() if name not in _ADDED}
        return Stored(subject, sequence, time_s, own, message.data), before

    def _on_message(self, message: Message) -> None:
        if not self._arrived.full():
            self._arrived.put_nowait(message)

    def _on_connection(self, up: bool) -> None:
        if not up and not self._arrived.full():
            self._arrived.put_nowait(None)


def _since(moment: float) -> dict[str, Any]:
    return {"start_time": datetime.fromtimestamp(moment, UTC).isoformat().replace("+00:00", "Z")}


async def _within(event: asyncio.Event, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
