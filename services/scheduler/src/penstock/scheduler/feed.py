"""The feed of placements between replicas: cut to size and numbered going out, gaps seen coming in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from penstock.common.codec import DecodeError, decode
from penstock.common.identity import Identity
from penstock.common.messages import MAX_BATCH, MAX_WRITERS, KvEvents, Placed, PlacedFeed, WriterPosition
from penstock.scheduler.entries import FeedHead

# Half of what the subject allows: one placement is at most 17 KiB, its names included.
MAX_FEED_BYTES = 128 * 1024
# Placements that wait for a snapshot; with 64 new blocks each they take 35 MB.
MAX_BACKLOG = 65_536
PLACEMENT_BYTES = 512
# Within them a message names its writer: a name takes 128 at most.
HEAD_BYTES: Final = 144


class FeedWriter:
    """Numbers this replica's placements from 1."""

    def __init__(self, own: Identity) -> None:
        self._own = own
        self._next = 1

    def position(self) -> WriterPosition:
        """The last placement told."""
        return WriterPosition(self._own.id, self._own.incarnation, self._next - 1)

    def marker(self) -> PlacedFeed:
        """A message without placements, to be found again."""
        return PlacedFeed(self._own.id, self._own.incarnation, self._next, ())

    def messages(self, placed: Sequence[Placed], confirm_within_s: float) -> Iterator[PlacedFeed]:
        """As few messages as their bounds allow."""
        start, size = 0, 0
        for position, one in enumerate(placed):
            size += len(one.tail) + 1024
            if position - start == MAX_BATCH or (size > MAX_FEED_BYTES and position > start):
                yield self._message(placed[start:position], confirm_within_s)
                start, size = position, len(one.tail) + 1024
        if placed[start:]:
            yield self._message(placed[start:], confirm_within_s)

    def _message(self, placed: Sequence[Placed], confirm_within_s: float) -> PlacedFeed:
        first, self._next = self._next, self._next + len(placed)
        return PlacedFeed(self._own.id, self._own.incarnation, first, tuple(placed), confirm_within_s)


class FeedReader:
    """Follows the sequences of the other replicas."""

    def __init__(self, own: Identity) -> None:
        self._own = own
        self._next: dict[tuple[str, str], int] = {}
        self._id = own.id.encode()

    def own_placements(self, message: bytes) -> int:
        """How many placements a message of the feed holds if this replica wrote it, else -1. All else in it
        is known, and to decode it costs more than what comes of it."""
        if self._id not in message[:HEAD_BYTES]:
            return -1
        try:
            head = decode(FeedHead, message)
        except DecodeError:
            return -1
        own = head.replica == self._own.id and head.incarnation == self._own.incarnation
        return len(head.placed) if own else -1

    def is_own(self, feed: PlacedFeed) -> bool:
        """Whether this replica wrote it: what it says is applied already."""
        return (feed.replica, feed.incarnation) == (self._own.id, self._own.incarnation)

    def missed(self, feed: PlacedFeed) -> int:
        """Placements lost since the writer's last message; 0 at the first one heard of it."""
        writer = feed.replica, feed.incarnation
        expected = self._next.pop(writer, feed.first_sequence)
        if len(self._next) >= MAX_WRITERS:
            # The one that wrote longest ago; at worst one of its gaps goes uncounted.
            del self._next[next(iter(self._next))]
        self._next[writer] = max(expected, feed.first_sequence + len(feed.placed))
        return max(0, feed.first_sequence - expected)

    def positions(self) -> tuple[WriterPosition, ...]:
        """The last placement heard of each writer."""
        return tuple(WriterPosition(*writer, expected - 1) for writer, expected in self._next.items())

    def start_from(self, positions: Iterable[WriterPosition]) -> None:
        """What these name is known; what follows is expected."""
        for one in positions:
            writer = one.replica, one.incarnation
            if writer == (self._own.id, self._own.incarnation):
                continue
            self._next[writer] = max(one.sequence + 1, self._next.get(writer, 0))
            if len(self._next) > MAX_WRITERS:
                del self._next[next(iter(self._next))]


class Backlog:
    """What tells of prompts and waits until a snapshot is in: placements of siblings, and what engines say of
    their KV caches. Past the bound the oldest wait no longer."""

    def __init__(self) -> None:
        self._waiting: deque[PlacedFeed | KvEvents] = deque()
        # Of siblings; and with what engines say, in placements that take as much room.
        self.placements = self._size = 0

    def __len__(self) -> int:
        """Messages that wait."""
        return len(self._waiting)

    def put(self, message: PlacedFeed | KvEvents) -> Iterator[PlacedFeed | KvEvents]:
        """Let it wait; those that cannot any more."""
        self._waiting.append(message)
        self._count(message, 1)
        while self._size > MAX_BACKLOG:
            yield self._next()

    def take(self, placements: int) -> Iterator[PlacedFeed | KvEvents]:
        """The oldest, until they are as many placements, or as much work."""
        while self._waiting and placements > 0:
            message = self._next()
            placements -= _size(message)
            yield message

    def _next(self) -> PlacedFeed | KvEvents:
        message = self._waiting.popleft()
        self._count(message, -1)
        return message

    def _count(self, message: PlacedFeed | KvEvents, sign: int) -> None:
        self._size += sign * _size(message)
        if isinstance(message, PlacedFeed):
            self.placements += sign * len(message.placed)


def _size(message: PlacedFeed | KvEvents) -> int:
    if isinstance(message, PlacedFeed):
        return max(1, len(message.placed))
    return 1 + sum(len(change.hashes) for change in message.changes) // PLACEMENT_BYTES
