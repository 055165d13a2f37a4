"""What the registrations bucket lists: each record until it is deleted, or not written again for its time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from penstock.common.bus import Change, Entry, Listing, Lost, WatchEvent
from penstock.common.model import Instance
from penstock.common.records import Record, RecordError

Parse = Callable[[str, bytes], Record]

MAX_REGISTRATIONS = 8192


@dataclass(frozen=True)
class _Held:
    """One key. It ends at `until_s`; with a `fault` it lists nothing. `kept`: the bucket lost it."""

    revision: int
    until_s: float
    instances: tuple[Instance, ...] = ()
    fault: str = ""
    kept: bool = False


class Registrations:
    """The records by key. Sync; times are seconds of the caller's monotonic clock.

    Age is counted from the moment a record was received, so that nobody's clock matters. It stands still
    while the watch is lost, because nobody can write then. Only what is listed by its first listing is
    compared with a wall clock: a record older than its time by its own timestamp waits until it is
    written again, which a living sidecar does within a heartbeat.
    """

    def __init__(self, parse: Parse, ttl_s: float) -> None:
        """`parse` raises RecordError."""
        self._parse, self._ttl_s = parse, ttl_s
        self._held: dict[str, _Held] = {}
        self._incarnation = ""
        self._lost_at: float | None = None
        self.stale = ""
        self.listed = False

    def apply(self, event: WatchEvent, now_s: float, wall_s: float) -> None:
        """Take one event of the watch."""
        match event:
            case Listing():
                self._list(event, now_s, wall_s)
            case Change(entry=None):
                self._held.pop(event.key, None)
            case Change():
                self._change(event.key, event.entry, now_s)
            case Lost():
                self.stale = self.stale or event.cause
                self._lost_at = now_s if self._lost_at is None else self._lost_at

    def expire(self, now_s: float) -> None:
        """End what was not written again; nothing while the watch is lost."""
        if self._lost_at is None:
            for key in [key for key, held in self._held.items() if held.until_s <= now_s]:
                del self._held[key]

    def next_expiry_s(self) -> float | None:
        """When `expire` may end something; None if nothing will."""
        if self._lost_at is not None:
            return None
        return min((held.until_s for held in self._held.values()), default=None)

    def state(self) -> tuple[tuple[Instance, ...], dict[str, str]]:
        """The instances, each id once, and by key why a record is passed over."""
        instances: dict[str, Instance] = {}
        skipped = {}
        for key in sorted(self._held, key=lambda key: (self._held[key].kept, key)):
            held = self._held[key]
            if held.fault:
                skipped[key] = held.fault
            for instance in held.instances:
                if instances.setdefault(instance.id, instance) is not instance and not held.kept:
                    skipped[key] = f"instance {instance.id} is registered under another key too"
        return tuple(instances.values()), skipped

    def _list(self, listing: Listing, now_s: float, wall_s: float) -> None:
        paused_s = 0.0 if self._lost_at is None else now_s - self._lost_at
        same = listing.position.incarnation == self._incarnation
        before, self._held = self._held, {}
        for key, entry in listing.entries.items():
            held = before.pop(key, None)
            if held is not None and same and held.revision == entry.revision:
                self._held[key] = replace(held, until_s=held.until_s + paused_s)
            else:
                self._hold(key, self._read(key, entry, now_s, None if self.listed else wall_s))
        self._held.update(self._outlive(before, same, paused_s, now_s))
        self._incarnation, self._lost_at, self.stale, self.listed = (
            listing.position.incarnation,
            None,
            "",
            True,
        )

    def _outlive(
        self, before: dict[str, _Held], same: bool, paused_s: float, now_s: float
    ) -> Iterator[tuple[str, _Held]]:
        """What a bucket that was created anew does not hold stays for one time, so that sidecars can
        write again."""
        for key, held in before.items():
            if held.kept:
                yield key, replace(held, until_s=held.until_s + paused_s)
            elif not same and held.instances:
                yield key, replace(held, until_s=now_s + self._ttl_s, kept=True)

    def _change(self, key: str, entry: Entry | None, now_s: float) -> None:
        held = self._held.get(key)
        if entry is not None and (held is None or held.kept or held.revision < entry.revision):
            self._hold(key, self._read(key, entry, now_s, None))

    def _hold(self, key: str, held: _Held) -> None:
        if key in self._held or len(self._held) < MAX_REGISTRATIONS:
            self._held[key] = held

    def _read(self, key: str, entry: Entry, now_s: float, wall_s: float | None) -> _Held:
        until_s = now_s + self._ttl_s
        try:
            record = self._parse(key, entry.value)
        except RecordError as exc:
            return _Held(entry.revision, until_s, fault=str(exc))
        if wall_s is not None and wall_s - record.timestamp_ms / 1000 > self._ttl_s:
            fault = "by its timestamp it ended before; it is listed once it is written again"
            return _Held(entry.revision, until_s, fault=fault)
        return _Held(entry.revision, until_s, record.instances)
