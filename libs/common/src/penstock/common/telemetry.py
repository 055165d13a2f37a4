"""Metrics as plain numbers that are exported on scrape, and JSON log lines.

Snapshots of several processes add up, so that one listener can answer for all of them.
"""

from __future__ import annotations

import logging
import operator
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TextIO

import msgspec

from penstock.common.cells import Cell as Cell
from penstock.common.cells import HistogramCell as HistogramCell

SECONDS_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    120.0,
)
# Of what takes less than a millisecond when all is well.
FAST_SECONDS_BUCKETS = (0.0001, 0.00025, 0.0005, *SECONDS_BUCKETS[:10])
# Label values come from a closed set or from the instance table; past this many, one cell takes the rest.
MAX_CELLS = 4096
OVERFLOW = "other"

Kind = Literal["counter", "gauge", "histogram"]
# What a gauge of several processes is: their sum, or the one that says most of the whole.
Over = Literal["sum", "max", "min"]


class Sample(msgspec.Struct, array_like=True):
    """One cell of a snapshot: `counts` is empty unless the family is a histogram."""

    labels: tuple[str, ...]
    value: float
    counts: list[int] = []


class FamilySnapshot(msgspec.Struct, array_like=True):
    """All cells of one metric."""

    name: str
    kind: Kind
    help: str
    label_names: tuple[str, ...]
    bounds: tuple[float, ...]
    samples: list[Sample]
    over: Over = "sum"


Snapshot = list[FamilySnapshot]


class Counter:
    """A metric with labels; `labels(...)` gives the cell to keep and add to."""

    def __init__(
        self,
        name: str,
        help_text: str,
        label_names: tuple[str, ...],
        kind: Kind = "counter",
        over: Over = "sum",
    ) -> None:
        self.name, self.help, self.label_names = name, help_text, label_names
        self.kind, self.over = kind, over
        self.cells: dict[tuple[str, ...], Cell] = {}
        if not label_names:
            self.cells[()] = Cell()

    def labels(self, *values: str) -> Cell:
        """The cell of these label values, made at the first call."""
        cell = self.cells.get(values)
        if cell is None:
            if len(self.cells) >= MAX_CELLS:
                values = (OVERFLOW,) * len(self.label_names)
            cell = self.cells.setdefault(values, Cell())
        return cell

    def inc(self, *values: str, by: float = 1) -> None:
        """Add to the cell of these label values."""
        self.labels(*values).value += by

    def snapshot(self) -> FamilySnapshot:
        """All cells as values."""
        samples = [Sample(labels, cell.value) for labels, cell in self.cells.items()]
        return FamilySnapshot(self.name, self.kind, self.help, self.label_names, (), samples, self.over)


class Gauge:
    """Values read at scrape time: `read` gives (label values, value) pairs."""

    def __init__(
        self,
        name: str,
        help_text: str,
        label_names: tuple[str, ...],
        read: Callable[[], Iterable[tuple[tuple[str, ...], float]]],
        kind: Kind = "gauge",
        over: Over = "sum",
    ) -> None:
        self.name, self.help, self.label_names, self.read = name, help_text, label_names, read
        self.kind, self.over = kind, over

    def snapshot(self) -> FamilySnapshot:
        """What `read` says at this moment."""
        samples = [Sample(labels, value) for labels, value in self.read()]
        return FamilySnapshot(self.name, self.kind, self.help, self.label_names, (), samples, self.over)


class Histogram:
    """A distribution without labels, or one per label value."""

    kind: Kind = "histogram"

    def __init__(
        self, name: str, help_text: str, label_names: tuple[str, ...], bounds: Sequence[float]
    ) -> None:
        self.name, self.help, self.label_names, self.bounds = name, help_text, label_names, tuple(bounds)
        self.cells: dict[tuple[str, ...], HistogramCell] = {}

    def labels(self, *values: str) -> HistogramCell:
        """The cell of these label values."""
        cell = self.cells.get(values)
        if cell is None:
            if len(self.cells) >= MAX_CELLS:
                values = (OVERFLOW,) * len(self.label_names)
            cell = self.cells.setdefault(values, HistogramCell(self.bounds))
        return cell

    def snapshot(self) -> FamilySnapshot:
        """All cells as values."""
        samples = [Sample(labels, cell.total, list(cell.counts)) for labels, cell in self.cells.items()]
        return FamilySnapshot(self.name, "histogram", self.help, self.label_names, self.bounds, samples)


