"""What a policy decides over: the request with what its decision depends on, and the candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from penstock.common.model import InstanceId
from penstock.scheduler.decisions import Case
from penstock.scheduler.loads import Loads
from penstock.scheduler.pool import Floats, Kept

# Up to so many bits of a mask are looked up one by one, 0.2 us each; more are unpacked at once, 2 us.
_FEW = 8


def part_of(case: Case, blocks: int) -> tuple[int, int]:
    """The first `blocks` and the whole of the prompt, by the sizes of its blocks (DESIGN 3.4)."""
    run = case.request.run_blocks
    if not run or len(case.hashes) <= run:
        return blocks, len(case.hashes)
    return _size(blocks, run), _size(len(case.hashes), run)


def held_by(steps: Sequence[tuple[int, int]], slot: int) -> int:
    """Leading blocks that the candidate at a slot holds."""
    for blocks, mask in reversed(steps):
        if mask >> slot & 1:
            return blocks
    return 0


def share_of(case: Case, blocks: int, factor: float) -> float:
    """What the first `blocks` are of the prompt, 0..1, times `factor`."""
    count, run = len(case.hashes), case.request.run_blocks
    if not run or count <= run:
        return blocks * (factor / count)
    part, whole = part_of(case, blocks)
    return part / whole * factor


def _size(blocks: int, run: int) -> int:
    """Of so many blocks, in sizes of the first one."""
    runs, rest = divmod(blocks, run)
    return run * ((1 << runs) - 1) + (rest << runs)


class Candidates:
    """What is left of a pool, with its numbers as they stood when first read. `steps` is the prefix index's
    answer; arrays are aligned with `kept`."""

    __slots__ = ("_least", "_matched", "_mean", "_most", "_requests", "kept", "loads", "steps")

    def __init__(self, kept: Kept, loads: Loads, steps: Sequence[tuple[int, int]] = ()) -> None:
        self.kept, self.loads, self.steps = kept, loads, steps
        self._requests: Floats | None = None
        self._matched: Floats | None = None
        self._least = self._most = self._mean = -1.0

    def __len__(self) -> int:
        return len(self.kept.rows)

    def id(self, position: int) -> InstanceId:
        """The instance at a position of the arrays."""
        return self.kept.pool.ids[self.kept.rows.item(position)]

    @property
    def requests(self) -> Floats:
        """In-flight requests by weight, with those that siblings are expected to have placed."""
        if self._requests is None:
            self._requests = self.loads.queued.take(self.kept.slots)
        return self._requests

    @property
    def least(self) -> float:
        """The fewest in-flight requests of any candidate."""
        if self._least < 0:
            requests = self.requests
            self._least = requests.item(requests.argmin())
        return self._least

    @property
    def most(self) -> float:
        """The most in-flight requests of any candidate."""
        if self._most < 0:
            requests = self.requests
            self._most = requests.item(requests.argmax())
        return self._most

    @property
    def mean(self) -> float:
        """In-flight requests per candidate."""
        if self._mean < 0:
            self._mean = float(np.add.reduce(self.requests)) / len(self.kept.rows)
        return self._mean

    @property
    def longest(self) -> int:
        """Leading blocks held by the candidate that holds most."""
        return self.steps[-1][0] if self.steps else 0

    @property
    def matched(self) -> Floats:
        """Leading blocks of the prompt that each candidate holds."""
        if self._matched is None:
            self._matched = np.zeros(len(self.kept.rows))
            # A later step's slots are a part of the earlier one's, and hold more.
            for blocks, mask in self.steps:
                self._mark(self._matched, mask, blocks)
        return self._matched

    def shares(self, case: Case, factor: float = 1.0) -> Floats:
        """What of the prompt each candidate holds, 0..1, times `factor`; an array of the caller's."""
        count, run = len(case.hashes), case.request.run_blocks
        if not run or count <= run:
            return self.matched * (factor / (count or 1))
        shares = np.zeros(len(self.kept.rows))
        for blocks, mask in self.steps:
            self._mark(shares, mask, share_of(case, blocks, factor))
        return shares

    def _mark(self, numbers: Floats, mask: int, number: float) -> None:
        """Write `number` where the slots of `mask` are."""
        kept = self.kept
        if mask == kept.mask:
            numbers.fill(number)
        elif kept.positions and mask.bit_count() <= _FEW:
            while mask:
                lowest = mask & -mask
                numbers[kept.positions[lowest.bit_length() - 1]] = number
                mask ^= lowest
        else:
            width = (kept.mask.bit_length() + 7) >> 3
            packed = np.frombuffer(mask.to_bytes(width, "little"), dtype=np.uint8)
            numbers[np.unpackbits(packed, bitorder="little").view(np.bool_)[kept.slots]] = number
