"""InFlightSums: requests and tokens in flight per instance, kept as work starts, moves and ends."""

from __future__ import annotations

from penstock.common.model import InstanceId
from penstock.scheduler.entries import Load, Work

InstanceLoad = tuple[InstanceId, int, int, int]


class InFlightSums:
    """What every counted decision adds up to; `changes` gives what changed since it was last asked."""

    def __init__(self) -> None:
        self._loads: dict[InstanceId, Load] = {}
        self._changed: set[InstanceId] = set()
        self.in_flight = 0

    def load(self, instance: InstanceId) -> InstanceLoad:
        """(instance, requests, tokens, prompt tokens to compute before a first answer)."""
        load = self._loads.get(instance)
        return (instance, load.requests, load.tokens, load.pending) if load else (instance, 0, 0, 0)

    def changes(self) -> list[InstanceLoad]:
        """The load of all whose load changed since the last call."""
        changed, self._changed = self._changed, set()
        return [self.load(instance) for instance in changed]

    def start(self, instance: InstanceId, tokens: int, pending: int, sequence: int) -> Work:
        """Count a decision."""
        self.in_flight += 1
        self._add(instance, 1, tokens, pending)
        return Work(instance, tokens, pending, sequence)

    def move(self, work: Work, instance: InstanceId, tokens: int, pending: int) -> None:
        """A decision is elsewhere, or has other numbers."""
        if work.instance == instance:
            self._add(instance, 0, tokens - work.tokens, pending - work.pending)
        else:
            self._add(work.instance, -1, -work.tokens, -work.pending)
            self._add(instance, 1, tokens, pending)
        work.instance, work.tokens, work.pending = instance, tokens, pending

    def drop(self, work: Work) -> None:
        """A decision is over."""
        self.in_flight -= 1
        self._add(work.instance, -1, -work.tokens, -work.pending)

    def _add(self, instance: InstanceId, requests: int, tokens: int, pending: int) -> None:
        load = self._loads.get(instance)
        if load is None:
            load = self._loads[instance] = Load()
        load.requests += requests
        load.tokens += tokens
        load.pending += pending
        if not load.requests:
            del self._loads[instance]
        self._changed.add(instance)
