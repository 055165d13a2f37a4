"""Restarts: instances whose engine began anew, with an empty KV cache, as far as the registry tells."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.common.model import Endpoint, Instance, InstanceId, InstanceState

# Why a process does not serve that is gone; one that is merely slow keeps its KV cache. The words are those
# of discovery's prober.
GONE = frozenset({"connection refused", "it closed the connection without an answer"})


class Restarts:
    """Remembers of each instance its address, and whether its process was seen to be gone."""

    def __init__(self) -> None:
        self._known: dict[InstanceId, tuple[Endpoint, bool]] = {}

    def see(self, instances: Iterable[Instance]) -> list[InstanceId]:
        """Those of the registry's instances that are at another address, or are gone, since the last call."""
        known, self._known = self._known, {}
        restarted = []
        for instance in instances:
            gone = instance.state is InstanceState.UNHEALTHY and instance.reason in GONE
            self._known[instance.id] = instance.endpoint, gone
            before = known.get(instance.id)
            if before is not None and (before[0] != instance.endpoint or (gone and not before[1])):
                restarted.append(instance.id)
        return restarted