Read = Callable[[], float] | Callable[[], Iterable[tuple[tuple[str, ...], float]]]


def _pairs(read: Read) -> Callable[[], Iterable[tuple[tuple[str, ...], float]]]:
    def pairs() -> Iterable[tuple[tuple[str, ...], float]]:
        value = read()
        return [((), float(value))] if isinstance(value, int | float) else value

    return pairs


class Metrics:
    """All metrics of one process; names start with `penstock_` and end in their unit."""

    def __init__(self) -> None:
        self._families: dict[str, Counter | Gauge | Histogram] = {}

    def counter(self, name: str, help_text: str, *label_names: str) -> Counter:
        """A number that only grows; the same one at a repeated call."""
        family = self._families.get(name)
        if not isinstance(family, Counter):
            family = self._families[name] = Counter(name, help_text, label_names)
        return family

    def gauge(
        self,
        name: str,
        help_text: str,
        read: Read,
        *label_names: str,
        over: Over = "sum",
    ) -> None:
        """A number read at scrape time; with labels, `read` gives (label values, value) pairs. `over`: what
        the value for several processes is."""
        self._families[name] = Gauge(name, help_text, label_names, _pairs(read), over=over)

    def tally(self, name: str, help_text: str, read: Read, *label_names: str) -> None:
        """A counter that is kept elsewhere and read at scrape time."""
        self._families[name] = Gauge(name, help_text, label_names, _pairs(read), "counter")

    def level(self, name: str, help_text: str, *label_names: str, over: Over = "sum") -> Counter:
        """A gauge that is set; the same one at a repeated call."""
        family = self._families.get(name)
        if not isinstance(family, Counter):
            family = self._families[name] = Counter(name, help_text, label_names, "gauge", over)
        return family

    def histogram(
        self, name: str, help_text: str, *label_names: str, bounds: Sequence[float] = SECONDS_BUCKETS
    ) -> Histogram:
        """A distribution."""
        family = self._families.get(name)
        if not isinstance(family, Histogram):
            family = self._families[name] = Histogram(name, help_text, label_names, bounds)
        return family

    def declared(self) -> Snapshot:
        """What there is, without any values."""
        return [
            FamilySnapshot(one.name, one.kind, one.help, one.label_names, (), [])
            for one in self._families.values()
        ]

    def snapshot(self) -> Snapshot:
        """Everything, as values that can be sent to another process."""
        return [family.snapshot() for family in self._families.values()]


_MERGED: dict[Over, Callable[[float, float], float]] = {"sum": operator.add, "max": max, "min": min}


def merge(snapshots: Iterable[Snapshot]) -> Snapshot:
    """All processes as one, cell by cell: sums, and of a gauge what it says of several."""
    merged: dict[str, tuple[FamilySnapshot, dict[tuple[str, ...], Sample]]] = {}
    for family in (family for snapshot in snapshots for family in snapshot):
        cells = merged.setdefault(family.name, (family, {}))[1]
        for sample in family.samples:
            held = cells.get(sample.labels)
            if held is None:
                cells[sample.labels] = Sample(sample.labels, sample.value, list(sample.counts))
            else:
                held.value = _MERGED[family.over](held.value, sample.value)
                held.counts = [a + b for a, b in zip(held.counts, sample.counts, strict=True)]
    return [msgspec.structs.replace(head, samples=list(cells.values())) for head, cells in merged.values()]


def timestamp(seconds: float) -> str:
    """Unix time as UTC in ISO 8601 with ms."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return f"{stamp}.{int(seconds % 1 * 1000):03d}Z"


class JsonFormatter(logging.Formatter):
    """One JSON object a line; fields come from `extra={"fields": {...}}`."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """Time is UTC, in ISO 8601 with ms."""
        line: dict[str, Any] = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "service": self._service,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure_logging(service: str, level: str, stream: TextIO = sys.stderr) -> None:
    """Route every logger of the process through one JSON handler."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
