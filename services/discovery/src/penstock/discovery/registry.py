"""What the registry bucket holds, as watched, and the writes that make it hold what it should."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from penstock.common.bus import Change, Entry, Listing, Lost, Position, WatchEvent
from penstock.common.codec import DecodeError, decode_record
from penstock.common.instances import INSTANCE_PREFIX, complete_key, instance_key
from penstock.common.model import Instance, InstanceId


@dataclass(frozen=True)
class Write:
    """Put `value`, or delete the key if it is None, provided that the key is at revision `expected`."""

    key: str
    value: bytes | None
    expected: int


class RegistryView:
    """The bucket by key. `live` while the watch vouches for it."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        # Last known records; those of an older incarnation of the bucket stay until overwritten, so that
        # a replica which takes over an empty bucket still knows what was healthy.
        self.records: dict[str, Instance] = {}
        self.incarnation = ""
        self.live = False

    def apply(self, event: WatchEvent) -> None:
        """Take one event of the watch."""
        match event:
            case Listing():
                self._list(event)
            case Change():
                self._change(event)
            case Lost():
                self.live = False

    def wrote(self, incarnation: str, write: Write, revision: int) -> None:
        """A write was acknowledged that was sent while `incarnation` was followed."""
        if incarnation != self.incarnation:
            return
        entry = Entry(write.value, revision) if write.value is not None else None
        self._change(Change(Position(incarnation, revision), write.key, entry))

    def holds(self, key: str) -> bytes | None:
        """The key's value."""
        entry = self.entries.get(key)
        return entry.value if entry else None

    def of_source(self, source: str) -> list[Instance]:
        """The last known records of one source: what the bucket holds, or, until the source has completed
        an empty new bucket, also what the one before it held."""
        complete = complete_key(source) in self.entries
        return [
            record
            for key, record in self.records.items()
            if record.source == source and (key in self.entries or not complete)
        ]

    def known(self, instance_id: InstanceId) -> Instance | None:
        """The last known record of an instance, whatever source wrote it; see `of_source`."""
        key = instance_key(instance_id)
        record = self.records.get(key)
        if record is None or (key not in self.entries and complete_key(record.source) in self.entries):
            return None
        return record

    def writer_of(self, key: str) -> str:
        """The source that wrote the record which the key holds; empty if it holds none."""
        return self.records[key].source if key in self.entries and key in self.records else ""

    def _list(self, listing: Listing) -> None:
        if listing.position.incarnation == self.incarnation:
            self.records.clear()
        self.incarnation, self.live = listing.position.incarnation, True
        self.entries = dict(listing.entries)
        for key, entry in self.entries.items():
            self._decode(key, entry)

    def _change(self, change: Change) -> None:
        held = self.entries.get(change.key)
        if held is not None and change.position.sequence <= held.revision:
            return
        if change.entry is None:
            self.entries.pop(change.key, None)
            self.records.pop(change.key, None)
        else:
            self.entries[change.key] = change.entry
            self._decode(change.key, change.entry)

    def _decode(self, key: str, entry: Entry) -> None:
        if not key.startswith(INSTANCE_PREFIX):
            return
        try:
            self.records[key] = decode_record(Instance, entry.value)
        except DecodeError:
            self.records.pop(key, None)


def plan(
    view: RegistryView, source: str, wanted: Mapping[str, bytes], marker: tuple[str, bytes] | None
) -> list[Write]:
    """The writes that are missing for the bucket to hold `wanted` and nothing else of `source`.

    The marker says that everything is written: it is planned only when nothing else is.
    """

    def put(key: str, value: bytes) -> Write:
        held = view.entries.get(key)
        return Write(key, value, held.revision if held else 0)

    writes = [put(key, value) for key, value in wanted.items() if view.holds(key) != value]
    writes += [
        Write(key, None, entry.revision)
        for key, entry in view.entries.items()
        if key not in wanted and key in view.records and view.records[key].source == source
    ]
    if not writes and marker is not None and view.holds(marker[0]) != marker[1]:
        writes.append(put(*marker))
    return writes
