"""Generations of the prefix index: blocks in the order in which they came, and the sets of slots they share.

In Python a generation is a dict. As machine code it is a hash table of plain numbers, the same to its users:
a block takes 20 to 40 bytes of it instead of a hundred, and no object (decision 0063).
"""

from __future__ import annotations

from itertools import islice, repeat
from typing import TYPE_CHECKING, Final

from penstock.scheduler.chain import Chain, Hashes, as_chain, unsigned
from penstock.scheduler.columns import NATIVE
from penstock.scheduler.masks import Mask

if TYPE_CHECKING:
    from librt.vecs import vec
    from mypy_extensions import i32, i64

# Blocks that a table has room for to begin with.
_FIRST_ROOM: Final = 1024
# splitmix64's first factor, as a signed number.
_MIX: Final = 0xBF58476D1CE4E5B9 - (1 << 64)
_LOW_HALF: Final = 0xFFFFFFFF


class Generation:
    """A dict of the masks that blocks share. `made` lists every mask, since two may become equal."""

    def __init__(self) -> None:
        self._blocks: dict[int, Mask] = {}
        self._masks: dict[int, Mask] = {}
        self._made: list[Mask] = []

    def __len__(self) -> int:
        return len(self._blocks)

    def next_one(self) -> Generation:
        """An empty one, to follow this."""
        return Generation()

    def sets(self) -> int:
        """Sets of slots that were made."""
        return len(self._made)

    def takes(self, blocks: int, limit: int, most_sets: int) -> bool:
        """Whether there is room for so many more blocks, and for another set."""
        return len(self._blocks) + blocks <= limit and len(self._made) < most_sets

    def has_set(self, slots: int) -> bool:
        """Whether blocks may be held by exactly these without another set."""
        return slots in self._masks

    def chain(self, hashes: Hashes) -> Hashes:
        """Hashes in the form in which the others take them."""
        return hashes

    def slots_at(self, hashes: Hashes, position: int, older: Generation) -> int:
        """Who holds a block: what this generation says of it hides what the older one says."""
        block = hashes[position]
        mask = self._blocks.get(block) or older._blocks.get(block)
        return mask.slots if mask is not None else 0

    def own_slots_at(self, hashes: Hashes, position: int) -> int:
        """Who holds a block by this generation; -1 if it says nothing of it."""
        mask = self._blocks.get(hashes[position])
        return -1 if mask is None else mask.slots

    def run(self, older: Generation, hashes: Hashes, low: int, slots: int, held: int) -> int:
        """The end of the run of blocks from `low` on that are held by `held` of `slots`."""
        current, previous = self._blocks.get, older._blocks.get
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

    def leading(self, hashes: Hashes, matched: int) -> int:
        """How many of the first `matched` blocks lead into this generation."""
        blocks = self._blocks
        # Of a chain known from siblings the tail alone may be current; its head then has to be copied.
        low, high = 0, matched if len(hashes) and hashes[0] in blocks else 0
        while low < high:
            middle = (low + high) >> 1
            if hashes[middle] in blocks:
                low = middle + 1
            else:
                high = middle
        return low

    def put(self, hashes: Hashes, start: int, stop: int, slots: int) -> None:
        """Blocks from `start` to before `stop` are held by exactly these; where one is stays where it is."""
        assert not isinstance(hashes, Chain)
        mask = self._masks.get(slots)
        if mask is None:
            mask = self._masks[slots] = Mask(slots)
            self._made.append(mask)
        self._blocks.update(zip(hashes[start:stop], repeat(mask), strict=False))

    def page(self, position: int, count: int) -> tuple[list[int], list[int]]:
        """(blocks, the slots that hold each), `count` from `position` on."""
        blocks = self._blocks
        page = list(islice(blocks, position, position + count))
        return page, [blocks[block].slots for block in page]

    def forget(self, slots: int) -> None:
        """Take these slots out of every set; they may stand for other instances afterwards."""
        for mask in self._made:
            mask.slots &= ~slots
        self._masks = {mask.slots: mask for mask in self._made}


