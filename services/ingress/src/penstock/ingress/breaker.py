"""Whether to ask the schedulers at all (DESIGN D5)."""

from __future__ import annotations

from typing import Final

TRIP_AFTER: Final = 3
PROBE_EVERY_S: Final = 0.2


class BusBreaker:
    """Opens after three attempts in a row without an answer; then lets one through per 200 ms."""

    def __init__(self) -> None:
        self._failures = 0
        self._next_probe = 0.0

    @property
    def open(self) -> bool:
        """Whether requests are placed locally without asking."""
        return self._failures >= TRIP_AFTER

    def may_ask(self, now: float) -> bool:
        """Whether an attempt may be made; while open, true once per probe interval."""
        if not self.open:
            return True
        if now < self._next_probe:
            return False
        self._next_probe = now + PROBE_EVERY_S
        return True

    def answered(self) -> bool:
        """An attempt was answered; True if that closed the breaker."""
        was_open = self.open
        self._failures = 0
        return was_open

    def failed(self, now: float) -> bool:
        """An attempt was not answered; True if that opened the breaker."""
        was_open = self.open
        self._failures += 1
        if self.open and not was_open:
            self._next_probe = now + PROBE_EVERY_S
        return self.open and not was_open
