"""A bucket within one process; part of `memory_bus`."""

from __future__ import annotations

import asyncio
import itertools

from penstock.common.bus import Entry, Listing, Lost, Position, WatchEvent


class MemoryBucket:
    """Its entries, and those who watch them. With `exists` False there is none."""

    _made = itertools.count(1)

    def __init__(self) -> None:
        self.exists = self.vouched = False
        self.incarnation, self.sequence = "", 0
        self.entries: dict[str, Entry] = {}
        self.queues: list[asyncio.Queue[WatchEvent]] = []

    def create(self) -> None:
        """Empty, and as another one than any before."""
        self.exists, self.incarnation, self.sequence = True, f"memory-{next(self._made)}", 0
        self.entries.clear()
        self.reconnected()

    def position(self) -> Position:
        """Where its history has come to."""
        return Position(self.incarnation, self.sequence)

    def lost(self, cause: str) -> None:
        """Watches can no longer vouch for it."""
        if self.vouched:
            self.vouched = False
            self.tell(Lost(cause))

    def reconnected(self) -> None:
        """They can again, and list."""
        if self.exists:
            self.vouched = True
            self.tell(Listing(self.position(), dict(self.entries)))

    def tell(self, event: WatchEvent) -> None:
        """Each watch hears of it."""
        for queue in self.queues:
            if queue.full():
                # A watcher this far behind starts over, as it would on NATS.
                while not queue.empty():
                    queue.get_nowait()
                event = Listing(self.position(), dict(self.entries))
            queue.put_nowait(event)
