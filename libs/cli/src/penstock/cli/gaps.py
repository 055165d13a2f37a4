"""Missing numbers in the routing log, per writer and incarnation (DESIGN D2: no silent gap)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

MAX_WRITERS = 4096
MAX_GAPS = 64

Range = tuple[int, int]


@dataclass
class _Writer:
    expected: int
    missing: list[Range] = field(default_factory=list)


class GapTracker:
    """Told the range of every message; says which ranges are missing, and which came late.

    Memory is bounded: of more than `MAX_WRITERS` writers the one silent for longest is forgotten, of more
    than `MAX_GAPS` gaps of one writer the oldest.
    """

    def __init__(self) -> None:
        self._writers: OrderedDict[tuple[str, str], _Writer] = OrderedDict()

    @property
    def missing(self) -> int:
        """Events known to be missing."""
        ranges = (r for writer in self._writers.values() for r in writer.missing)
        return sum(last - first + 1 for first, last in ranges)

    def see(self, writer: str, incarnation: str, first: int, last: int) -> Range | None:
        """Take a message's range; the range that is missing before it, if this message shows one.

        What was written before the first message seen of a writer does not count as missing. A message
        that was sent again after others fills the gap that it had left.
        """
        key = writer, incarnation
        held = self._writers.get(key)
        if held is None:
            if len(self._writers) >= MAX_WRITERS:
                self._writers.popitem(last=False)
            held = self._writers[key] = _Writer(first)
        self._writers.move_to_end(key)
        if first < held.expected:
            held.missing = [rest for gap in held.missing for rest in _without(gap, first, last)]
        gap = (held.expected, first - 1) if first > held.expected else None
        if gap:
            held.missing = [*held.missing, gap][-MAX_GAPS:]
        held.expected = max(held.expected, last + 1)
        return gap


def parse_range(text: str) -> Range | None:
    """`7-9` as (7, 9); None for anything else."""
    head, dash, tail = text.partition("-")
    if not (dash and head.isdecimal() and tail.isdecimal() and len(text) <= 40):
        return None
    first, last = int(head), int(tail)
    return (first, last) if 0 < first <= last else None


def _without(gap: Range, first: int, last: int) -> list[Range]:
    """What is left of `gap` once first..last came."""
    parts = [(gap[0], min(gap[1], first - 1)), (max(gap[0], last + 1), gap[1])]
    return [part for part in parts if part[0] <= part[1]]
