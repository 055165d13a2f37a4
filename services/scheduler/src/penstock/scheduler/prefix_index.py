"""PrefixIndex: block hash -> the instances that were given this block, bounded (DESIGN D6).

A block hash is chained with its parent's, so an instance marked at block i was given all of 0..i. Along
a prompt the marks therefore only thin out, and bisection finds where. A generation holds with a block
all blocks before it, so this outlives eviction. Only of a chain whose head this replica never saw (a
sibling's message was lost) can blocks be missing in front; bisection may then end early, but wherever it
ends, the match is true.

Recency is two generations. Blocks are written to the current one, copied from the previous one when used
again; when the current one is full it becomes the previous one, whose content goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from penstock.scheduler.chain import Hashes
from penstock.scheduler.columns import NATIVE
from penstock.scheduler.generations import Generation, first_generation

# Distinct sets of instances per generation; a generation ends early at this many (about 20 MB at 1,000
# instances). Forgetting an instance visits all of them: 3 ms per 10,000.
MAX_MASKS = 65_536
_ALL: Final = -1


class PrefixIndex:
    """Which instance slots hold the head of a prompt. In Python a million blocks take about 100 MB, and a
    generation grows by steps, of which the last, at 350,000 blocks, stops the loop for 15 ms."""

    def __init__(self, max_blocks: int) -> None:
        """`max_blocks` bounds both generations together."""
        self.resize(max_blocks)
        self._current, self._previous = first_generation(), first_generation()
        self._began_at: float | None = None
        self.turnovers = 0

    def resize(self, max_blocks: int) -> None:
        """Another bound; what is above it goes when the generations next turn over."""
        if max_blocks < 2:
            raise ValueError(f"a prefix index needs room for 2 blocks, got {max_blocks}")
        self._limit = max_blocks // 2

    @property
    def max_blocks(self) -> int:
        """The bound of both generations together."""
        return 2 * self._limit

    def __len__(self) -> int:
        """Blocks held, those in both generations twice."""
        return len(self._current) + len(self._previous)

    def match(self, hashes: Hashes, candidates: int) -> list[tuple[int, int]]:
        """Steps (leading blocks, slots that hold at least so many), the blocks rising, the slots within
        `candidates` and each step's within those of the step before; empty if nobody holds the first."""
        current, previous = self._current, self._previous
        hashes = current.chain(hashes) if NATIVE else hashes
        steps: list[tuple[int, int]] = []
        position, end, slots = 0, len(hashes), candidates
        while position < end:
            held = current.slots_at(hashes, position, previous) & slots
            if not held:
                break
            position, slots = current.run(previous, hashes, position, slots, held), held
            steps.append((position, held))
        return steps

    def insert(self, hashes: Hashes, slot: int, matched: int = 0) -> int:
        """Mark `slot` as given all of `hashes`, of which it is known to hold the first `matched`.

        Returns the number of leading blocks that were in place already: what a sibling that sees the same
        placements lacks is the rest. Of a prompt longer than a generation only the head is kept.
        """
        current = self._current
        hashes = current.chain(hashes) if NATIVE else hashes
        end, limit = len(hashes), self._limit
        if end > limit:
            end = limit
        kept = current.leading(hashes, matched if matched < end else end)
        if not current.takes(end - kept, limit, MAX_MASKS):
            self._turn_over()
            kept = 0
        self._mark(hashes, kept, end, 1 << slot)
        return kept

    def page(self, generation: int, position: int, count: int) -> tuple[list[int], list[int]]:
        """(blocks, the slots that hold each) of a generation, `count` from `position` on, in the order in
        which they came, which never changes; `turnovers` numbers them, the last two are held."""
        return self._numbered(generation).page(position, count)

    def restore(self, hashes: Hashes, slots: int, *, older: bool = False) -> int:
        """Mark all of `slots` as given these blocks, in the current or in the older generation: as many as
        there is room for, from the front on."""
        generation = self._previous if older else self._current
        if generation.sets() >= MAX_MASKS:
            return 0
        hashes = generation.chain(hashes)
        count = min(len(hashes), max(0, self._limit - len(generation)))
        for position in range(count):
            held = generation.own_slots_at(hashes, position)
            generation.put(hashes, position, position + 1, slots if held < 0 else held | slots)
        return count

    def _numbered(self, generation: int) -> Generation:
        if generation == self.turnovers:
            return self._current
        return self._previous if generation == self.turnovers - 1 else Generation()

    def remove(self, hashes: Iterable[int], slot: int) -> None:
        """Unmark blocks that `slot` holds no longer, children before their parents: with those that follow
        a removed block still marked, `match` may end anywhere among them."""
        kept, current, previous = ~(1 << slot), self._current, self._previous
        for block in hashes:
            # What the current generation says of a block hides what the previous one says.
            own, generation = current.chain([block]), current
            held = current.own_slots_at(own, 0)
            if held < 0:
                generation, held = previous, previous.own_slots_at(own, 0)
            if held < 0 or held & kept == held:
                continue
            slots = held & kept
            # An entry stays where it is in the generation, since `page` counts on that. Without room to say
            # who else holds the block, nobody does.
            full = generation.sets() >= MAX_MASKS and not generation.has_set(slots)
            generation.put(own, 0, 1, 0 if full else slots)

    def expire(self, now: float, max_age_s: float) -> None:
        """Let a generation end that began over half of `max_age_s` ago: what was not placed or announced for
        so long is gone after `max_age_s` at the latest. Times are of one monotonic clock."""
        if self._began_at is None:
            self._began_at = now
        elif now - self._began_at >= max_age_s / 2:
            self._turn_over()
            self._began_at = now

    def forget(self, slots: int) -> None:
        """Take these slots' bits out of every mask; they may stand for other instances afterwards."""
        self._current.forget(slots)
        self._previous.forget(slots)

    def _turn_over(self) -> None:
        self._previous, self._current = self._current, self._current.next_one()
        self._began_at = None
        self.turnovers += 1

    def _mark(self, hashes: Hashes, position: int, end: int, bit: int) -> None:
        current, previous = self._current, self._previous
        while position < end:
            held = current.slots_at(hashes, position, previous)
            # Nobody was given this block, hence none after it.
            stop = current.run(previous, hashes, position, _ALL, held) if held else end
            if stop > end:
                stop = end
            current.put(hashes, position, stop, held | bit)
            position = stop
