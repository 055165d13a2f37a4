"""ClusterView: the numbers a policy may look at, as arrays, and the pools that index into them.

Numbers are kept per slot, one slot per instance, so that an instance that serves many models is written
once; a pool is the slots of one model's instances, in order of id. A slot's number is also its bit in
the prefix index's masks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from penstock.common.instances import InstanceTable
from penstock.common.model import EngineLoad, InstanceId, InstanceState
from penstock.scheduler.loads import Loads
from penstock.scheduler.pool import Floats, Pool
from penstock.scheduler.sums import InstanceLoad

# An engine that reports more is taken for broken; larger numbers would outweigh every real one.
MAX_REQUESTS = 1_000_000
MAX_KV_TOKENS = 1_000_000_000
# How often time is let pass: often enough for prefill that takes tens of ms, and 40 us each time.
STEP_S = 0.01
LEARN_S = 1.0
# An instance counts for at least so much of the mean one, and at most for its inverse.
MIN_WEIGHT = 0.01


class ClusterView:
    """Slots, their numbers, and the pools of the models asked for."""

    def __init__(self, first_turn: int = 0, domain_label: str = "") -> None:
        """`first_turn` is where round robin starts in every pool: elsewhere in every replica. Instances with
        the same value of the label `domain_label`, if one is given, are a failover domain."""
        self.loads = Loads()
        self._first_turn, self._domain_label = first_turn, domain_label
        self._failed_domains: frozenset[str] = frozenset()
        self._advance_at = self._learn_at = -math.inf
        self._table = InstanceTable()
        self._slots: dict[InstanceId, int] = {}
        self._free: list[int] = []
        self._kv_expired: dict[InstanceId, int] = {}
        self._pools: dict[str, Pool] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, instance: InstanceId) -> int | None:
        """The slot of an instance, None if the registry does not hold it."""
        return self._slots.get(instance)

    def names(self) -> dict[int, InstanceId]:
        """The instance of each slot."""
        return {slot: instance for instance, slot in self._slots.items()}

    def kv_tokens(self) -> float:
        """What the KV caches of all instances hold together; those whose engine does not say it count as the
        mean of the others; 0 if none does."""
        slots = np.fromiter(self._slots.values(), dtype=np.intp)
        known = self.loads.kv_tokens[slots]
        known = known[known > 0]
        return float(known.mean()) * len(slots) if len(known) else 0.0

    def slots_in_order(self) -> list[int]:
        """All slots, by the id of their instance: the same order in every replica."""
        return [self._slots[instance] for instance in sorted(self._slots)]

    def refresh(self, table: InstanceTable, forget: Callable[[int], None]) -> tuple[list[str], list[str]]:
        """Follow the registry: (ids added, ids gone). `forget` is called with the bits of the slots that
        became free, before any of them is given to another instance."""
        self._table = table
        held = {instance.id for instance in table.instances()}
        gone = sorted(self._slots.keys() - held)
        if gone:
            free = [self._slots.pop(instance) for instance in gone]
            for instance in gone:
                self._kv_expired.pop(instance, None)
            forget(sum(1 << slot for slot in free))
            self._free.extend(free)
        added = sorted(held - self._slots.keys())
        for instance in added:
            slot = self._slots[instance] = self._free.pop() if self._free else len(self._slots)
            self.loads.reset(slot)
        self._weigh()
        self._failed_domains = self._failed()
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
            apart = frozenset(
                instance.id
                for instance in instances
                if self._failed_domains and instance.labels.get(self._domain_label) in self._failed_domains
            )
            pool = self._pools[model] = Pool(instances, slots, self._first_turn, apart)
            self.loads.learn(slots)
        return pool

    def _weigh(self) -> None:
        """Weights count in relation to each other, whatever their scale."""
        weights = {self._slots[instance.id]: instance.weight for instance in self._table.instances()}
        usable = [weight for weight in weights.values() if math.isfinite(weight)]
        mean = sum(usable) / len(usable) if usable else 1.0
        for slot, weight in weights.items():
            share = weight / mean if mean else 1.0
            self.loads.weight[slot] = min(max(share, MIN_WEIGHT), 1 / MIN_WEIGHT) if share == share else 1.0

    def _failed(self) -> frozenset[str]:
        """Failover domains with an unhealthy instance, of whatever model."""
        label = self._domain_label
        if not label:
            return frozenset()
        return frozenset(
            instance.labels[label]
            for instance in self._table.instances()
            if instance.state is InstanceState.UNHEALTHY and instance.labels.get(label)
        )

    def advance(self, now: float) -> None:
        """Let time pass up to `now`, before anything of `now` is taken; does something once per STEP_S."""
        if now < self._advance_at:
            return
        self._advance_at = now + STEP_S
        if now >= self._learn_at:
            self._learn_at = now + LEARN_S
            self.loads.fade(now)
            for pool in self._pools.values():
                self.loads.learn(pool.slots)
        self.loads.advance(now)

    def take(self, changed: Iterable[InstanceLoad]) -> None:
        """In flight (instance, requests, tokens, pending), absolute; of unknown instances nothing is kept."""
        slots, take = self._slots, self.loads.take
        for instance, requests, tokens, pending in changed:
            slot = slots.get(instance)
            if slot is not None:
                take(slot, requests, tokens, pending)

    def take_status(self, instance: InstanceId, load: EngineLoad, measured_at: float) -> bool:
        """The engine's own numbers; a figure that is missing or absurd leaves the last one, and False is
        returned if none was usable or they are older than those held."""
        # Whatever its fields hold: machine code takes a field's type at its word.
        reported: Any = load
        slot, loads = self._slots.get(instance), self.loads
        if slot is None or not math.isfinite(measured_at) or measured_at < loads.status_at[slot]:
            return False
        if reported.kv_expired is not None:
            self._kv_expired[instance] = reported.kv_expired
        kv_tokens = (reported.kv_blocks or 0) * (reported.block_size or 0)
        if 0 < kv_tokens <= MAX_KV_TOKENS:
            loads.kv_tokens[slot] = kv_tokens
        figures: tuple[tuple[Floats, Any, float], ...] = (
            (loads.running, reported.running, MAX_REQUESTS),
            (loads.waiting, reported.waiting, MAX_REQUESTS),
            (loads.kv_usage_ratio, reported.kv_usage_ratio, 1.0),
        )
        usable = False
        for numbers, figure, most in figures:
            # NaN fails both comparisons.
            if figure is not None and 0 <= figure <= most:
                numbers[slot] = figure
                usable = True
        if usable:
            loads.status_at[slot] = measured_at
        if reported.kv_usage_ratio is not None and 0 <= reported.kv_usage_ratio <= 1:
            loads.kv_at[slot] = measured_at
        return usable

    def kv_expired(self) -> list[tuple[InstanceId, float]]:
        """(instance, prompts that it kept for decode and nobody fetched in time), of those that say so."""
        return [(i, float(self._kv_expired[i])) for i in self._slots if i in self._kv_expired]

    def status_ages(self, now: float) -> list[tuple[InstanceId, float]]:
        """(instance, seconds since the engine's numbers were true), of those that ever reported."""
        ages = [(i, now - float(self.loads.status_at[slot])) for i, slot in self._slots.items()]
        return [(instance, age) for instance, age in ages if math.isfinite(age)]
