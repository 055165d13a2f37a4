"""KvFeed: one engine's stream of events, in order, as messages to the schedulers.

Sequence numbers count from 0 in each life of an engine. A number above the expected one is a gap: the
missing messages are asked for again, and if the engine has them no more, what its KV cache holds is
unknown. A number at or below the last one heard is a new life, whose KV cache began empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import Enum

from penstock.common.block_hash import pack_hashes
from penstock.common.messages import MAX_BLOCKS, MAX_KV_CHANGES, KvChange, KvEvents
from penstock.common.model import InstanceId
from penstock.discovery.kv_blocks import KvBlocks
from penstock.discovery.kv_events import AllBlocksCleared, BlockStored, KvEvent, decode_batch

_MAX_BYTES = MAX_BLOCKS * 8


class Next(Enum):
    """What to do with a message that was heard."""

    APPLY = "apply"
    SKIP = "skip"
    # Ask for what is missing before it, then hand all of it to `recovered`.
    RECOVER = "recover"


class KvFeed:
    """`blocks` is None where no block can be matched with a prompt: then the schedulers hear only that the
    KV cache is empty or unknown."""

    def __init__(
        self,
        instance: InstanceId,
        blocks: KvBlocks | None,
        feed_id: Callable[[], str],
        dp_rank: int | None = None,
    ) -> None:
        """`feed_id` names a feed as no other is named; batches of other ranks than `dp_rank`, if one is
        given, are passed over."""
        self._instance, self.blocks, self._feed_id, self._dp_rank = instance, blocks, feed_id, dp_rank
        self._feed, self._sequence = feed_id(), 0
        self._expected: int | None = None
        self._heard = -1
        self.gaps = self.restarts = self.lost = 0

    @property
    def missing_from(self) -> int:
        """The first message to ask for when `see` says RECOVER."""
        return self._expected or 0

    def see(self, sequence: int) -> Next:
        """A message with this number was heard."""
        if sequence <= self._heard:
            self.restarts += 1
            # `recovered` will find the feed where a new life begins.
            self._expected = None
        self._heard = sequence
        if self._expected is None:
            return Next.RECOVER
        if sequence < self._expected:
            # It came with a replay already.
            return Next.SKIP
        if sequence > self._expected:
            self.gaps += 1
            return Next.RECOVER
        return Next.APPLY

    def doubt(self) -> None:
        """The connection was lost: whoever is heard next may be in another life."""
        self._expected = None

    def apply(self, sequence: int, payload: bytes) -> Iterator[KvEvents]:
        """The messages that a batch becomes. Raises KvEventError; the batch then counts as lost."""
        self._expected = sequence + 1
        yield from self._messages(self._changes(self._decode(payload)), cleared=False)

    def recovered(
        self, replayed: Sequence[tuple[int, bytes]], sequence: int, payload: bytes
    ) -> Iterator[KvEvents]:
        """The messages after a gap that ends with `payload`: `replayed` is what the engine still had, from
        `missing_from` on. Raises KvEventError."""
        fresh, first = self._expected is None, self.missing_from
        batches = dict(replayed)
        batches[sequence] = payload
        known = first
        while known in batches:
            known += 1
        whole = known > sequence
        if whole and not fresh:
            for number in range(first, known):
                yield from self.apply(number, batches[number])
            return
        # At the first hearing, what schedulers know from elsewhere stays unless this knows better.
        cleared = not fresh or self._sequence > 0 or self.restarts > 0 or (whole and self.blocks is not None)
        self.lost += 0 if whole or fresh else sequence - first
        start = first if whole else self._last_run(batches, sequence)
        if self.blocks is None:
            start = sequence
        self._expected = end = max(known, sequence + 1)
        yield from self._begin([batches[number] for number in range(start, end)], cleared)

    def unknown(self) -> Iterator[KvEvents]:
        """A batch that cannot be read: whatever was known is not certain any more."""
        self.lost += 1
        if self.blocks is not None:
            self.blocks.clear()
        self._expected = max(self._expected or 0, self._heard + 1)
        self._feed, self._sequence = self._feed_id(), 0
        yield from self._messages((), cleared=True)

    def announce(self) -> Iterator[KvEvents]:
        """Everything that is held, for schedulers that may have missed some of it."""
        if self.blocks is not None and self._expected is not None:
            self._feed, self._sequence = self._feed_id(), 0
            yield from self._messages(_stored(self.blocks.snapshot()), cleared=True)

    def _last_run(self, batches: dict[int, bytes], sequence: int) -> int:
        """Where the run of batches without a gap that ends with `sequence` begins."""
        start = sequence
        while start - 1 in batches:
            start -= 1
        return start

    def _begin(self, payloads: Iterable[bytes], cleared: bool) -> Iterator[KvEvents]:
        """A new feed: what stands after `payloads`, not how it came about."""
        if self.blocks is not None:
            self.blocks.clear()
        self._feed, self._sequence = self._feed_id(), 0
        for payload in payloads:
            for event in self._decode(payload):
                if isinstance(event, AllBlocksCleared):
                    cleared = True
                for _ in self._changes([event]):
                    pass
        held = self.blocks.snapshot() if self.blocks is not None else ()
        yield from self._messages(_stored(held), cleared)

    def _decode(self, payload: bytes) -> list[KvEvent]:
        events, rank = decode_batch(payload)
        return events if rank is None or self._dp_rank in (None, rank) else []

    def _changes(self, events: Iterable[KvEvent]) -> Iterator[KvChange | None]:
        """Changes in their order; None stands for a KV cache that is empty."""
        blocks = self.blocks
        for event in events:
            if isinstance(event, AllBlocksCleared):
                if blocks is not None:
                    blocks.clear()
                yield None
            elif blocks is None:
                continue
            elif isinstance(event, BlockStored):
                yield from _stored(blocks.store(event))
            else:
                yield from _changes_of(False, blocks.remove(event))

    def _messages(self, changes: Iterable[KvChange | None], cleared: bool) -> Iterator[KvEvents]:
        some: list[KvChange] = []
        for change in changes:
            if change is None:
                # What came before it in this message is gone as well.
                some, cleared = [], True
                continue
            last = some[-1] if some else None
            if last and last.stored == change.stored and len(last.hashes + change.hashes) <= _MAX_BYTES:
                # Evictions come one by one.
                some[-1] = KvChange(change.stored, last.hashes + change.hashes)
                continue
            some.append(change)
            if len(some) == MAX_KV_CHANGES:
                yield self._message(cleared, some)
                some, cleared = [], False
        if some or cleared:
            yield self._message(cleared, some)

    def _message(self, cleared: bool, changes: list[KvChange]) -> KvEvents:
        self._sequence += 1
        return KvEvents(self._instance, self._feed, self._sequence, cleared, tuple(changes))


def _stored(runs: Iterable[list[int]]) -> Iterator[KvChange]:
    for run in runs:
        yield from _changes_of(True, run)


def _changes_of(stored: bool, hashes: list[int]) -> Iterator[KvChange]:
    for start in range(0, len(hashes), MAX_BLOCKS):
        yield KvChange(stored, pack_hashes(hashes[start : start + MAX_BLOCKS]))
