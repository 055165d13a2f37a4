"""Sweep: a whole choice in one pass of machine code: by expected time to first token, by fewest requests, or
by prefix and headroom.

numpy takes some twenty calls for it, each of a microsecond or more, few numbers or many. What is computed is
the same to the last bit: the scorers, Best and the best candidates to show (decision 0062).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from penstock.scheduler.chain import signed
from penstock.scheduler.columns import NATIVE, Column
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
        count = len(slots)
        self._scores = vec[float]([0.0] * count)
        # What the last choice held of the prompt for each candidate; its headroom.
        self.held, self.room = Column([0.0] * count), Column([0.0] * count)
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

    def item(self, position: int) -> float:
        """The score of a candidate, 0..1."""
        return self._scores[position]

    def by_cost(
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
        self._spread(tokens, held)
        slots, scores, uncached = self._slots, self._scores, self.held.cells
        least = math.inf
        i: i64 = 0
        count: i64 = len(slots)
        while i < count:
            slot = slots[i]
            cost = ms_per_token[slot] * uncached[i] + wait_ms[slot] * wait_weight
            scores[i] = cost
            if cost < least:
                least = cost
            i += 1
        top = small + least
        i = 0
        while i < count:
            scores[i] = top / (scores[i] + small)
            i += 1
        self._rank()

    def by_prefix(
        self,
        requests: vec[float],
        held: Sequence[tuple[float, int]],
        mean: float,
        guard: tuple[float, float],
        room: tuple[float, float],
        weights: tuple[float, float],
    ) -> None:
        """Score everybody: PrefixMatch and Headroom by their `weights`. `guard` and `room` are (requests,
        ratio) of either, `held` (share of the prompt, slots that hold no less), `mean` that of `requests`."""
        self._spread(0.0, held)
        slots, scores, shares, rooms = self._slots, self._scores, self.held.cells, self.room.cells
        least = most = requests[slots[0]]
        i: i64 = 1
        count: i64 = len(slots)
        while i < count:
            number = requests[slots[i]]
            if number < least:
                least = number
            if number > most:
                most = number
            i += 1
        allowed, (guard_requests, guard_ratio) = math.inf, guard
        if most > least + guard_requests:
            allowed = (1.0 + guard_ratio) * mean
            if allowed < least + guard_requests:
                allowed = least + guard_requests
        room_requests, room_ratio = room
        scale = room_requests + room_ratio * mean
        slope, base, below = -1.0 / scale, 1.0 + least / scale, most - least > scale
        share_weight, room_weight = weights
        i = 0
        while i < count:
            number = requests[slots[i]]
            if number > allowed:
                shares[i] = 0.0
            left = number * slope + base
            if below and left < 0.0:
                left = 0.0
            rooms[i] = left
            scores[i] = shares[i] * share_weight + left * room_weight
            i += 1
        self._rank()

    def _spread(self, otherwise: float, held: Sequence[tuple[float, int]]) -> None:
        """Put numbers where their slots are, and `otherwise` elsewhere."""
        numbers, positions, places = self.held.cells, self._positions, self._places
        i: i64 = 0
        count: i64 = len(numbers)
        while i < count:
            numbers[i] = otherwise
            i += 1
        for number, mask in held:
            packed = mask.to_bytes(((mask.bit_length() + 63) >> 6) << 3, "little")
            slot: i64 = 0
            end: i64 = len(packed)
            while slot < end << 3:
                bits = read_i64_le(packed, slot >> 3)
                while bits:
                    at = slot + places[((bits & -bits) * _DE_BRUIJN) >> 58 & 63]
                    numbers[positions[at]] = number
                    bits &= bits - 1
                slot += 64

    def _rank(self) -> None:
        """Find the three highest scores, of equals the first."""
        scores = self._scores
        first: i64 = -1
        second: i64 = -1
        third: i64 = -1
        highest, next_one, last = -1.0, -1.0, -1.0
        i: i64 = 0
        count: i64 = len(scores)
        while i < count:
            score = scores[i]
            if score > last:
                if score > highest:
                    last, third = next_one, second
                    next_one, second = highest, first
                    highest, first = score, i
                elif score > next_one:
                    last, third = next_one, second
                    next_one, second = score, i
                else:
                    last, third = score, i
            i += 1
        self._first, self._second, self._third = first, second, third

    def only(self, band: float) -> int:
        """The best candidate, if no other is within `band` of it; else -1."""
        if self._second >= 0 and self.item(self._second) >= self.item(self._first) - band:
            return -1
        return self._first

    def drawn(self, band: float, key: int) -> int:
        """Of all within `band` of the best the first in rendezvous order for `key`, see draws."""
        scores, keys = self._scores, self._keys
        floor = self.item(self._first) - band
        own: i64 = signed(key)
        chosen: i64 = -1
        highest: i64 = 0
        i: i64 = 0
        count: i64 = len(scores)
        while i < count:
            if scores[i] >= floor:
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
