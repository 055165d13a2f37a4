"""Echo: what the siblings are doing at this moment, as far as it can be guessed.

While placements are on their way to each other, each of R replicas sees the same gap and fills it, so that
an instance with room for ten gets 10 R. Siblings see what this replica sees, and ingresses ask all in turn:
if a second message is decided here while placements of a first are on their way, siblings have had theirs,
and a placement stands for R - 1 that are under way elsewhere. It counts R-fold until it comes back by the
bus, since what siblings published before then has come in too: so the delay measures itself.

Counting by R alone, all replicas would choose the same instances and none the others. So in a burst each sees
an instance as busier by its rank there, 0 to R - 1, another one for each replica: rounding to multiples of R
with offsets 0..R - 1 adds up to what a single replica would have placed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy as np

from penstock.scheduler.loads import Loads

# A placement that does not come back, since the bus is lost, counts R-fold for so long.
WINDOW_S = 0.1
# Of placements on their way; past it the oldest count once.
MAX_ECHOES = 4096
# Share of the last placement in the mean prefill of one.
_LAST = 0.1


class Echo:
    """Keeps `echo`, `echo_ms`, `rank` and `rank_ms` of the loads; `now` is a monotonic clock in seconds."""

    def __init__(self, loads: Loads) -> None:
        self._loads = loads
        # Placements made here and not come back: (until, slot, requests expected elsewhere, ms of prefill).
        self._under_way: deque[tuple[float, int, int, float]] = deque()
        self._mean_ms, self._replicas, self._ranked = 0.0, 1, False
        self._ranks: dict[int, int] = {}
        # Decided while nothing was on its way: alone as far as is known.
        self._first: object = None

    def rank(self, slots: Iterable[int], own: int, replicas: int) -> None:
        """`slots` in an order that all replicas share, this one the `own`-th (from 0) of `replicas`."""
        self._replicas = replicas
        self._ranks = {slot: (position + own) % replicas for position, slot in enumerate(slots)}
        self._show_ranks(False)

    def placed_here(self, message: object, slot: int, uncached_tokens: int, now: float) -> None:
        """A placement of this replica, asked for by `message`."""
        if self._replicas < 2:
            return
        if len(self._under_way) >= MAX_ECHOES:
            self._end(1)
        if not self._under_way:
            self._first = message
        burst = message is not self._first
        expected = (self._replicas - 1) * burst
        ms_each = uncached_tokens * self._loads.ms_per_token.item(slot)
        self._mean_ms += (ms_each - self._mean_ms) * (_LAST if self._mean_ms else 1.0)
        self._under_way.append((now + WINDOW_S, slot, expected, expected * ms_each))
        if burst:
            self._add(slot, expected, expected * ms_each)
            if not self._ranked:
                self._show_ranks(True)

    def came_back(self, placements: int) -> None:
        """So many placements of this replica, the oldest on their way, came back by the bus."""
        self._end(min(placements, len(self._under_way)))

    def expire(self, now: float) -> None:
        """Give up what did not come back."""
        while self._under_way and self._under_way[0][0] <= now:
            self._end(1)

    def forget(self, slot: int) -> None:
        """The slot stands for another instance."""
        self._ranks.pop(slot, None)
        kept = (one for one in self._under_way if one[1] != slot)
        self._under_way = deque(kept)

    def _end(self, count: int) -> None:
        for _ in range(count):
            _, slot, expected, ms = self._under_way.popleft()
            if expected:
                self._add(slot, -expected, -ms)
        if self._ranked and not self._under_way:
            self._show_ranks(False)

    def _add(self, slot: int, requests: int, ms: float) -> None:
        loads = self._loads
        loads.echo[slot] = max(0.0, loads.echo.item(slot) + requests)
        # Sums of floats: what is left when nothing is expected is rounding.
        loads.echo_ms[slot] = max(0.0, loads.echo_ms.item(slot) + ms) if loads.echo.item(slot) else 0.0
        loads.sum_up(slot)

    def _show_ranks(self, shown: bool) -> None:
        self._ranked = shown
        loads = self._loads
        loads.rank.fill(0.0)
        loads.rank_ms.fill(0.0)
        if shown and self._ranks:
            slots = np.fromiter(self._ranks.keys(), dtype=np.intp)
            ranks = np.fromiter(self._ranks.values(), dtype=np.float64)
            loads.rank[slots] = ranks
            loads.rank_ms[slots] = ranks * self._mean_ms
        loads.sum_up_all()
