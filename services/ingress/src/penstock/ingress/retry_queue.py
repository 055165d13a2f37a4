"""Requests that an endpoint answered with 429: who waits, until when, and who may go."""

from __future__ import annotations

import heapq
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class RetryQueue(Generic[T]):
    """At most `size` wait, at most `workers` of those who waited are under way at a time, in order of their
    time. Moments are of one monotonic clock, in seconds."""

    def __init__(self, size: int, workers: int) -> None:
        self._size, self._workers = size, workers
        self._numbers = 0
        # Who waits -> number of the entry that counts; others of the heap are of those who left.
        self._waiting: dict[T, int] = {}
        self._heap: list[tuple[float, int, T]] = []
        self._ready: deque[tuple[int, T]] = deque()
        self._working: set[T] = set()

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def working(self) -> int:
        """Those under way."""
        return len(self._working)

    def enter(self, who: T, due: float) -> bool:
        """Wait until `due`; False if the queue is full."""
        if len(self._waiting) >= self._size:
            return False
        self._numbers += 1
        self._waiting[who] = self._numbers
        heapq.heappush(self._heap, (due, self._numbers, who))
        return True

    def leave(self, who: T) -> None:
        """It waits no longer, or is under way no longer; of others nothing happens."""
        self._waiting.pop(who, None)
        self._working.discard(who)
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._waiting):
            self._heap = [entry for entry in self._heap if self._waiting.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def take(self, now: float) -> list[T]:
        """Those whose time has come and for whom there is a worker; each is under way until it leaves."""
        while self._heap and self._heap[0][0] <= now:
            _, number, who = heapq.heappop(self._heap)
            self._ready.append((number, who))
        taken = []
        while self._ready and len(self._working) < self._workers:
            number, who = self._ready.popleft()
            if self._waiting.get(who) == number:
                del self._waiting[who]
                self._working.add(who)
                taken.append(who)
        return taken

    def next_due(self) -> float | None:
        """When somebody's time comes next; None if only workers are waited for, or nobody waits."""
        while self._heap and self._waiting.get(self._heap[0][2]) != self._heap[0][1]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
