"""What Redis holds under the prefix: readings of all records, single changes between them, and what ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from penstock.common.model import Instance
from penstock.common.records import Record, RecordError
from penstock.discovery.moment import Moment

Parse = Callable[[str, bytes], Record]
# The value under a key, or why it was not read.
Value = bytes | str

# Of one prefix: keys beyond are not read, those already known before new ones.
MAX_RECORDS = 8192
PREFIX = "(prefix)"


@dataclass(frozen=True)
class Reading:
    """Every key with the prefix. `epoch` names what the servers have held since they started or were
    emptied: another one, and keys that are not there were lost and not deleted; empty if they do not say."""

    values: Mapping[bytes, Value]
    epoch: str = ""
    cut: bool = False


@dataclass(frozen=True)
class _Entry:
    """One key. `until_s` ends it on the monotonic clock; `kept`: the store does not hold it any more."""

    value: Value
    instances: tuple[Instance, ...] = ()
    fault: str = ""
    timestamp_ms: int = 0
    until_s: float | None = None
    kept: bool = False


class RedisTable:
    """The records by key. Sync, and without a clock of its own.

    A record that is first seen is as old as its timestamp says, one that is ahead counts as written at
    that moment. From there on the monotonic clock counts, and a record that is seen with a later
    timestamp than before was written at that moment: neither a clock that jumps nor one that is wrong
    ends a record that is written again and again.
    """

    def __init__(self, parse: Parse, ttl_s: float) -> None:
        """`parse` raises RecordError; `ttl_s` is the age at which a record ends, and how long instances
        stay after the store lost its data."""
        self._parse, self._ttl_s = parse, ttl_s
        self._entries: dict[bytes, _Entry] = {}
        self._epoch: str | None = None
        self._cut = False

    @property
    def listed(self) -> bool:
        """Whether there was a reading."""
        return self._epoch is not None

    def holds(self, key: bytes) -> bool:
        """Whether the key is listed now."""
        entry = self._entries.get(key)
        return entry is not None and bool(entry.instances)

    def replace(self, reading: Reading, at: Moment, *, was_away: bool = False) -> bool:
        """Take all records; whether anything is different now. `was_away`: nobody could write for a while,
        so that what is listed gets its whole time again."""
        lost = was_away or self._lost_data(reading)
        before, self._entries = self._entries, {}
        for key, value in reading.values.items():
            self._entries[key] = self._read(key, value, before.get(key), at, lost)
        for key, held in before.items():
            if key not in self._entries and held.instances and (held.kept or lost):
                self._entries[key] = self._keep(held, at)
        cut, self._cut, self._epoch = self._cut, reading.cut, reading.epoch
        self.expire(at.now_s)
        return cut != self._cut or _shown(before) != _shown(self._entries)

    def put(self, key: bytes, value: Value, at: Moment) -> bool:
        """Take one record that was written; whether anything is different now."""
        held = self._entries.get(key)
        if held is None and len(self._entries) >= MAX_RECORDS:
            return False
        entry = self._entries[key] = self._read(key, value, held, at, False)
        return held is None or _view(held) != _view(entry)

    def drop(self, key: bytes) -> bool:
        """A record was deleted; whether anything is different now."""
        return self._entries.pop(key, None) is not None

    def expire(self, now_s: float) -> bool:
        """End what was not written again; whether anything ended."""
        ended = [key for key, e in self._entries.items() if e.until_s is not None and e.until_s <= now_s]
        for key in ended:
            entry = self._entries.pop(key)
            if not entry.kept:
                self._entries[key] = replace(entry, instances=(), fault=self._too_old, until_s=None)
        return bool(ended)

    def next_expiry_s(self) -> float | None:
        """When `expire` may end something; None if nothing will."""
        return min((e.until_s for e in self._entries.values() if e.until_s is not None), default=None)

    def state(self) -> tuple[tuple[Instance, ...], dict[str, str]]:
        """The instances, each id once, and by key why a record is passed over."""
        instances: dict[str, Instance] = {}
        owners: dict[str, str] = {}
        skipped: dict[str, str] = {}
        for key, entry in self._in_order():
            if entry.fault:
                skipped[key] = entry.fault
            for instance in entry.instances:
                if instance.id not in instances:
                    instances[instance.id], owners[instance.id] = instance, key
                elif not entry.kept:
                    skipped[key] = f"instance {instance.id} stands under {owners[instance.id]} already"
        if self._cut:
            skipped[PREFIX] = f"more than {MAX_RECORDS} records, or too large together: some are not read"
        return tuple(instances.values()), skipped

    def _in_order(self) -> Iterator[tuple[str, _Entry]]:
        """By key, what the store does not hold any more at the end."""
        for key in sorted(self._entries, key=lambda key: (self._entries[key].kept, key)):
            yield key.decode("utf-8", "backslashreplace"), self._entries[key]

    @property
    def _too_old(self) -> str:
        return f"its timestamp is older than {self._ttl_s:g} s"

    def _lost_data(self, reading: Reading) -> bool:
        """By the epoch; from a store that does not say, if everything is gone at once."""
        if not self.listed:
            return False
        if reading.epoch and self._epoch:
            return reading.epoch != self._epoch
        return not reading.values

    def _keep(self, held: _Entry, at: Moment) -> _Entry:
        return held if held.kept else replace(held, kept=True, until_s=at.now_s + self._ttl_s)

    def _read(self, key: bytes, value: Value, held: _Entry | None, at: Moment, lost: bool) -> _Entry:
        if held is not None and not held.kept and held.value == value:
            whole = lost and held.until_s is not None
            return replace(held, until_s=at.now_s + self._ttl_s) if whole else held
        entry = self._parsed(key, value)
        if not entry.timestamp_ms:
            return entry
        seen_ms = held.timestamp_ms if held is not None else 0
        written_again = 0 < seen_ms < entry.timestamp_ms
        if held is not None and held.instances and (lost or held.kept) and not written_again:
            # The store came back with an old backup, in which what is listed has not been written yet.
            return self._keep(held, at)
        age_s = 0.0 if written_again else at.wall_s - entry.timestamp_ms / 1000
        left_s = min(self._ttl_s - age_s, self._ttl_s)
        if left_s <= 0:
            return replace(entry, instances=(), fault=self._too_old)
        return replace(entry, until_s=at.now_s + left_s)

    def _parsed(self, key: bytes, value: Value) -> _Entry:
        if isinstance(value, str):
            return _Entry(value, fault=value)
        try:
            record = self._parse(key.decode(), value)
        except UnicodeDecodeError:
            return _Entry(value, fault="its key is not UTF-8")
        except RecordError as exc:
            return _Entry(value, fault=str(exc))
        return _Entry(value, record.instances, timestamp_ms=record.timestamp_ms)


def _view(entry: _Entry) -> object:
    """What of an entry makes a difference to others: a heartbeat does not."""
    return entry.instances, entry.fault


def _shown(entries: Mapping[bytes, _Entry]) -> dict[bytes, object]:
    return {key: _view(entry) for key, entry in entries.items()}
