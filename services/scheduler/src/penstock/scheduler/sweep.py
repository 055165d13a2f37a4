"""Sweep: a whole choice by expected time to first token, or by fewest requests, in one pass of machine code.

numpy takes some twenty calls for it, each of a microsecond or more, few numbers or many. What is computed is
the same to the last bit: ExpectedTtft, Least, Best and the best candidates to show (decision 0062).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from penstock.scheduler.chain import signed
from penstock.scheduler.columns import NATIVE
from penstock.scheduler.draws import SIGNED_MIX_1, SIGNED_MIX_2

if TYPE_CHECKING:
    from librt.strings import read_i64_le
    from librt.vecs import vec
    from mypy_extensions import i64

_LEAST: Final = -(1 << 63)
_LOW_HALF: Final = 0xFFFFFFFF
# Times a single bit its upper six bits are others for each of the 64 (Leiserson, Prokop, Randall: Using
# de Bruijn Sequences to Index a 1 in a Computer Word).
_DE_BRUIJN: Final = 0x03F79D71B4CB0A89
# More tokens are not the same as a float.
MAX_TOKENS: Final = 1 << 53


class Sweep:
    """One part of a pool; what `rate` finds stays until it is called again. Machine code only."""

    def __init__(self, slots: NDArray[np.intp], keys: NDArray[np.uint64]) -> None:
        """`keys` are for rendezvous; both are aligned with the candidates."""
        self._slots = vec[i64](slots.tolist())
        self._keys = vec[i64]([signed(key) for key in keys.tolist()])
        self._costs = vec[float]([0.0] * len(slots))
        positions = [0] * (int(slots.max()) + 1)
        for position, slot in enumerate(slots.tolist()):
            positions[slot] = position
        self._positions = vec[i64](positions)
        places = [0] * 64
        for bit in range(64):
            places[(_DE_BRUIJN << bit) >> 58 & 63] = bit
        self._places = vec[i64](places)
        self._first: i64 = 0
        self._second: i64 = 0
        self._third: i64 = 0
        self._top = self._small = 1.0

    def item(self, position: int) -> float:
        """Of a candidate, 0..1."""
        return self._top / (self._costs[position] + self._small)

    def rate(
        self,
        ms_per_token: vec[float],
        wait_ms: vec[float],
        tokens: float,
        held: Sequence[tuple[float, int]],
        wait_weight: float,
        small: float,
    ) -> None:
        """Score everybody: (small + least) / (small + cost). Cost is a slot's `ms_per_token` x tokens to
        compute + `wait_ms` x `wait_weight`; `held` are (tokens to compute, slots that have no more), the
        later entries' slots within those of the earlier."""
        slots, costs = self._slots, self._costs
        count: i64 = len(slots)
        i: i64 = 0
        while i < count:
            slot = slots[i]
            costs[i] = ms_per_token[slot] * tokens + wait_ms[slot] * wait_weight
            i += 1
        for uncached, mask in held:
            self._mark(ms_per_token, wait_ms, uncached, mask, wait_weight)
        least = costs[0]
        i = 1
        while i < count:
            if costs[i] < least:
                least = costs[i]
            i += 1
        self._top, self._small = small + least, small
        self._rank()

    def _mark(
        self, ms_per_token: vec[float], wait_ms: vec[float], uncached: float, mask: int, wait_weight: float
    ) -> None:
        costs, positions, places = self._costs, self._positions, self._places
        packed = mask.to_bytes(((mask.bit_length() + 63) >> 6) << 3, "little")
        slot: i64 = 0
        end: i64 = len(packed)
        while slot < end << 3:
            bits = read_i64_le(packed, slot >> 3)
            while bits:
                at = slot + places[((bits & -bits) * _DE_BRUIJN) >> 58 & 63]
                costs[positions[at]] = ms_per_token[at] * uncached + wait_ms[at] * wait_weight
                bits &= bits - 1
            slot += 64

    def _rank(self) -> None:
        """Find the three highest scores, of equals the first."""
        costs, top, small = self._costs, self._top, self._small
        first: i64 = -1
        second: i64 = -1
        third: i64 = -1
        highest, next_one, last = -1.0, -1.0, -1.0
        most = math.inf
        i: i64 = 0
        count: i64 = len(costs)
        while i < count:
            cost = costs[i]
            # What costs no less scores no more; a division takes longer than all the rest.
            if cost < most:
                score = top / (cost + small)
                if score > highest:
                    last, third = next_one, second
                    next_one, second = highest, first
                    highest, first = score, i
                elif score > next_one:
                    last, third = next_one, second
                    next_one, second = score, i
                elif score > last:
                    last, third = score, i
                if third >= 0:
                    most = costs[third]
            i += 1
        self._first, self._second, self._third = first, second, third

    def only(self, band: float) -> int:
        """The best candidate, if no other is within `band` of it; else -1."""
        if self._second >= 0 and self.item(self._second) >= self.item(self._first) - band:
            return -1
        return self._first

    def drawn(self, band: float, key: int) -> int:
        """Of all within `band` of the best the first in rendezvous order for `key`, see draws."""
        costs, keys, top, small = self._costs, self._keys, self._top, self._small
        floor = self.item(self._first) - band
        own: i64 = signed(key)
        chosen: i64 = -1
        highest: i64 = 0
        i: i64 = 0
        count: i64 = len(costs)
        while i < count:
            if top / (costs[i] + small) >= floor:
                mixed: i64 = (keys[i] ^ own) * SIGNED_MIX_1
                mixed ^= (mixed >> 32) & _LOW_HALF
                rank: i64 = (mixed * SIGNED_MIX_2) ^ _LEAST
                if chosen < 0 or rank > highest:
                    chosen, highest = i, rank
            i += 1
        return chosen

    def ranked(self, chosen: int) -> list[int]:
        """The chosen one, then the best two of the others, as far as there are any."""
        own: i64 = chosen
        ranked: list[int] = [chosen]
        for one in (self._first, self._second, self._third):
            if one >= 0 and one != own and len(ranked) < 3:
                ranked.append(one)
        return ranked


def sweep_of(slots: NDArray[np.intp], keys: NDArray[np.uint64]) -> Sweep | None:
    """None in Python, where numpy is faster."""
    return Sweep(slots, keys) if NATIVE and len(slots) else None
