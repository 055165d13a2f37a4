"""Records of sources that nobody runs any more.

A source that some replica runs has a lease that moves, whoever holds it. One whose lease was not seen to
move for long enough, in a watch that was alive all the time, is run by nobody: its records go.
"""

from __future__ import annotations

from collections.abc import Iterable

from penstock.common.bus import Change, Listing, Lost, WatchEvent
from penstock.common.codec import DecodeError, decode_record
from penstock.common.instances import COMPLETE_PREFIX
from penstock.common.messages import CompleteMarker
from penstock.discovery.leases import LEASE_PREFIX, lease_key
from penstock.discovery.registry import RegistryView


class Orphans:
    """Watches the leases of all sources but the `own` ones. Times are seconds of one monotonic clock."""

    def __init__(self, own: Iterable[str], after_s: float) -> None:
        """`after_s` must outlast a rolling restart; 0 keeps such records for good."""
        self._own, self._after_s = frozenset(own), after_s
        self._moved: dict[str, float] = {}
        self._since: float | None = None

    def see(self, event: WatchEvent, now: float) -> None:
        """Take one event of the registry's watch; a listing gives full grace again."""
        match event:
            case Listing():
                self._moved.clear()
                self._since = now
            case Change() if event.key.startswith(LEASE_PREFIX):
                self._moved[event.key] = now
            case Lost():
                self._since = None

    def due(self, view: RegistryView, now: float) -> list[str]:
        """The sources whose records are to be removed, in order of name."""
        if self._since is None or not self._after_s:
            return []
        since = self._since
        return sorted(
            source
            for source in _written(view) - self._own
            if now - self._moved.get(lease_key(source), since) >= self._after_s
        )


def _written(view: RegistryView) -> set[str]:
    """Every source that a record or a marker of the bucket names."""
    sources = {record.source for key, record in view.records.items() if key in view.entries}
    for key, entry in view.entries.items():
        if key.startswith(COMPLETE_PREFIX):
            try:
                sources.add(decode_record(CompleteMarker, entry.value).source)
            except DecodeError:
                continue
    return sources
