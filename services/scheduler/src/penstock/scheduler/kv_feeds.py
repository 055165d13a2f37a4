"""KvFeeds: what engines say of their KV caches, applied to the prefix index, as long as it proves right.

A feed is followed by its sequence: whenever messages are missing, or another feed begins, what the index
holds of the instance may be wrong and is forgotten. What is not held is learnt anew, from placements too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from penstock.common.messages import InstanceSpeed, KvEvents
from penstock.common.model import InstanceId
from penstock.scheduler.chain import HASH_BYTES, unpack
from penstock.scheduler.precision import Trust, Window
from penstock.scheduler.prefix_index import PrefixIndex

EVENTS, PLACEMENTS = "events", "placements"


class TrustChange(msgspec.Struct, frozen=True):
    """A feed of events that is not used from here on, or is again."""

    instance: InstanceId
    trusted: bool
    precision: float


class _Held:
    """One instance: the feed as far as it was followed, the trust in it, and how placements do alone."""

    __slots__ = ("events", "feed", "next", "placements")

    def __init__(self) -> None:
        self.feed = ""
        self.next = 0
        self.events = Trust()
        self.placements = Window()


class KvFeeds:
    """`slot_of` gives an instance's slot in the index, None if the registry does not hold it."""

    def __init__(self, index: PrefixIndex, slot_of: Callable[[InstanceId], int | None]) -> None:
        self._index, self._slot_of = index, slot_of
        self._held: dict[InstanceId, _Held] = {}
        self._changes: list[TrustChange] = []
        # Messages by what became of them.
        self.results = dict.fromkeys(("applied", "cleared", "gap", "unknown_instance", "distrusted"), 0)

    def take(self, events: KvEvents) -> None:
        """Apply one message."""
        slot = self._slot_of(events.instance)
        if slot is None:
            self.results["unknown_instance"] += 1
            return
        held = self._of(events.instance)
        heard, expected = held.feed, held.next
        held.feed, held.next = events.feed, events.sequence + 1
        if not held.events.trusted:
            self.results["distrusted"] += 1
            return
        if heard and (heard, expected) != (events.feed, events.sequence):
            self._index.forget(1 << slot)
            self.results["gap"] += 1
        elif events.cleared:
            self._index.forget(1 << slot)
            self.results["cleared"] += 1
        self.results["applied"] += 1
        for change in events.changes:
            if len(change.hashes) % HASH_BYTES:
                continue
            hashes = unpack(change.hashes)
            if change.stored:
                self._index.insert(hashes, slot)
            else:
                self._index.remove(hashes, slot)

    def judge(self, now: InstanceSpeed, before: InstanceSpeed) -> None:
        """Take what an ingress says of the answers of an instance since it last said so."""
        answers = now.judged - before.judged
        expected = now.expected_tokens - before.expected_tokens
        confirmed = now.confirmed_tokens - before.confirmed_tokens
        if answers <= 0 or expected < 0 or confirmed < 0:
            # Nothing to judge by; or sums that fell are another incarnation's.
            return
        held = self._of(now.instance)
        if not held.feed or not held.events.trusted:
            held.placements.add(answers, expected, confirmed)
        if held.feed and held.events.judge(answers, expected, confirmed):
            slot = self._slot_of(now.instance)
            if slot is not None:
                # On trial as after its loss, what is held came from the other one of the two.
                self._index.forget(1 << slot)
            window = held.events.window if not held.events.trusted else held.placements
            self._changes.append(TrustChange(now.instance, held.events.trusted, window.precision))

    def forget(self, instances: Iterable[InstanceId]) -> None:
        """Instances that left."""
        for instance in instances:
            self._held.pop(instance, None)

    def follows(self, instance: InstanceId) -> bool:
        """Whether its engine says by itself when its KV cache is empty."""
        held = self._held.get(instance)
        return held is not None and bool(held.feed) and held.events.trusted

    def changes(self) -> list[TrustChange]:
        """The changes of trust since the last call."""
        changes, self._changes = self._changes, []
        return changes

    def counts(self) -> tuple[int, int]:
        """(feeds of events, those of them that are not used)."""
        feeds = [held for held in self._held.values() if held.feed]
        return len(feeds), sum(not held.events.trusted for held in feeds)

    def precisions(self) -> list[tuple[tuple[str, str], float]]:
        """((instance, feed), precision) over the last answers, of what was judged."""
        return [
            ((instance, name), window.precision)
            for instance, held in self._held.items()
            for name, window in ((EVENTS, held.events.window), (PLACEMENTS, held.placements))
            if window.answers
        ]

    def _of(self, instance: InstanceId) -> _Held:
        held = self._held.get(instance)
        if held is None:
            held = self._held[instance] = _Held()
        return held
