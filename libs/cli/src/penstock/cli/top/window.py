"""Sums over the last seconds."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable


class Window:
    """Amounts by key, in buckets of one second; `seconds` of them count. Times are Unix seconds."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        self._buckets: dict[int, Counter[Hashable]] = {}

    def add(self, at: float, key: Hashable, amount: float = 1.0) -> None:
        """An amount that belongs to the time `at`; one older than the window is of no account."""
        second = int(at)
        if self._buckets and second <= max(self._buckets) - self.seconds:
            return
        bucket = self._buckets.get(second)
        if bucket is None:
            bucket = self._buckets[second] = Counter()
            for old in [one for one in self._buckets if one <= max(self._buckets) - self.seconds]:
                del self._buckets[old]
        bucket[key] += amount  # type: ignore[assignment]  # Counter is typed for whole numbers

    def totals(self, now: float) -> Counter[Hashable]:
        """Sums of the window's seconds up to `now`, by key."""
        summed: Counter[Hashable] = Counter()
        for second, bucket in self._buckets.items():
            if now - self.seconds < second <= now + 1:
                summed.update(bucket)
        return summed


class Latest:
    """The last values, at most `size`, for quantiles."""

    def __init__(self, seconds: float, size: int = 4096) -> None:
        self._seconds = seconds
        self._held: deque[tuple[float, float]] = deque(maxlen=size)

    def add(self, at: float, value: float) -> None:
        """A value of the time `at`."""
        self._held.append((at, value))

    def quantiles(self, now: float, *which: float) -> tuple[float | None, ...]:
        """Quantiles (0..1) of the values not older than the window; None without any."""
        values = sorted(value for at, value in self._held if at > now - self._seconds)
        if not values:
            return tuple(None for _ in which)
        return tuple(values[min(len(values) - 1, int(len(values) * one))] for one in which)
