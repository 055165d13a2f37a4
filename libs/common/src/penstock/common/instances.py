"""InstanceTable: what a service knows of the fleet, derived from the registry watch.

A new incarnation of the bucket (restarted without its store) lists nothing at first. What an older
incarnation held stays, per source, until that source's `complete` marker says that it has written
all it has (DESIGN D4); so an empty bucket never empties the fleet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from penstock.common.bus import Change, Entry, Listing, Lost, WatchEvent
from penstock.common.codec import DecodeError, decode_record, encode_record
from penstock.common.messages import CompleteMarker
from penstock.common.model import Instance, InstanceId
from penstock.common.subjects import token
from penstock.common.telemetry import Metrics

INSTANCE_PREFIX: Final = "instance."
COMPLETE_PREFIX: Final = "complete."


def instance_key(instance_id: InstanceId) -> str:
    """Key of an instance's record."""
    return INSTANCE_PREFIX + token(instance_id)


def complete_key(source: str) -> str:
    """Key of a source's marker."""
    return COMPLETE_PREFIX + token(source)


def encode_instance(instance: Instance) -> bytes:
    """An instance's record as it stands in the bucket."""
    return encode_record(instance)


def expose(table: InstanceTable, metrics: Metrics) -> None:
    """The table's gauges, under the same names in every service that keeps one."""

    def taking_work() -> float:
        return sum(instance.takes_work for instance in table.instances())

    gauge = metrics.gauge
    gauge("penstock_registry_instances", "Instances known", lambda: len(table), over="max")
    gauge("penstock_registry_taking_work", "Instances that take requests", taking_work, over="max")
    gauge(
        "penstock_registry_synced",
        "1 once a complete listing was seen",
        lambda: float(table.synced),
        over="min",
    )
    gauge(
        "penstock_registry_lost",
        "1 while the watch cannot vouch for the table",
        lambda: float(table.lost),
        over="max",
    )
    metrics.tally(
        "penstock_registry_undecodable_total", "Records that could not be read", lambda: table.undecodable
    )


class InstanceTable:
    """Instances by key, by model, with the marks that say how far the table can be trusted."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Instance, int]] = {}
        self._inherited: set[str] = set()
        self._markers: dict[str, CompleteMarker] = {}
        self._incarnation, self._sequence = "", 0
        self._by_id: dict[InstanceId, Instance] = {}
        self._by_model: dict[str, dict[InstanceId, Instance]] = {}
        self._pools: dict[str, tuple[Instance, ...]] = {}
        self.synced = False
        self.lost = True
        self.version = 0
        self.undecodable = 0

    def get(self, instance_id: InstanceId) -> Instance | None:
        """The instance of this id."""
        return self._by_id.get(instance_id)

    def instances(self) -> Iterable[Instance]:
        """All of them."""
        return self._by_id.values()

    def serving(self, model: str) -> tuple[Instance, ...]:
        """The pool of a model, in order of id; empty for an unknown one."""
        pool = self._pools.get(model)
        if pool is None:
            members = self._by_model.get(model)
            if not members:
                return ()
            pool = self._pools[model] = tuple(instance for _, instance in sorted(members.items()))
        return pool

    def models(self) -> Iterable[str]:
        """Every model name and LoRA adapter served by some instance."""
        return self._by_model.keys()

    def __len__(self) -> int:
        return len(self._by_id)

    def apply(self, event: WatchEvent) -> bool:
        """Take one event of the watch; True if the instances changed. `version` counts the changes."""
        before = self.version
        match event:
            case Listing():
                self._list(event)
                self._settle()
            case Change():
                self._change(event)
                if event.key.startswith(COMPLETE_PREFIX):
                    self._settle()
            case Lost():
                self.lost = True
        return self.version != before

    def _list(self, listing: Listing) -> None:
        self.lost = False
        if listing.position.incarnation != self._incarnation:
            # Everything held comes from an older incarnation until this one names it.
            self._inherited = set(self._held)
            self._markers.clear()
        self._incarnation, self._sequence = listing.position.incarnation, listing.position.sequence
        for key in self._held.keys() - listing.entries.keys() - self._inherited:
            self._drop(key)
        for key in self._markers.keys() - listing.entries.keys():
            del self._markers[key]
        for key, entry in listing.entries.items():
            self._put(key, entry)

    def _change(self, change: Change) -> None:
        if change.position.incarnation != self._incarnation or change.position.sequence <= self._sequence:
            return
        self._sequence = change.position.sequence
        if change.entry is not None:
            self._put(change.key, change.entry)
        else:
            self._markers.pop(change.key, None)
            self._drop(change.key)

    def _put(self, key: str, entry: Entry) -> None:
        try:
            if key.startswith(COMPLETE_PREFIX):
                self._markers[key] = _marker_of(key, entry)
            elif key.startswith(INSTANCE_PREFIX):
                held = self._held.get(key)
                if held is None or key in self._inherited or entry.revision != held[1]:
                    self._hold(key, _instance_of(key, entry), entry.revision)
        except DecodeError:
            # One broken record costs itself only: what was known of that instance stays.
            self.undecodable += 1

    def _settle(self) -> None:
        """Drop what an older incarnation held and a complete source of this one did not write."""
        complete = {marker.source for marker in self._markers.values()}
        wanted = {source for marker in self._markers.values() for source in marker.sources}
        if complete:
            for key in list(self._inherited):
                source = self._held[key][0].source
                if source in complete or source not in wanted:
                    self._drop(key)
        if complete and complete >= wanted:
            self.synced = True

    def _hold(self, key: str, instance: Instance, revision: int) -> None:
        held = self._held.get(key)
        self._inherited.discard(key)
        self._held[key] = instance, revision
        if held is not None and held[0] == instance:
            return
        self._forget(held)
        self._by_id[instance.id] = instance
        for model in {*instance.models, *instance.lora_adapters}:
            self._by_model.setdefault(model, {})[instance.id] = instance
            self._pools.pop(model, None)
        self.version += 1

    def _drop(self, key: str) -> None:
        self._inherited.discard(key)
        held = self._held.pop(key, None)
        if held is not None:
            self._forget(held)
            self.version += 1

    def _forget(self, held: tuple[Instance, int] | None) -> None:
        if held is None:
            return
        instance = held[0]
        del self._by_id[instance.id]
        for model in {*instance.models, *instance.lora_adapters}:
            members = self._by_model[model]
            del members[instance.id]
            if not members:
                del self._by_model[model]
            self._pools.pop(model, None)


def _marker_of(key: str, entry: Entry) -> CompleteMarker:
    marker = decode_record(CompleteMarker, entry.value)
    if complete_key(marker.source) != key:
        raise DecodeError(CompleteMarker, entry.value, f"its source is {marker.source!r}, its key {key!r}")
    return marker


def _instance_of(key: str, entry: Entry) -> Instance:
    instance = decode_record(Instance, entry.value)
    if instance_key(instance.id) != key:
        # Two keys for one id would make the table depend on the order of writes.
        raise DecodeError(Instance, entry.value, f"its id is {instance.id!r}, its key {key!r}")
    return instance
