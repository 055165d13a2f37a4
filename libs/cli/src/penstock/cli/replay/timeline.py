"""What happens later, on virtual time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count

# Called with its time, in seconds.
Call = Callable[[float], None]


class Timeline:
    """Calls in order of time, those of one time in the order in which they were entered."""

    def __init__(self) -> None:
        self._calls: list[tuple[float, int, Call]] = []
        self._numbers = count()

    def at(self, when_s: float, call: Call) -> None:
        """Have `call` called once time passes `when_s`."""
        heapq.heappush(self._calls, (when_s, next(self._numbers), call))

    def every(self, period_s: float, call: Call, first_s: float = 0.0) -> None:
        """Have it called again and again."""

        def again(now: float) -> None:
            call(now)
            self.at(now + period_s, again)

        self.at(first_s, again)

    def pass_to(self, now: float) -> None:
        """Let everything happen that is due by `now`."""
        while self._calls and self._calls[0][0] <= now:
            when_s, _, call = heapq.heappop(self._calls)
            call(when_s)
