"""Figures of many rounds: medians, and comparisons made inside each round before they are summed up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple


class Spread(NamedTuple):
    """The median of some rounds, and between what they lay."""

    median: float
    low: float
    high: float


class Results:
    """(measure, way, metric) to one figure for each round; nan is no figure."""

    def __init__(self) -> None:
        self._figures: dict[tuple[str, str, str], dict[int, float]] = {}

    def add(self, measure: str, way: str, number: int, figures: Mapping[str, float]) -> None:
        """What round `number` gave."""
        for metric, value in figures.items():
            if not math.isnan(value):
                self._figures.setdefault((measure, way, metric), {})[number] = value

    def spread(self, measure: str, way: str, metric: str) -> Spread | None:
        """None if no round gave a figure."""
        return _spread(self._figures.get((measure, way, metric), {}).values())

    def ratio(self, measure: str, way: str, metric: str, base: str) -> Spread | None:
        """To the way `base`, round by round."""
        return self._compared(measure, way, metric, base, lambda a, b: a / b if b else math.nan)

    def added(self, measure: str, way: str, metric: str, base: str) -> Spread | None:
        """What comes on top of the way `base`, round by round."""
        return self._compared(measure, way, metric, base, lambda a, b: a - b)

    def everywhere(self, metric: str) -> Spread | None:
        """Of a metric in all measures and ways."""
        every = (rounds.values() for (_, _, name), rounds in self._figures.items() if name == metric)
        return _spread(value for values in every for value in values)

    def _compared(
        self, measure: str, way: str, metric: str, base: str, compare: Callable[[float, float], float]
    ) -> Spread | None:
        ours = self._figures.get((measure, way, metric), {})
        theirs = self._figures.get((measure, base, metric), {})
        both = [compare(ours[number], theirs[number]) for number in sorted(ours.keys() & theirs.keys())]
        return _spread(value for value in both if not math.isnan(value))

    def as_dict(self) -> dict[str, dict[str, dict[str, list[float]]]]:
        """Measure, way, metric: the figures in the order of the rounds."""
        plain: dict[str, dict[str, dict[str, list[float]]]] = {}
        for (measure, way, metric), rounds in sorted(self._figures.items()):
            values = [rounds[number] for number in sorted(rounds)]
            plain.setdefault(measure, {}).setdefault(way, {})[metric] = values
        return plain


def _spread(values: Iterable[float]) -> Spread | None:
    kept = list(values)
    return Spread(statistics.median(kept), min(kept), max(kept)) if kept else None
