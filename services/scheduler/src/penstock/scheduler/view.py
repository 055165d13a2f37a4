"""ClusterView: the numbers a policy may look at, as arrays, and the pools that index into them.

Numbers are kept per slot, one slot per instance, so that an instance that serves many models is written
once; a pool is the slots of one model's instances, in order of id. A slot's number is also its bit in
the prefix index's masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

from penstock.common.instances import InstanceTable
from penstock.common.model import EngineLoad, InstanceId
from penstock.scheduler.pool import Floats, Pool

# An engine that reports more is taken for broken; larger numbers would outweigh every real one.
MAX_REQUESTS = 1_000_000
_FIRST_CAPACITY = 64


class Loads:
    """One number per slot: what is in flight by the ledger, and what the engine said of itself.

    `status_at` is the monotonic second at which the engine's numbers were true, -inf while unknown (they
    are 0 then). No NaN and no negative number is ever stored.
    """

    NAMES = ("requests", "tokens", "running", "waiting", "kv_usage_ratio", "status_at")
    requests: Floats
    tokens: Floats
    running: Floats
    waiting: Floats
    kv_usage_ratio: Floats
    status_at: Floats

    def __init__(self) -> None:
        for name in self.NAMES:
            setattr(self, name, np.zeros(_FIRST_CAPACITY))
        self.status_at[:] = -math.inf

    def reset(self, slot: int) -> None:
        """Nothing known of `slot`; there is room for it afterwards."""
        if slot >= len(self.requests):
            for name in self.NAMES:
                setattr(self, name, np.concatenate([getattr(self, name)] * 2))
        for name in self.NAMES:
            getattr(self, name)[slot] = 0.0
        self.status_at[slot] = -math.inf


class ClusterView:
    """Slots, their numbers, and the pools of the models asked for."""

    def __init__(self, first_turn: int = 0) -> None:
        """`first_turn` is where round robin starts in every pool: elsewhere in every replica."""
        self.loads = Loads()
        self._first_turn = first_turn
        self._table = InstanceTable()
        self._slots: dict[InstanceId, int] = {}
        self._free: list[int] = []
        self._pools: dict[str, Pool] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, instance: InstanceId) -> int | None:
        """The slot of an instance, None if the registry does not hold it."""
        return self._slots.get(instance)

    def refresh(self, table: InstanceTable, forget: Callable[[int], None]) -> tuple[list[str], list[str]]:
        """Follow the registry: (ids added, ids gone). `forget` is called with the bits of the slots that
        became free, before any of them is given to another instance."""
        self._table = table
        held = {instance.id for instance in table.instances()}
        gone = sorted(self._slots.keys() - held)
        if gone:
            free = [self._slots.pop(instance) for instance in gone]
            forget(sum(1 << slot for slot in free))
            self._free.extend(free)
        added = sorted(held - self._slots.keys())
        for instance in added:
            slot = self._slots[instance] = self._free.pop() if self._free else len(self._slots)
            self.loads.reset(slot)
        turns = {model: pool.turn for model, pool in self._pools.items()}
        self._pools = {}
        for model, turn in turns.items():
            if (pool := self.pool(model)) is not None:
                pool.turn = turn
        return added, gone

    def pool(self, model: str) -> Pool | None:
        """The pool of a model, None if no instance serves it."""
        pool = self._pools.get(model)
        if pool is None and (instances := self._table.serving(model)):
            slots = np.array([self._slots[instance.id] for instance in instances], dtype=np.intp)
            pool = self._pools[model] = Pool(instances, slots, self._first_turn)
        return pool

    def take(self, changed: Iterable[tuple[InstanceId, int, int]]) -> None:
        """In-flight (instance, requests, tokens), absolute; of unknown instances nothing is kept."""
        slots, requests, tokens = self._slots, self.loads.requests, self.loads.tokens
        for instance, request_count, token_count in changed:
            slot = slots.get(instance)
            if slot is not None:
                requests[slot] = request_count
                tokens[slot] = token_count

    def take_status(self, instance: InstanceId, load: EngineLoad, measured_at: float) -> bool:
        """The engine's own numbers; a figure that is missing or absurd leaves the last one, and False is
        returned if none was usable or they are older than those held."""
        slot = self._slots.get(instance)
        if slot is None or not math.isfinite(measured_at) or measured_at < self.loads.status_at[slot]:
            return False
        figures = (
            (self.loads.running, load.running, MAX_REQUESTS),
            (self.loads.waiting, load.waiting, MAX_REQUESTS),
            (self.loads.kv_usage_ratio, load.kv_usage_ratio, 1.0),
        )
        usable = False
        for numbers, figure, most in figures:
            # NaN fails both comparisons.
            if figure is not None and 0 <= figure <= most:
                numbers[slot] = figure
                usable = True
        if usable:
            self.loads.status_at[slot] = measured_at
        return usable

    def status_ages(self, now: float) -> list[tuple[InstanceId, float]]:
        """(instance, seconds since the engine's numbers were true), of those that ever reported."""
        ages = [(i, now - float(self.loads.status_at[slot])) for i, slot in self._slots.items()]
        return [(instance, age) for instance, age in ages if math.isfinite(age)]
