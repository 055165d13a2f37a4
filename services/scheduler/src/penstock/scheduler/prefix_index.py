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

from collections.abc import Iterable, Sequence
from itertools import islice, repeat

from penstock.scheduler.masks import Mask

# Distinct sets of instances per generation; a generation ends early at this many (about 20 MB at 1,000
# instances). Forgetting an instance visits all of them: 3 ms per 10,000.
MAX_MASKS = 65_536
_ALL = -1


class _Generation:
    """Blocks and the masks they share. `made` lists every mask, since two may become equal."""

    __slots__ = ("blocks", "made", "masks")

    def __init__(self) -> None:
        self.blocks: dict[int, Mask] = {}
        self.masks: dict[int, Mask] = {}
        self.made: list[Mask] = []

    def mask(self, slots: int) -> Mask:
        mask = self.masks.get(slots)
        if mask is None:
            mask = self.masks[slots] = Mask(slots)
            self.made.append(mask)
        return mask

    def forget(self, slots: int) -> None:
        for mask in self.made:
            mask.slots &= ~slots
        self.masks = {mask.slots: mask for mask in self.made}


class PrefixIndex:
    """Which instance slots hold the head of a prompt. A million blocks take about 100 MB; a generation's
    dict grows by steps, of which the last, at 350,000 blocks, stops the loop for 15 ms."""

    def __init__(self, max_blocks: int) -> None:
        """`max_blocks` bounds both generations together."""
        self.resize(max_blocks)
        self._current, self._previous = _Generation(), _Generation()
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
        return len(self._current.blocks) + len(self._previous.blocks)

    def match(self, hashes: Sequence[int], candidates: int) -> list[tuple[int, int]]:
        """Steps (leading blocks, slots that hold at least so many), the blocks rising, the slots within
        `candidates` and each step's within those of the step before; empty if nobody holds the first."""
        steps: list[tuple[int, int]] = []
        position, end, slots = 0, len(hashes), candidates
        while position < end:
            held = self._slots(hashes[position]) & slots
            if not held:
                break
            position, slots = self._run(hashes, position, slots, held), held
            steps.append((position, held))
        return steps

    def insert(self, hashes: Sequence[int], slot: int, matched: int = 0) -> int:
        """Mark `slot` as given all of `hashes`, of which it is known to hold the first `matched`.

        Returns the number of leading blocks that were in place already: what a sibling that sees the same
        placements lacks is the rest. Of a prompt longer than a generation only the head is kept.
        """
        if len(hashes) > self._limit:
            hashes = hashes[: self._limit]
        kept = self._in_current(hashes, min(matched, len(hashes)))
        full = len(self._current.blocks) + len(hashes) - kept > self._limit
        if full or len(self._current.made) >= MAX_MASKS:
            self._turn_over()
            kept = 0
        self._mark(hashes, kept, 1 << slot)
        return kept

    def page(self, generation: int, position: int, count: int) -> tuple[list[int], list[int]]:
        """(blocks, the slots that hold each) of a generation, `count` from `position` on, in the order in
        which they came, which never changes; `turnovers` numbers them, the last two are held."""
        blocks = self._numbered(generation).blocks
        page = list(islice(blocks, position, position + count))
        return page, [blocks[block].slots for block in page]

    def restore(self, hashes: Sequence[int], slots: int, *, older: bool = False) -> int:
        """Mark all of `slots` as given these blocks, in the current or in the older generation: as many as
        there is room for, from the front on."""
        generation = self._previous if older else self._current
        blocks = generation.blocks
        if len(generation.made) >= MAX_MASKS:
            return 0
        hashes = hashes[: max(0, self._limit - len(blocks))]
        mask = generation.mask(slots)
        for block in hashes:
            held = blocks.get(block)
            blocks[block] = mask if held is None else generation.mask(held.slots | slots)
        return len(hashes)

    def _numbered(self, generation: int) -> _Generation:
        if generation == self.turnovers:
            return self._current
        return self._previous if generation == self.turnovers - 1 else _Generation()

    def remove(self, hashes: Iterable[int], slot: int) -> None:
        """Unmark blocks that `slot` holds no longer, children before their parents: with those that follow
        a removed block still marked, `match` may end anywhere among them."""
        kept, current, previous = ~(1 << slot), self._current, self._previous
        for block in hashes:
            # What the current generation says of a block hides what the previous one says.
            generation = current if block in current.blocks else previous
            mask = generation.blocks.get(block)
            if mask is None or mask.slots & kept == mask.slots:
                continue
            slots = mask.slots & kept
            # An entry stays where it is in the generation, since `page` counts on that. Without room to say
            # who else holds the block, nobody does.
            full = len(generation.made) >= MAX_MASKS and slots not in generation.masks
            generation.blocks[block] = generation.mask(0 if full else slots)

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

    def _in_current(self, hashes: Sequence[int], matched: int) -> int:
        """How many of the first `matched` blocks lead into the current generation."""
        blocks = self._current.blocks
        # Of a chain known from siblings the tail alone may be current; its head then has to be copied.
        low, high = 0, matched if hashes and hashes[0] in blocks else 0
        while low < high:
            middle = (low + high) >> 1
            if hashes[middle] in blocks:
                low = middle + 1
            else:
                high = middle
        return low

    def _turn_over(self) -> None:
        self._previous, self._current = self._current, _Generation()
        self._began_at = None
        self.turnovers += 1

    def _mark(self, hashes: Sequence[int], position: int, bit: int) -> None:
        generation, end = self._current, len(hashes)
        while position < end:
            held = self._slots(hashes[position])
            # Nobody was given this block, hence none after it.
            stop = self._run(hashes, position, _ALL, held) if held else end
            generation.blocks.update(
                zip(hashes[position:stop], repeat(generation.mask(held | bit)), strict=False)
            )
            position = stop

    def _slots(self, block: int) -> int:
        mask = self._current.blocks.get(block) or self._previous.blocks.get(block)
        return mask.slots if mask is not None else 0

    def _run(self, hashes: Sequence[int], low: int, slots: int, held: int) -> int:
        """The end of the run of blocks from `low` on that are held by `held` of `slots`."""
        current, previous = self._current.blocks.get, self._previous.blocks.get
        high = len(hashes)
        while high - low > 1:
            middle = (low + high) >> 1
            block = hashes[middle]
            mask = current(block) or previous(block)
            if mask is not None and mask.slots & slots == held:
                low = middle
            else:
                high = middle
        return high
