"""Ages: how old what a replica knows is."""

from __future__ import annotations

import math

import numpy as np

from penstock.common.bus import Lost, WatchEvent
from penstock.common.routing_events import ViewAge
from penstock.scheduler.ledger import InFlightLedger
from penstock.scheduler.loads import Loads

# Worked out once in so long: it takes as long as a fifth of a decision.
AGES_S = 0.01


class Ages:
    """Told what came; `now` is a monotonic clock in seconds."""

    def __init__(self) -> None:
        self._blind, self._blind_since = True, math.inf
        self._fed_at = -math.inf
        self._worked_out_at, self._last = -math.inf, ViewAge()

    def registry(self, event: WatchEvent) -> None:
        """While the watch is lost, the registry gets older."""
        blind = isinstance(event, Lost)
        if blind and not self._blind:
            self._blind_since = math.inf
        self._blind = blind

    def fed(self, now: float) -> None:
        """A sibling's placements came."""
        self._fed_at = now

    def of(self, ledger: InFlightLedger, loads: Loads, behind: int, now: float) -> ViewAge:
        """As of `now`, or of at most AGES_S before."""
        if 0 <= now - self._worked_out_at < AGES_S:
            return self._last
        self._worked_out_at = now
        self._blind_since = min(self._blind_since, now)
        status_at = loads.status_at[np.isfinite(loads.status_at)]
        self._last = ViewAge(
            _ms(now - self._blind_since) if self._blind else 0.0,
            _ms(ledger.silent_s(now)),
            _ms(now - float(status_at.min())) if len(status_at) else -1.0,
            _ms(now - self._fed_at),
            behind,
        )
        return self._last


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1) if math.isfinite(seconds) else -1.0
