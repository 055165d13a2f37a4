"""Listing every source again because somebody asks, and what that changed."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence

from penstock.common.bus import Bus
from penstock.common.messages import DiscoverReply, DiscoverRequest
from penstock.common.model import InstanceId
from penstock.common.subjects import DISCOVER
from penstock.discovery.source_reader import SourceReader

# Sources get a second to list again; what they say later counts all the same, in the registry.
CHECKS, CHECK_EVERY_S = 20, 0.05
MAX_NAMED = 256


class Refreshing:
    """Answers on the bus at once, and lists again in a loop of its own: one round for all who ask then."""

    def __init__(
        self,
        bus: Bus,
        replica: str,
        readers: Sequence[SourceReader],
        refresh: Callable[[], Awaitable[None]],
        listed: Callable[[], set[InstanceId]],
    ) -> None:
        """`listed()` are the instances that the sources list together."""
        self._bus, self._replica = bus, replica
        self._readers, self._refresh, self._listed = readers, refresh, listed
        self._numbers = itertools.count(1)
        self._wanted = asyncio.Event()
        # Number of the round that is asked for, 0 if none is, and of the last one that is over.
        self._ticket = self._done = 0
        self._last = DiscoverReply(replica, "", True)

    async def run(self) -> None:
        """An eternal loop: serve, and list again when asked."""
        await self._bus.serve(DISCOVER, self._answer)
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            ticket, self._ticket = self._ticket, 0
            before = self._listed()
            await self._relist()
            self._last, self._done = self._reply(str(ticket), before), ticket

    def _answer(self, request: DiscoverRequest) -> DiscoverReply | None:
        if request.replica not in ("", self._replica):
            return None
        if not request.ticket:
            if not self._ticket:
                self._ticket = next(self._numbers)
                self._wanted.set()
            return DiscoverReply(self._replica, str(self._ticket), False, len(self._listed()))
        # A later round answers for an earlier ticket too.
        if request.ticket.isdigit() and self._done >= int(request.ticket):
            return self._last
        return DiscoverReply(self._replica, request.ticket, False, len(self._listed()))

    async def _relist(self) -> None:
        """Have every source list again. Those that say nothing have seen no change, or are slow."""
        counts = {reader: reader.states for reader in self._readers}
        await self._refresh()
        for _ in range(CHECKS):
            if all(reader.states != count for reader, count in counts.items()):
                break
            await asyncio.sleep(CHECK_EVERY_S)

    def _reply(self, ticket: str, before: set[InstanceId]) -> DiscoverReply:
        after = self._listed()
        errors = [f"source {reader.name}: {reader.stale}"[:512] for reader in self._readers if reader.stale]
        return DiscoverReply(
            self._replica,
            ticket,
            True,
            len(after),
            tuple(sorted(after - before)[:MAX_NAMED]),
            tuple(sorted(before - after)[:MAX_NAMED]),
            len(after & before),
            tuple(errors[:MAX_NAMED]),
        )
