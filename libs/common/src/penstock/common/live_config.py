"""LiveConfig: what people change while everything runs (profiles, routes, users, drains, ...), from a watch.

One document per kind and name. A deleted one stays as a mark with its version, so that versions only grow
and a process that slept cannot bring it back. When the bucket comes back without its data, what was known
stays and is owed to it (docs/decisions: live configuration); `penstock.common.config_keeping` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import msgspec

from penstock.common.bus import Change, Entry, Listing, Lost, WatchEvent
from penstock.common.codec import DecodeError, decode_record, encode_record
from penstock.common.model import Name, ShortName
from penstock.common.subjects import token
from penstock.common.telemetry import Metrics

PROFILE, ROUTE, MIRROR, USER, MAPPING, DRAIN = "profile", "route", "mirror", "user", "mapping", "drain"
KEY = "key"
# Every kind of document; a new one is entered here.
KINDS = PROFILE, ROUTE, MIRROR, USER, MAPPING, DRAIN, KEY

MAX_HISTORY = 10
Changed = list[tuple[str, str]]
Version = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
_NONE: Mapping[str, Document] = MappingProxyType({})


class Document(msgspec.Struct, frozen=True):
    """One piece of configuration: `value` in plain JSON types, `version` 1, 2, ... per kind and name, who
    wrote it (`by`), when (`changed_at`, ISO 8601 in UTC), through what (`origin`: admin, file, flag, ...)."""

    value: Any
    version: Version
    by: Name = ""
    changed_at: ShortName = ""
    origin: ShortName = ""


class ConfigRecord(Document, frozen=True, kw_only=True):
    """A document as it stands in the bucket, with what it was before, the latest first. `deleted`: a mark."""

    kind: Annotated[str, msgspec.Meta(max_length=64, pattern=r"\A[a-z][a-z0-9-]*\Z")]
    name: Name = ""
    deleted: bool = False
    history: Annotated[tuple[Document, ...], msgspec.Meta(max_length=64)] = ()

    @property
    def document(self) -> Document:
        """Without its past."""
        return Document(self.value, self.version, self.by, self.changed_at, self.origin)


class Owed(NamedTuple):
    """A record that the bucket lost, or holds an older one of at revision `expected` (0: none)."""

    key: str
    value: bytes
    expected: int


class _Held(NamedTuple):
    """`data` is kept for writing back only; `document` is None for the mark of a deleted one."""

    kind: str
    name: str
    document: Document | None
    stamp: tuple[str, int]
    data: bytes
    revision: int


def config_key(kind: str, name: str) -> str:
    """Key of a document."""
    return f"{kind}.{token(name)}"


def expose_config(config: LiveConfig, metrics: Metrics) -> None:
    """The configuration's gauges, under the same names in every service."""
    for name, text, read in (
        ("documents", "Documents of live configuration", lambda: float(len(config))),
        ("synced", "1 once a complete listing was seen", lambda: float(config.synced)),
        ("lost", "1 while the watch cannot vouch for the configuration", lambda: float(config.lost)),
    ):
        metrics.gauge(f"penstock_config_{name}", text, read)
    metrics.tally(
        "penstock_config_undecodable_total", "Records that could not be read", lambda: config.undecodable
    )


