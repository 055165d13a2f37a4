"""Echo: what the siblings are doing at this moment, as far as it can be guessed.

While placements are on their way to each other, each of R replicas sees the same gap and fills it, so that
an instance with room for ten gets 10 R. Two things are known without talking: how many placements of siblings
a replica usually hears of between one of its own and that one's return by the bus, which were made without
either knowing of the other; and, in a burst, that siblings see what this one sees and are asked in turn, so
that a placement of an earlier message that is still on its way stands for R - 1 elsewhere.

*Ranks.* The greater of the two, by instance, is what siblings are expected to add to an instance by the time
that they are heard. Each replica holds so many requests like the one in hand against the instances, times
their rank there, 0 to R - 1, another one for each replica: each begins with a part of the fleet of its own.
Where nobody is expected nothing changes; and since it counts for the uncached part of a prompt alone,
prefixes draw as ever.

*Echo.* A placement that was drawn by room alone, of a second message, counts R-fold until it comes back: the
siblings see the same room. One drawn by a prefix says nothing of what siblings, asked for other prompts, do.
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
# Share of the last placement in the mean of siblings' placements unseen.
_LAST = 0.05
# Placements expected on an instance below which nobody is, and what a change of them is worth showing.
_FEW, _CHANGE = 1 / 256, 0.25


class Echo:
    """Keeps `echo`, `echo_ms` and `rank` of the loads; `now` is a monotonic clock in seconds."""

    def __init__(self, loads: Loads) -> None:
        self._loads = loads
        # Placements made here and not come back: (until, slot, requests expected elsewhere, ms of prefill,
        # placements of siblings heard of before).
        self._under_way: deque[tuple[float, int, int, float, int]] = deque()
        self._replicas = 1
        self._ranks: dict[int, int] = {}
        # Of siblings: placements heard of, and the mean number that a placement is made without knowing.
        self._heard, self._unseen = 0, 0.0
        # The message in hand, and how many placements were under way when it came.
        self._message: object = None
        self._before = 0
        # What each rank counts as it is shown, in requests.
        self._shown = 0.0

    def rank(self, slots: Iterable[int], own: int, replicas: int) -> None:
        """`slots` in an order that all replicas share, this one the `own`-th (from 0) of `replicas`."""
        self._replicas = replicas
        self._ranks = {slot: (position + own) % replicas for position, slot in enumerate(slots)}
        if replicas < 2:
            self._unseen = 0.0
        self._show(self._expected())

    def placed_here(
        self, message: object, slot: int, uncached_tokens: int, now: float, *, by_prefix: bool = False
    ) -> None:
        """A placement of this replica, asked for by `message`; `by_prefix`: on an instance that holds a part
        of its prompt."""
        if self._replicas < 2:
            return
        if len(self._under_way) >= MAX_ECHOES:
            self._end(1)
        if message is not self._message:
            self._message, self._before = message, len(self._under_way)
        ms_each = uncached_tokens * self._loads.ms_per_token.item(slot)
        expected = 0 if by_prefix or not self._before else self._replicas - 1
        self._under_way.append((now + WINDOW_S, slot, expected, expected * ms_each, self._heard))
        if expected:
            self._add(slot, expected, expected * ms_each)
        self._adjust()

    def heard(self, placements: int) -> None:
        """So many placements of siblings came in."""
        self._heard += placements

    def came_back(self, placements: int) -> None:
        """So many placements of this replica, the oldest on their way, came back by the bus."""
        count = min(placements, len(self._under_way))
        for number in range(count):
            # One for each instance is as many as counts; after a snapshot thousands come in at once.
            unseen = min(self._heard - self._under_way[number][4], len(self._ranks))
            self._unseen += (unseen - self._unseen) * _LAST
        self._end(count)

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
            _, slot, expected, ms, _ = self._under_way.popleft()
            if expected:
                self._add(slot, -expected, -ms)
        self._before = max(0, self._before - count)
        self._adjust()

    def _add(self, slot: int, requests: int, ms: float) -> None:
        loads = self._loads
        loads.echo[slot] = max(0.0, loads.echo.item(slot) + requests)
        # Sums of floats: what is left when nothing is expected is rounding.
        loads.echo_ms[slot] = max(0.0, loads.echo_ms.item(slot) + ms) if loads.echo.item(slot) else 0.0
        loads.sum_up(slot)

    def _expected(self) -> float:
        """Placements of siblings by instance, 0..1, made by the time that they are heard."""
        unseen = max(self._unseen, (self._replicas - 1.0) * self._before)
        expected = min(1.0, unseen / len(self._ranks)) if self._ranks and self._replicas > 1 else 0.0
        return expected if expected >= _FEW else 0.0

    def _adjust(self) -> None:
        """Show what is expected, if it is another than what is shown."""
        expected, shown = self._expected(), self._shown
        if abs(expected - shown) > _CHANGE * max(expected, shown):
            self._show(expected)

    def _show(self, expected: float) -> None:
        self._shown = expected
        slots = np.fromiter(self._ranks.keys(), dtype=np.intp)
        self._loads.put_ranks(slots, np.fromiter(self._ranks.values(), dtype=np.float64) * expected)
