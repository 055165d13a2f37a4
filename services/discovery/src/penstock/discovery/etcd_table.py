"""What etcd holds under the prefix: a listing, the changes after it, and why a record is passed over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from penstock.common.model import Instance
from penstock.common.records import Record, RecordError
from penstock.discovery.etcd_wire import Header, KeyChange, KeyValue
from penstock.discovery.moment import Moment

Parse = Callable[[str, bytes], Record]


@dataclass(frozen=True)
class Bounds:
    """Of all records together."""

    records: int = 8192
    value_bytes: int = 64 * 1024 * 1024


@dataclass(frozen=True)
class Listing:
    """All keys with the prefix at `header.revision`; `cut` says that there are more than the bounds allow."""

    header: Header
    kvs: tuple[KeyValue, ...]
    cut: bool = False


@dataclass(frozen=True)
class _Entry:
    """One key. `until_s` ends a record that no lease ends; `kept`: the store does not hold it any more."""

    mod_revision: int
    instances: tuple[Instance, ...] = ()
    fault: str = ""
    size_bytes: int = 0
    until_s: float | None = None
    kept: bool = False


class EtcdTable:
    """The records by key. Sync, and without a clock of its own."""

    def __init__(self, parse: Parse, ttl_s: float, bounds: Bounds | None = None) -> None:
        """`parse` raises RecordError; `ttl_s` is the age at which a record without a lease ends, and how
        long instances stay after the store lost its data."""
        self._parse, self._ttl_s, self._bounds = parse, ttl_s, bounds or Bounds()
        self._entries: dict[bytes, _Entry] = {}
        self._listed = Header()
        self._newest = 0
        self._size_bytes = 0
        self._cut = False

    @property
    def listed(self) -> bool:
        """Whether there was a listing."""
        return self._listed.revision > 0

    @property
    def position(self) -> int:
        """Revision of the last listing; a watch starts after it."""
        return self._listed.revision

    def replace(self, listing: Listing, at: Moment, *, was_away: bool = False) -> int:
        """Start over from a listing; how many records are kept although the store lost them.

        `was_away`: nobody could write for a while, so that records without a lease get a whole time again.
        """
        before, lost = self._entries, self._lost_data(listing)
        self._entries, self._size_bytes, self._cut = {}, 0, listing.cut
        for kv in listing.kvs:
            held = before.get(kv.key)
            if lost or held is None or held.kept or held.mod_revision != kv.mod_revision:
                entry = self._read(kv, at)
            else:
                entry = held
            if was_away and entry.until_s is not None:
                entry = replace(entry, until_s=max(entry.until_s, at.now_s + self._ttl_s))
            self._hold(kv.key, entry)
        for key, held in before.items():
            if key not in self._entries and (held.kept or (lost and held.instances)):
                until_s = held.until_s if held.kept else at.now_s + self._ttl_s
                self._entries[key] = replace(held, kept=True, until_s=until_s)
        self._listed = listing.header
        self._newest = listing.header.revision
        self.expire(at.now_s)
        return sum(entry.kept for entry in self._entries.values())

    def apply(self, changes: Iterable[KeyChange], at: Moment) -> bool:
        """Take changes of a watch, in their order; whether anything is different now."""
        changed = False
        for change in changes:
            key, self._newest = change.kv.key, max(self._newest, change.kv.mod_revision)
            before, after = self._drop(key), None
            if not change.deleted and len(self._entries) >= self._bounds.records:
                self._cut = True
            elif not change.deleted:
                after = self._read(change.kv, at)
                self._hold(key, after)
            changed = changed or _shown(before) != _shown(after)
        return changed

    def expire(self, now_s: float) -> bool:
        """End what no lease ends; whether anything did."""
        ended = [key for key, e in self._entries.items() if e.until_s is not None and e.until_s <= now_s]
        for key in ended:
            entry = self._entries[key]
            self._drop(key)
            if not entry.kept:
                self._entries[key] = self._ended(entry.mod_revision)
        return bool(ended)

    def agrees(self, header: Header, count: int, newest: int) -> bool:
        """Whether the table holds `count` keys, the last of them changed at revision `newest`: what the
        store says at `header`. A table cut off at its bounds cannot be compared."""
        if header.cluster_id != self._listed.cluster_id or header.revision < self._newest:
            return False
        held = [entry.mod_revision for entry in self._entries.values() if not entry.kept]
        return self._cut or (len(held), max(held, default=0)) == (count, newest)

    def state(self) -> tuple[tuple[Instance, ...], Mapping[str, str]]:
        """The instances, each id once, and by key why a record is passed over."""
        instances: dict[str, Instance] = {}
        owners: dict[str, str] = {}
        skipped: dict[str, str] = {}
        for key, entry in self._in_order():
            if entry.fault:
                skipped[key] = entry.fault
            for instance in entry.instances:
                if instance.id in instances:
                    if not entry.kept:
                        skipped[key] = f"instance {instance.id} stands under {owners[instance.id]} already"
                    continue
                instances[instance.id], owners[instance.id] = instance, key
        if self._cut:
            skipped["(prefix)"] = (
                f"more than {self._bounds.records} records or {self._bounds.value_bytes} bytes: "
                "the last keys are not read"
            )
        return tuple(instances.values()), skipped

    def _in_order(self) -> Iterator[tuple[str, _Entry]]:
        """By key, what the store does not hold any more at the end."""
        for key in sorted(self._entries, key=lambda key: (self._entries[key].kept, key)):
            yield key.decode("utf-8", "backslashreplace"), self._entries[key]

    def _lost_data(self, listing: Listing) -> bool:
        """Whether the store is another one than at the last listing: restarted empty, or from a backup.

        Its cluster id may be the same then. But revisions never go back in one store, and what had
        changed up to the last listing is known.
        """
        if not self.listed:
            return False
        header = listing.header
        if header.cluster_id != self._listed.cluster_id or header.revision < self._newest:
            return True
        return not self._cut and any(
            kv.mod_revision <= self._listed.revision and not self._known(kv) for kv in listing.kvs
        )

    def _known(self, kv: KeyValue) -> bool:
        held = self._entries.get(kv.key)
        return held is not None and not held.kept and held.mod_revision == kv.mod_revision

    def _read(self, kv: KeyValue, at: Moment) -> _Entry:
        size_bytes = len(kv.value or b"")
        try:
            if kv.value is None:
                raise RecordError("it is larger than any answer that is read")
            if self._size_bytes + size_bytes > self._bounds.value_bytes:
                raise RecordError(f"all records together have more than {self._bounds.value_bytes} bytes")
            record = self._parse(kv.key.decode("utf-8"), kv.value)
        except UnicodeDecodeError:
            return _Entry(kv.mod_revision, fault="its key is not UTF-8")
        except RecordError as exc:
            return _Entry(kv.mod_revision, fault=str(exc))
        until_s = self._until(kv, record, at)
        if until_s is not None and until_s <= at.now_s:
            return self._ended(kv.mod_revision)
        return _Entry(kv.mod_revision, record.instances, size_bytes=size_bytes, until_s=until_s)

    def _ended(self, mod_revision: int) -> _Entry:
        return _Entry(mod_revision, fault=f"it has no lease, and is older than {self._ttl_s:g} s")

    def _until(self, kv: KeyValue, record: Record, at: Moment) -> float | None:
        """When a record ends by itself: etcd ends those with a lease, a timestamp the others."""
        if kv.lease or not record.timestamp_ms:
            return None
        # A clock that jumps later on moves nothing: from here on the monotonic one counts.
        left_s = self._ttl_s - (at.wall_s - record.timestamp_ms / 1000)
        return at.now_s + min(max(left_s, 0.0), self._ttl_s)

    def _hold(self, key: bytes, entry: _Entry) -> None:
        self._entries[key] = entry
        self._size_bytes += entry.size_bytes

    def _drop(self, key: bytes) -> _Entry | None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._size_bytes -= entry.size_bytes
        return entry


def _shown(entry: _Entry | None) -> object:
    """What of an entry makes a difference to others: a heartbeat does not."""
    return entry and (entry.instances, entry.fault)
