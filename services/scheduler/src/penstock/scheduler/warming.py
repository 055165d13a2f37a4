"""Warming: from nothing to what the siblings know, piece by piece, within bounds (DESIGN D3).

One sibling after the other is asked for a snapshot. Without one, what was placed lately is read from the
stream that keeps it. Where that has nothing either, the replica listens to the siblings' placements for
COLD_S before it takes requests, which they serve meanwhile; without siblings, nobody knows more than it does.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing

from penstock.common.bus import Bus
from penstock.common.codec import DecodeError, decode
from penstock.common.errors import BusError
from penstock.common.identity import Identity
from penstock.common.messages import PlacedFeed, SnapshotCursor, SnapshotPiece, SnapshotRequest
from penstock.common.subjects import DEFAULT_SHARD, PLACED, PLACEMENTS, SNAPSHOT
from penstock.scheduler.draws import seed_of
from penstock.scheduler.replica import Replica
from penstock.scheduler.snapshot import BadPiece

log = logging.getLogger(__name__)

PIECE_S, SNAPSHOT_S, COLD_S = 0.5, 10.0, 10.0
# All that the stream holds takes a second or two.
REPLAY_S = 5.0
MAX_GIVERS = 3
# A hundred million blocks, the most that an index may hold.
MAX_PIECES = 32_768
# The loop gets a turn after so many placements, 20 us each.
SLICE_PLACEMENTS = 64
TICK_S = 0.05


class Warming:
    """`run` as often as needed; what it learns is merged into the replica."""

    def __init__(
        self, bus: Bus, own: Identity, replica: Replica, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._bus, self._own, self._replica, self._clock = bus, own, replica, clock
        self.progress = ""
        # How often it ended how; `refused` counts siblings that gave no snapshot.
        self.ends = dict.fromkeys(("snapshot", "replay", "cold", "alone", "refused"), 0)

    async def run(self) -> None:
        """Take a snapshot from a sibling, or read what was placed lately; then what was placed meanwhile."""
        self._replica.hold()
        if not await self._from_siblings() and not await self._from_stream():
            if self._siblings():
                await self._cold()
            else:
                self.ends["alone"] += 1
        await self._catch_up()
        self.progress = ""

    async def repair(self) -> None:
        """The same while requests are taken; without a snapshot, what was missed stays missed."""
        missing = self._replica.missing
        self._replica.hold()
        taken = await self._from_siblings()
        await self._catch_up()
        self._replica.missing += 0 if taken else missing
        self.progress = ""

    async def _catch_up(self) -> None:
        while self._replica.catch_up(self._clock(), SLICE_PLACEMENTS):
            self.progress = f"{self._replica.behind} placements of others are being caught up with"
            await asyncio.sleep(0)

    def _siblings(self) -> list[str]:
        """Those ready, each replica beginning with another one."""
        names = [name for name in self._replica.peers.schedulers if name != self._own.id]
        first = seed_of(self._own.writer + self._own.incarnation) % len(names) if names else 0
        return names[first:] + names[:first]

    async def _from_siblings(self) -> bool:
        asked: set[str] = set()
        while len(asked) < MAX_GIVERS:
            sibling = next((name for name in self._siblings() if name not in asked), "")
            if not sibling:
                break
            asked.add(sibling)
            if await self._from(sibling):
                return True
        return False

    async def _from(self, sibling: str) -> bool:
        """The whole snapshot of one sibling, or what came of it."""
        cursor: SnapshotCursor | None = None
        pieces = blocks = 0
        started = time.monotonic()
        try:
            async with asyncio.timeout(SNAPSHOT_S):
                while pieces < MAX_PIECES:
                    piece = await self._bus.request(
                        SNAPSHOT,
                        SnapshotRequest(self._own.id, cursor),
                        DEFAULT_SHARD,
                        sibling,
                        deadline_s=PIECE_S,
                    )
                    if piece.refused or piece.replica != sibling:
                        break
                    blocks += self._replica.taker.take(piece)
                    pieces += 1
                    self.progress = f"snapshot of {sibling}: {blocks} blocks in {pieces} pieces so far"
                    if piece.next is None:
                        return self._taken(sibling, pieces, blocks, time.monotonic() - started)
                    if not _goes_on(cursor, piece):
                        break
                    cursor = piece.next
        except (BusError, BadPiece, TimeoutError) as exc:
            return self._failed(sibling, pieces, str(exc) or f"not complete within {SNAPSHOT_S:g} s")
        return self._failed(sibling, pieces, "refused" if pieces == 0 else "it does not come to an end")

    async def _from_stream(self) -> int:
        """The placements of the last hour that the bus keeps; how many there were."""
        replica, taken = self._replica, 0
        started = time.monotonic()
        try:
            async with asyncio.timeout(REPLAY_S):
                await self._bus.ensure_stream(PLACEMENTS)
                # The end of what is there; what comes after it is held back like all that is live.
                self._bus.publish(PLACED, replica.marker(), DEFAULT_SHARD)
                subject = PLACED.name(DEFAULT_SHARD)
                async with aclosing(self._bus.follow(PLACEMENTS, subject, PLACEMENTS.max_age_s)) as stream:
                    async for stored in stream:
                        feed = _feed(stored.payload)
                        if feed is not None and replica.is_own(feed):
                            break
                        taken += replica.relearn(feed) if feed is not None else 0
                        self.progress = f"{taken} placements read from the stream so far"
                        await asyncio.sleep(0)
        except (BusError, TimeoutError) as exc:
            cause = str(exc) or f"not read within {REPLAY_S:g} s"
            log.warning("not all of the last placements were read", extra={"fields": {"cause": cause}})
        if taken:
            self.ends["replay"] += 1
            fields = {"placements": taken, "seconds": round(time.monotonic() - started, 3)}
            log.info("placements of before taken from the stream", extra={"fields": fields})
        return taken

    def _taken(self, sibling: str, pieces: int, blocks: int, seconds: float) -> bool:
        self.ends["snapshot"] += 1
        fields = {"sibling": sibling, "pieces": pieces, "blocks": blocks, "seconds": round(seconds, 3)}
        log.info("snapshot taken", extra={"fields": fields})
        return True

    def _failed(self, sibling: str, pieces: int, cause: str) -> bool:
        self.ends["refused"] += 1
        fields = {"sibling": sibling, "pieces": pieces, "cause": cause}
        log.warning("no snapshot from a sibling", extra={"fields": fields})
        return False

    async def _cold(self) -> None:
        """Siblings are asked while this one learns from what they place; if they go, it is needed."""
        self.ends["cold"] += 1
        log.warning("cold: listening to the siblings before requests are taken")
        await self._catch_up()
        until = self._clock() + COLD_S
        while self._clock() < until and self._siblings():
            self.progress = f"cold, listening to the siblings for {until - self._clock():.0f} s more"
            await asyncio.sleep(TICK_S)


def _feed(payload: bytes) -> PlacedFeed | None:
    """What another writer stored may be anything."""
    try:
        return decode(PlacedFeed, payload)
    except DecodeError:
        return None


def _goes_on(cursor: SnapshotCursor | None, piece: SnapshotPiece) -> bool:
    """Whether the piece leads on: parts rise, generations fall, positions rise."""
    following = piece.next
    if following is None or cursor is None:
        return True
    return (following.part, -following.generation, following.position) > (
        cursor.part,
        -cursor.generation,
        cursor.position,
    )
