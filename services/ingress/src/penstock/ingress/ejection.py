"""Circuit breakers of what requests are sent to, and which instances are left out because of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

# Failures and successes are remembered for one to two of these.
WINDOW_S = 10.0
# Each further opening in a row lasts twice as long, up to so many times the first.
MOST_TIMES = 16
# A probe whose end is not heard of in this time is given up.
PROBE_S = 60.0
# Targets remembered; past it the whole memory begins anew.
MAX_TARGETS = 8192


class Circuit(StrEnum):
    """What a breaker lets through: all, nothing, or one probe at a time."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True)
class Limits:
    """When a breaker opens and for how long; `failures` in a row, or `percent` of at least `requests` within
    ten seconds. 0 switches a rule off. At most `ejected_percent` of a pool is left out."""

    failures: int
    percent: float
    requests: int
    open_s: float
    ejected_percent: float


class _Target:
    __slots__ = ("in_a_row", "ok", "old", "openings", "probe_until", "since", "state", "until", "wrong")

    def __init__(self, now: float) -> None:
        self.state = Circuit.CLOSED
        self.in_a_row = self.ok = self.wrong = self.openings = 0
        self.old = (0, 0)
        self.since = now
        self.until = self.probe_until = 0.0

    def roll(self, now: float) -> None:
        if now - self.since >= WINDOW_S:
            self.old = (self.ok, self.wrong) if now - self.since < 2 * WINDOW_S else (0, 0)
            self.ok = self.wrong = 0
            self.since = now


class Breakers:
    """One breaker per target. A target is remembered from its first failure on until it is well again, so
    that a fleet without failures costs nothing. Moments are of one monotonic clock, in seconds."""

    def __init__(self, limits: Limits, changed: Callable[[str, Circuit], None]) -> None:
        """`changed` hears of a target's new state."""
        self._limits, self._changed = limits, changed
        # Those that failed lately.
        self.targets: dict[str, _Target] = {}
        # Targets that are not closed.
        self.tripped: set[str] = set()

    def state(self, target: str) -> Circuit:
        """Of one target."""
        known = self.targets.get(target)
        return known.state if known is not None else Circuit.CLOSED

    def failed(self, target: str, now: float) -> None:
        """An attempt failed."""
        if target not in self.targets and len(self.targets) >= MAX_TARGETS:
            self.targets.clear()
            self.tripped.clear()
        known = self.targets.setdefault(target, _Target(now))
        known.roll(now)
        known.in_a_row += 1
        known.wrong += 1
        if known.state is Circuit.HALF_OPEN or (known.state is Circuit.CLOSED and self._trips(known)):
            self._open(target, known, now)

    def _trips(self, known: _Target) -> bool:
        limits = self._limits
        if limits.failures and known.in_a_row >= limits.failures:
            return True
        wrong, seen = known.wrong + known.old[1], known.wrong + known.ok + sum(known.old)
        return bool(limits.percent) and seen >= limits.requests and wrong * 100 >= limits.percent * seen

    def _open(self, target: str, known: _Target, now: float) -> None:
        known.state = Circuit.OPEN
        known.until = now + self._limits.open_s * min(2**known.openings, MOST_TIMES)
        known.openings = min(known.openings + 1, 16)
        known.probe_until = 0.0
        self.tripped.add(target)
        self._changed(target, Circuit.OPEN)

    def succeeded(self, target: str, now: float) -> None:
        """An attempt was answered well."""
        known = self.targets.get(target)
        if known is None:
            return
        known.roll(now)
        known.in_a_row = 0
        known.ok += 1
        if known.state is Circuit.HALF_OPEN:
            known.state = Circuit.CLOSED
            # What was before the outage is no reason to open it again.
            known.ok = known.wrong = 0
            known.old = (0, 0)
            self.tripped.discard(target)
            self._changed(target, Circuit.CLOSED)
        elif known.state is Circuit.CLOSED and not known.wrong and not known.old[1]:
            del self.targets[target]

    def undecided(self, target: str) -> None:
        """An attempt ended and says nothing about the target: a probe is free again."""
        known = self.targets.get(target)
        if known is not None:
            known.probe_until = 0.0

    def allows(self, target: str, now: float) -> bool:
        """Whether a request may go there: not while it is open, nor while a probe is under way."""
        known = self.targets.get(target)
        if known is None or known.state is Circuit.CLOSED:
            return True
        if known.state is Circuit.OPEN and now >= known.until:
            known.state = Circuit.HALF_OPEN
            self._changed(target, Circuit.HALF_OPEN)
        return known.state is Circuit.HALF_OPEN and now >= known.probe_until

    def sent(self, target: str, now: float) -> None:
        """A request goes there: of one that is half open it is the probe."""
        known = self.targets.get(target)
        if known is not None and known.state is Circuit.HALF_OPEN:
            known.probe_until = now + PROBE_S

    def ejected(self, pool: Iterable[str], now: float) -> tuple[str, ...]:
        """Which of a pool to leave out: those not allowed, those that failed most in a row first, and never
        more of them than `ejected_percent` of the pool."""
        members = set(pool)
        out = [target for target in self.tripped & members if not self.allows(target, now)]
        most = int(len(members) * self._limits.ejected_percent / 100)
        return tuple(sorted(out, key=lambda target: (-self.targets[target].in_a_row, target))[:most])

    def forget(self, gone: Callable[[str], bool]) -> None:
        """Drop those that exist no more."""
        for target in [target for target in self.targets if gone(target)]:
            del self.targets[target]
            self.tripped.discard(target)
