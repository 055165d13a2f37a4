"""Pools and parts of pools: which instances, with the arrays that stay until the registry changes."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.common.model import Instance, InstanceId, Role
from penstock.scheduler.draws import rendezvous_keys
from penstock.scheduler.sweep import Sweep, sweep_of

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Rows = NDArray[np.intp]

# Up to so many candidates are looked at one by one, which takes less time than numpy needs to begin.
FEW = 8


class Pool:
    """The instances that serve one model, in order of id; arrays are aligned with `instances`."""

    def __init__(
        self,
        instances: tuple[Instance, ...],
        slots: Rows,
        turn: int = 0,
        in_failed_domains: frozenset[InstanceId] = frozenset(),
    ) -> None:
        """`in_failed_domains` share their failover domain with an unhealthy instance."""
        self.instances, self.slots, self.in_failed_domains = instances, slots, in_failed_domains
        self.ids: tuple[InstanceId, ...] = tuple(instance.id for instance in instances)
        self.keys = rendezvous_keys(self.ids)
        self.turn = turn
        # Requests that each may have in flight by its own label, inf without; None if none has one.
        limits = [limit_of(instance) for instance in instances]
        self.limits = np.array(limits) if any(map(math.isfinite, limits)) else None
        # What the standing filters leave for a role and an owner; profiles keep it here.
        self.standing: dict[tuple[Role, str], Kept] = {}
        # Least and most prompt tokens that each takes, None for any; the filters of profiles keep it here.
        self.lengths: dict[object, tuple[Floats, Floats] | None] = {}

    def __len__(self) -> int:
        return len(self.instances)


def limit_of(instance: Instance) -> float:
    """Requests that it may have in flight by its own word, inf without one."""
    return float(instance.max_requests or math.inf)


class Kept(msgspec.Struct, frozen=True):
    """The part of a pool that filters left. `rows` are positions in the pool, the other arrays aligned with
    them; `mask` has the bits of the slots; `excluded` counts what was dropped, by name of the filter."""

    pool: Pool
    rows: Rows
    slots: Rows
    keys: NDArray[np.uint64]
    mask: int
    excluded: dict[str, int] = {}
    positions: dict[int, int] = {}
    # The same as `slots`, and their instances' ids.
    numbers: tuple[int, ...] = ()
    ids: tuple[InstanceId, ...] = ()
    few_keys: tuple[int, ...] = ()
    sweep: Sweep | None = None

    def keep(self, flags: Flags, reason: str) -> Kept:
        """Those flagged; the others are excluded for `reason`."""
        rows, slots = self.rows[flags], self.slots[flags]
        dropped = len(self.rows) - len(rows)
        if not dropped:
            return self
        excluded = {**self.excluded, reason: dropped}
        return Kept(self.pool, rows, slots, self.keys[flags], mask_of(slots), excluded)

    def indexed(self) -> Kept:
        """The same with what takes time to make and saves it for many requests: numbers as objects of
        Python, the keys of a few, the sweep."""
        numbers = tuple(self.slots.tolist())
        positions = {slot: position for position, slot in enumerate(numbers)}
        ids = tuple(self.pool.ids[row] for row in self.rows.tolist())
        few = tuple(self.keys.tolist()) if len(self.rows) <= FEW else ()
        return Kept(
            self.pool,
            self.rows,
            self.slots,
            self.keys,
            self.mask,
            self.excluded,
            positions,
            numbers,
            ids,
            few,
            sweep_of(self.slots, self.keys),
        )


def whole(pool: Pool) -> Kept:
    """Every instance of a pool."""
    return Kept(pool, np.arange(len(pool), dtype=np.intp), pool.slots, pool.keys, mask_of(pool.slots))


def mask_of(slots: Rows) -> int:
    """The bits of `slots` as one number; 3 us, whatever their count."""
    if not len(slots):
        return 0
    bits = np.zeros(int(slots.max()) + 1, dtype=np.bool_)
    bits[slots] = True
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")
