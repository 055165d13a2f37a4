"""What one source lists: followed, screened, and its troubles told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from penstock.common.routing_events import INSTANCE, InstanceEvent
from penstock.discovery.ports import Source, SourceState, bounded
from penstock.discovery.screening import Screen, Told, printable
from penstock.discovery.surroundings import Surroundings

log = logging.getLogger(__name__)

# A source that breaks its contract is asked anew.
SOURCE_RETRY_S = 1.0


@dataclass(frozen=True)
class Known:
    """The last state of a source: what passed the screen is in the listings."""

    stale: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)


class SourceReader:
    """Keeps the source's part of the listings; `known` is None until it listed something."""

    def __init__(self, source: Source, shared: Surroundings, moved: Callable[[], None]) -> None:
        """`moved` is called after every state."""
        self._source, self._shared, self._moved = source, shared, moved
        self._screen, self._told = Screen(shared.allowed), Told()
        self._listed_at = shared.clock()
        self.known: Known | None = None
        self.name = source.name
        # How many states it has said.
        self.states = 0

    @property
    def stale(self) -> str:
        """Why the source cannot be read; empty while it can, and before it listed anything."""
        return self.known.stale if self.known else ""

    @property
    def reads(self) -> bool:
        """Whether the source can be read, as far as is known."""
        return self.known is not None and not self.known.stale

    @property
    def skipped(self) -> int:
        """Records of the last state that were passed over and are named."""
        return len(self.known.skipped) if self.known else 0

    @property
    def age_s(self) -> float:
        """Seconds since the source last said what it lists."""
        return self._shared.clock() - self._listed_at

    async def refresh(self) -> None:
        """Have the source list again."""
        await self._source.refresh()

    async def close(self) -> None:
        """Close the source."""
        await self._source.close()

    async def follow(self) -> None:
        """Take its states; until cancelled."""
        name = self._source.name
        while True:
            try:
                async for state in self._source.states():
                    self._take(state)
                log.error("source %s ended; it is asked anew", name)
            except Exception:
                log.exception("source %s failed; it is asked anew", name)
            if self.known is not None:
                stale = "the source has a fault of its own, see the log of discovery"
                self._tell_outage(stale)
                self.known = replace(self.known, stale=stale)
                self._moved()
            await asyncio.sleep(SOURCE_RETRY_S)

    def tell_skipped(self) -> None:
        """Write what was passed over to the routing log and the log, each key and reason once."""
        if self.known is None:
            return
        name, shared = self._source.name, self._shared
        for key, reason in self._told.fresh(self.known.skipped, complete=not self.known.stale):
            event = InstanceEvent(instance=key, change="skipped", endpoint="", source=name, reason=reason)
            shared.instruments.skipped.inc(name)
            shared.events.emit(INSTANCE, "", key, event)
            log.warning("source %s: record %s is passed over: %s", name, key, reason)

    def _take(self, state: SourceState) -> None:
        self.states += 1
        passed, refused = self._screen.sift(state.instances)
        skipped = {printable(key): printable(why) for key, why in {**state.skipped, **refused}.items()}
        stale = printable(state.stale)
        self._tell_outage(stale)
        self.known, self._listed_at = Known(stale, bounded(skipped)), self._shared.clock()
        self._shared.listings.take(self._source.name, passed)
        self._moved()

    def _tell_outage(self, stale: str) -> None:
        if bool(stale) == bool(self.stale):
            return
        what = f"source {self._source.name}"
        self._shared.events.degraded(what, bool(stale), stale)
        if stale:
            self._shared.instruments.outages.inc(self._source.name)
            log.warning("%s cannot be read, its last known instances stay: %s", what, stale)
        else:
            log.info("%s is read again", what)
