"""Choices that every replica, and every replay, makes alike: all chance comes from a hash.

Mixing is splitmix64's finaliser (Steele, Lea, Flood: Fast splittable pseudorandom number generators).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

_MASK: Final = 2**64 - 1
_STEP: Final = 0x9E3779B97F4A7C15
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB
# The same factors as signed numbers, of which machine code multiplies the lower 64 bits.
SIGNED_MIX_1: Final = 0xBF58476D1CE4E5B9 - (1 << 64)
SIGNED_MIX_2: Final = 0x94D049BB133111EB - (1 << 64)
_ARRAY_MIX_1, _ARRAY_MIX_2, _SHIFT = np.uint64(_MIX_1), np.uint64(_MIX_2), np.uint64(32)


def seed_of(text: str) -> int:
    """64 bits that stand for `text` in every process."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "replace"))


def draw(seed: int, turn: int, bound: int) -> int:
    """The `turn`-th number (from 0) of the sequence of `seed`, uniform over 0..bound-1."""
    mixed = (seed + (turn + 1) * _STEP) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * _MIX_1) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * _MIX_2) & _MASK
    return ((mixed ^ (mixed >> 31)) * bound) >> 64


def rendezvous_keys(instances: tuple[str, ...]) -> NDArray[np.uint64]:
    """What each instance brings to `rendezvous`."""
    return np.array([seed_of(instance) for instance in instances], dtype=np.uint64)


def rendezvous(keys: NDArray[np.uint64], key: int) -> int:
    """Position of the highest-ranking of `keys` for `key`: the same one whoever asks, another for most
    other keys, and unchanged when others leave the set. `keys` must not be empty."""
    mixed = (keys ^ np.uint64(key)) * _ARRAY_MIX_1
    mixed ^= mixed >> _SHIFT
    return int((mixed * _ARRAY_MIX_2).argmax())


def rendezvous_few(keys: Sequence[int], key: int) -> int:
    """`rendezvous` of a few keys as numbers: 0.3 us for each, instead of 3 for all."""
    first, highest = 0, -1
    for position, one in enumerate(keys):
        mixed = (one ^ key) * _MIX_1 & _MASK
        rank = (mixed ^ mixed >> 32) * _MIX_2 & _MASK
        if rank > highest:
            first, highest = position, rank
    return first