class Table(Generation):
    """The same as machine code: open addressing, of places in lists of blocks and of the numbers of sets."""

    def __init__(self, room: int = _FIRST_ROOM) -> None:
        """`room` is a power of two."""
        super().__init__()
        self._keys = vec[i64]([0] * room)
        self._numbers = vec[i32]([0] * room)
        # Of each place 1 + that in `_keys`, 0 where none is; twice as long.
        self._places = vec[i32]([0] * (2 * room))
        self._last_place: i64 = 2 * room - 1
        self._room: i64 = room
        self._count: i64 = 0
        # By number; 0 stands for none.
        self._sets: list[int] = [0]
        self._number_by_set: dict[int, int] = {}

    def __len__(self) -> int:
        return self._count

    def next_one(self) -> Generation:
        return Table(self._room)

    def sets(self) -> int:
        return len(self._sets) - 1

    def takes(self, blocks: int, limit: int, most_sets: int) -> bool:
        return self._count + blocks <= limit and len(self._sets) <= most_sets

    def has_set(self, slots: int) -> bool:
        return slots in self._number_by_set

    def chain(self, hashes: Hashes) -> Hashes:
        return as_chain(hashes)

    def slots_at(self, hashes: Hashes, position: int, older: Generation) -> int:
        assert isinstance(older, Table)
        block = as_chain(hashes).blocks[position]
        number = self._find(block)
        return self._sets[number] if number else older._sets[older._find(block)]

    def own_slots_at(self, hashes: Hashes, position: int) -> int:
        number = self._find(as_chain(hashes).blocks[position])
        return self._sets[number] if number else -1

    def run(self, older: Generation, hashes: Hashes, low: int, slots: int, held: int) -> int:
        assert isinstance(older, Table)
        blocks = as_chain(hashes).blocks
        first: i64 = low
        last: i64 = len(blocks)
        # Most blocks of a run share one set: it is asked once.
        known: i64 = 0
        old_known: i64 = 0
        while last - first > 1:
            middle = (first + last) >> 1
            number = self._find(blocks[middle])
            if number:
                same = number == known
                if not same and self._sets[number] & slots == held:
                    known, same = number, True
            else:
                number = older._find(blocks[middle])
                same = number != 0 and number == old_known
                if not same and number and older._sets[number] & slots == held:
                    old_known, same = number, True
            if same:
                first = middle
            else:
                last = middle
        return last

    def leading(self, hashes: Hashes, matched: int) -> int:
        blocks = as_chain(hashes).blocks
        low: i64 = 0
        high: i64 = matched if len(blocks) and self._find(blocks[0]) else 0
        while low < high:
            middle = (low + high) >> 1
            if self._find(blocks[middle]):
                low = middle + 1
            else:
                high = middle
        return low

    def put(self, hashes: Hashes, start: int, stop: int, slots: int) -> None:
        blocks = as_chain(hashes).blocks
        number = self._number_by_set.get(slots, 0)
        if not number:
            number = self._number_by_set[slots] = len(self._sets)
            self._sets.append(slots)
        own: i32 = number
        i: i64 = start
        end: i64 = stop
        while i < end:
            self._put(blocks[i], own)
            i += 1

    def page(self, position: int, count: int) -> tuple[list[int], list[int]]:
        i: i64 = position
        end: i64 = min(position + count, self._count)
        blocks: list[int] = []
        held: list[int] = []
        while i < end:
            blocks.append(unsigned(self._keys[i]))
            held.append(self._sets[self._numbers[i]])
            i += 1
        return blocks, held

    def forget(self, slots: int) -> None:
        self._sets = [one & ~slots for one in self._sets]
        self._number_by_set = {self._sets[number]: number for number in range(1, len(self._sets))}

    def _place(self, block: i64) -> i64:
        """Where a block stands among the places, or would."""
        places, keys, last = self._places, self._keys, self._last_place
        mixed = block * _MIX
        place = (mixed ^ ((mixed >> 32) & _LOW_HALF)) & last
        while True:
            at = i64(places[place])
            if not at or keys[at - 1] == block:
                return place
            place = (place + 1) & last

    def _find(self, block: i64) -> i64:
        """The number of the set that holds a block, 0 if it is not here."""
        at = i64(self._places[self._place(block)])
        return i64(self._numbers[at - 1]) if at else i64(0)

    def _put(self, block: i64, number: i32) -> None:
        place = self._place(block)
        at = i64(self._places[place])
        if at:
            self._numbers[at - 1] = number
            return
        if self._count == self._room:
            self._grow()
            self._put(block, number)
            return
        self._keys[self._count], self._numbers[self._count] = block, number
        self._count += 1
        self._places[place] = i32(self._count)

    def _grow(self) -> None:
        """Twice the room: half a million blocks take 10 ms."""
        keys, numbers, count = self._keys, self._numbers, self._count
        room = 2 * self._room
        self._keys, self._numbers = vec[i64]([0] * room), vec[i32]([0] * room)
        self._places = vec[i32]([0] * (2 * room))
        self._room, self._last_place, self._count = room, 2 * room - 1, 0
        i: i64 = 0
        while i < count:
            self._put(keys[i], numbers[i])
            i += 1


def first_generation() -> Generation:
    """An empty one, of the kind that is faster here."""
    return Table() if NATIVE else Generation()
