"""Streams of the memory bus: what is stored, read by followers and shared by takers."""

from __future__ import annotations

import asyncio
import fnmatch
import time
from collections.abc import AsyncGenerator, Mapping

from penstock.common.bus import Stored
from penstock.common.errors import BusUnavailable
from penstock.common.subjects import Stream


class MemoryStream:
    """One stream: keeps everything, and shows takers no more than its bounds leave."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._patterns = [subject.replace(">", "*") for subject in stream.subjects]
        self._seen: dict[str, int] = {}
        self.messages: list[Stored] = []
        # How far each group has come, and how much it was given.
        self._taken: dict[str, tuple[int, int]] = {}

    def covers(self, subject: str) -> bool:
        """Whether messages of `subject` are stored here."""
        return any(fnmatch.fnmatchcase(subject, pattern) for pattern in self._patterns)

    def store(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> int:
        """The sequence of the message; a repeated `Nats-Msg-Id` is stored once."""
        message_id = headers.get("Nats-Msg-Id", "")
        if message_id in self._seen:
            return self._seen[message_id]
        sequence = len(self.messages) + 1
        self.messages.append(Stored(subject, sequence, time.time(), dict(headers), payload))
        if message_id:
            self._seen[message_id] = sequence
        return sequence

    def take(self, group: str) -> tuple[Stored, int] | None:
        """The next message for `group`, and how many left before it could take them."""
        sequence, given = self._taken.get(group, (0, 0))
        sequence = max(sequence, self._left())
        if sequence >= len(self.messages):
            return None
        self._taken[group] = sequence + 1, given + 1
        return self.messages[sequence], sequence - given

    def _left(self) -> int:
        """Messages that the bounds have pushed out; they are the oldest."""
        size, oldest = 0, time.time() - self._stream.max_age_s
        for index in range(len(self.messages) - 1, -1, -1):
            size += len(self.messages[index].payload)
            if size > self._stream.max_bytes or self.messages[index].time_s < oldest:
                return index + 1
        return 0


class MemoryStreams:
    """All streams of a broker, and who waits for something to be stored."""

    def __init__(self) -> None:
        self.by_name: dict[str, MemoryStream] = {}
        self._waiting: set[asyncio.Event] = set()

    def ensure(self, stream: Stream) -> None:
        """Create it unless it exists."""
        self.by_name.setdefault(stream.name, MemoryStream(stream))

    def store(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> int | None:
        """The message's sequence; None if no stream covers it."""
        stream = next((one for one in self.by_name.values() if one.covers(subject)), None)
        if stream is None:
            return None
        sequence = stream.store(subject, payload, headers)
        self.wake()
        return sequence

    def wake(self) -> None:
        """Something may have changed for who waits."""
        for event in self._waiting:
            event.set()

    async def follow(self, name: str, subject: str, since_s: float | None) -> AsyncGenerator[Stored, None]:
        """As the port's `follow`."""
        start = time.time() - since_s if since_s is not None else None
        held = self.by_name.get(name)
        position = len(held.messages) if held is not None and start is None else 0
        arrived = asyncio.Event()
        self._waiting.add(arrived)
        try:
            while True:
                if self.by_name.get(name) is not held:
                    held, position = self.by_name.get(name), 0
                while held is not None and position < len(held.messages):
                    message = held.messages[position]
                    position += 1
                    wanted = fnmatch.fnmatchcase(message.subject, subject)
                    if wanted and (start is None or message.time_s >= start):
                        yield message
                arrived.clear()
                await arrived.wait()
        finally:
            self._waiting.discard(arrived)

    async def read(
        self, name: str, subject: str, since_s: float | None, after: int
    ) -> AsyncGenerator[Stored, None]:
        """As the port's `read`; a stream that does not exist cannot be read."""
        start = time.time() - since_s if since_s is not None else None
        if (held := self.by_name.get(name)) is None:
            raise BusUnavailable(name, "there is no such stream")
        for message in held.messages:
            if (message.time_s >= start if start is not None else message.sequence > after) and (
                fnmatch.fnmatchcase(message.subject, subject)
            ):
                yield message

    async def stored(self) -> None:
        """Return after the next `wake`."""
        arrived = asyncio.Event()
        self._waiting.add(arrived)
        try:
            await arrived.wait()
        finally:
            self._waiting.discard(arrived)
