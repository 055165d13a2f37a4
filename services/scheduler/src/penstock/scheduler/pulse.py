"""Pulse: whether the event loop keeps up, by turns that should come every so often.

A loop that lags steadily answers too late; one that stood still, as under SIGSTOP, has missed what happened
and finds questions in its buffers that nobody waits for any more.
"""

from __future__ import annotations

# Turns in a row that come too late before the loop lags; how long all is well before it does not.
LATE_TURNS, CALM_S = 3, 2.0
STALL_S = 1.0


class Pulse:
    """`now` is a monotonic clock in seconds."""

    def __init__(self, every_s: float, limit_s: float, now: float) -> None:
        """`limit_s` is the lateness from which on a turn is late; 0: never."""
        self._every_s, self._limit_s = every_s, limit_s
        self._turned_at, self._late_at, self._late_turns = now, now, 0
        self.lags = False

    def stalled_s(self, now: float) -> float:
        """How long the loop has stood still, 0 while it has not for long."""
        passed_s = now - self._turned_at
        return passed_s if passed_s >= STALL_S else 0.0

    def forgive(self, now: float) -> None:
        """The standstill is dealt with."""
        self._turned_at = now

    def turn(self, now: float) -> float:
        """A turn has come; its lateness in seconds. It leaves `lags` in step: late turns in a row begin it, a
        time without one of half the limit ends it."""
        late_s = max(0.0, now - self._turned_at - self._every_s)
        self._turned_at = now
        if not self._limit_s:
            return late_s
        if late_s > self._limit_s / 2:
            self._late_at = now
        self._late_turns = self._late_turns + 1 if late_s > self._limit_s else 0
        if self._late_turns >= LATE_TURNS:
            self.lags = True
        elif now - self._late_at >= CALM_S:
            self.lags = False
        return late_s
