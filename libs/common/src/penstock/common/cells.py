"""What metrics are kept in: plain numbers, exported on scrape.

A labelled counter of a metrics library costs 1-3 us an increment; a `Cell` is an attribute.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

# A name of another module costs machine code a look into a dictionary, each time.
_bucket: Final = bisect_left


class Cell:
    """One number; add to `value` directly."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0


class HistogramCell:
    """Counts per bucket (upper bounds in `bounds`, one more for the rest) and the sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in the metric's unit."""
        self.counts[_bucket(self.bounds, value)] += 1
        self.total += value
