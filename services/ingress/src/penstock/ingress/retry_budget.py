"""How many retries there may be: a share of the requests, so that retries never amplify an outage."""

from __future__ import annotations

# Retries that may come at once after quiet times.
BURST = 100.0


class RetryBudget:
    """Every request earns `percent` / 100 of a retry, every second `per_second`; each retry spends one."""

    def __init__(self, percent: float, per_second: float) -> None:
        self._share, self._per_second = percent / 100, per_second
        self._balance = min(BURST, 10 * per_second)
        self._requests, self._asked_at = 0, 0.0

    def spend(self, requests: int, now: float) -> bool:
        """Whether one more retry may be made at `now` (seconds), with `requests` seen since the start."""
        if self._asked_at:
            self._balance += (now - self._asked_at) * self._per_second
        self._balance = min(BURST, self._balance + (requests - self._requests) * self._share)
        self._requests, self._asked_at = requests, now
        if self._balance < 1:
            return False
        self._balance -= 1
        return True