class LiveConfig:
    """Documents by kind and name. `version` counts changes; `synced` after the first listing; `lost` while
    the watch cannot vouch for them. Undecodable records are counted and the last good one stays.

    With `keeps` it can write back what a bucket lost, and knows the past versions; that costs the records'
    bytes in memory.
    """

    def __init__(self, *, keeps: bool = False) -> None:
        self.keeps = keeps
        self._held: dict[str, _Held] = {}
        self._documents: dict[str, dict[str, Document]] = {}
        # Keys known from an older incarnation only -> revision at which this one holds an older record.
        self._inherited: dict[str, int] = {}
        self._incarnation, self.sequence = "", 0
        self.synced = False
        self.lost = True
        self.version = 0
        self.undecodable = 0

    def get(self, kind: str, name: str = "") -> Document | None:
        """The document, if there is one."""
        return self._documents.get(kind, _NONE).get(name)

    def documents(self, kind: str) -> Mapping[str, Document]:
        """All of a kind by name: a view that follows."""
        return MappingProxyType(self._documents.setdefault(kind, {}))

    def __len__(self) -> int:
        return sum(map(len, self._documents.values()))

    def record(self, kind: str, name: str = "") -> tuple[ConfigRecord | None, int]:
        """The record (a mark of a deleted one too) and the revision that the next write has to expect.
        Needs `keeps`."""
        key = config_key(kind, name)
        held = self._held.get(key)
        if held is None:
            return None, 0
        return decode_record(ConfigRecord, held.data), self._inherited.get(key, held.revision)

    def owed(self) -> list[Owed]:
        """What a bucket that came back without its data has to be given. Needs `keeps`."""
        return [Owed(key, self._held[key].data, expected) for key, expected in self._inherited.items()]

    def marks(self, before: str) -> Iterator[tuple[str, int]]:
        """Key and revision of the marks of documents that were deleted before a moment (ISO 8601)."""
        for key, held in self._held.items():
            if held.document is None and held.stamp[0] < before and key not in self._inherited:
                yield key, held.revision

    def apply(self, event: WatchEvent) -> Changed:
        """Take one event of the watch; the kinds and names that changed."""
        changed: Changed = []
        match event:
            case Listing():
                self._list(event, changed)
            case Change():
                self._change(event, changed)
            case Lost():
                self.lost = True
        self.version += len(changed)
        return changed

    def _list(self, listing: Listing, changed: Changed) -> None:
        if listing.position.incarnation != self._incarnation:
            self._inherited = dict.fromkeys(self._held, 0)
        self._incarnation, self.sequence = listing.position.incarnation, listing.position.sequence
        for key in self._held.keys() - listing.entries.keys() - self._inherited.keys():
            self._drop(key, changed)
        for key, entry in listing.entries.items():
            self._put(key, entry, changed)
        self.synced, self.lost = True, False

    def _change(self, change: Change, changed: Changed) -> None:
        if change.position.incarnation != self._incarnation or change.position.sequence <= self.sequence:
            return
        self.sequence = change.position.sequence
        if change.entry is not None:
            self._put(change.key, change.entry, changed)
        else:
            self._drop(change.key, changed)

    def _put(self, key: str, entry: Entry, changed: Changed) -> None:
        held = self._held.get(key)
        if held is not None and key not in self._inherited and held.revision == entry.revision:
            return
        try:
            record = _record_of(key, entry)
        except DecodeError:
            self.undecodable += 1
            self._inherited.pop(key, None)
            return
        stamp = record.changed_at, record.version
        if held is not None and key in self._inherited and held.stamp > stamp:
            # Written back by somebody who had missed the latest.
            self._inherited[key] = entry.revision
            return
        self._inherited.pop(key, None)
        document = None if record.deleted else record.document
        data = entry.value if self.keeps else b""
        self._held[key] = _Held(record.kind, record.name, document, stamp, data, entry.revision)
        self._show(record.kind, record.name, document, changed)

    def _drop(self, key: str, changed: Changed) -> None:
        self._inherited.pop(key, None)
        held = self._held.pop(key, None)
        if held is not None:
            self._show(held.kind, held.name, None, changed)

    def _show(self, kind: str, name: str, document: Document | None, changed: Changed) -> None:
        shown = self._documents.setdefault(kind, {})
        if shown.get(name) == document:
            return
        if document is None:
            del shown[name]
        else:
            shown[name] = document
        changed.append((kind, name))


def successor(
    record: ConfigRecord | None, document: Document, *, kind: str, name: str, deleted: bool, limit_bytes: int
) -> bytes:
    """The next record of a document, as bytes: with as much of its past as fits, at most MAX_HISTORY."""
    past = [record.document, *record.history][:MAX_HISTORY] if record and not record.deleted else []
    if record and record.deleted:
        past = list(record.history)
    while True:
        following = ConfigRecord(
            document.value,
            document.version,
            document.by,
            document.changed_at,
            document.origin,
            kind=kind,
            name=name,
            deleted=deleted,
            history=tuple(past),
        )
        data = encode_record(following)
        if len(data) <= limit_bytes or not past:
            return data
        past.pop()


def _record_of(key: str, entry: Entry) -> ConfigRecord:
    record = decode_record(ConfigRecord, entry.value)
    if config_key(record.kind, record.name) != key:
        raise DecodeError(ConfigRecord, entry.value, f"it is {record.kind} {record.name!r}, its key {key!r}")
    return record
