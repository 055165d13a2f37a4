"""What a replica tells a sibling that is not warm, piece by piece, and what that makes of it.

The giver keeps nothing of it: the cursor says where to go on, and blocks never change their order within a
generation. A piece is built in about 2 ms and is of use by itself; pieces may be repeated, and merged while
placements come in. Work in flight is not part of it: the ingresses tell that (DESIGN 3.4).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from itertools import pairwise

from penstock.common.identity import Identity
from penstock.common.messages import (
    MAX_PIECE_BLOCKS,
    MAX_PIECE_FIGURES,
    MAX_PIECE_INSTANCES,
    InstanceFigures,
    SnapshotCursor,
    SnapshotPiece,
)
from penstock.common.model import InstanceId
from penstock.scheduler.chain import HASH_BYTES
from penstock.scheduler.feed import FeedReader, FeedWriter
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.view import ClusterView

FIGURES, BLOCKS = 0, 1
LEARNED = InstanceFigures.__struct_fields__[1:]
# The rest of 256 KiB is for hashes (32 KiB) and runs (16 KiB).
MAX_NAME_BYTES, MAX_MASK_BYTES = 96 * 1024, 64 * 1024
_RUN = struct.Struct("<HH")
# The index keeps the upper 60 bits of a hash.
_SHIFT = 4


class BadPiece(Exception):
    """A piece that contradicts itself."""


class Giver:
    """Answers with pieces of one replica's knowledge."""

    def __init__(
        self, own: Identity, view: ClusterView, index: PrefixIndex, writer: FeedWriter, reader: FeedReader
    ) -> None:
        self._own, self._view, self._index = own, view, index
        self._writer, self._reader = writer, reader

    def refusal(self) -> SnapshotPiece:
        """Not from here."""
        return SnapshotPiece(self._own.id, self._own.incarnation, refused=True)

    def piece(self, cursor: SnapshotCursor | None) -> SnapshotPiece:
        """The piece at `cursor`, None for the first. A cursor that makes no sense gives the end."""
        if cursor is not None and cursor.part:
            return self._blocks(cursor)
        position = cursor.position if cursor is not None else 0
        names = self._view.names()
        slots = sorted(names, key=names.__getitem__)
        figures = tuple(self._figures(names[slot], slot) for slot in slots[position:][:MAX_PIECE_FIGURES])
        more = position + len(figures) < len(slots)
        follows = (
            SnapshotCursor(FIGURES, 0, position + len(figures))
            if more
            else SnapshotCursor(BLOCKS, self._index.turnovers, 0)
        )
        writers = (
            () if cursor else (*self._reader.positions()[1 - MAX_PIECE_FIGURES :], self._writer.position())
        )
        return SnapshotPiece(self._own.id, self._own.incarnation, follows, False, writers, figures)

    def _figures(self, name: InstanceId, slot: int) -> InstanceFigures:
        loads = self._view.loads
        return InstanceFigures(name, *(max(0.0, getattr(loads, field).item(slot)) for field in LEARNED))

    def _blocks(self, cursor: SnapshotCursor) -> SnapshotPiece:
        """The generation that was current at first, then the one before it, as long as they are held."""
        index, own = self._index, self._own
        blocks, held = index.page(cursor.generation, cursor.position, MAX_PIECE_BLOCKS)
        packed = _Packed(self._view.names())
        taken = packed.take(held)
        follows: SnapshotCursor | None = SnapshotCursor(BLOCKS, cursor.generation, cursor.position + taken)
        older = cursor.generation != index.turnovers
        if taken == len(blocks) < MAX_PIECE_BLOCKS:
            before = cursor.generation - 1
            follows = None if older or before < 0 else SnapshotCursor(BLOCKS, before, 0)
        return SnapshotPiece(
            own.id,
            own.incarnation,
            follows,
            False,
            (),
            (),
            tuple(packed.names),
            tuple(packed.masks),
            bytes(packed.runs),
            struct.pack(f"<{taken}Q", *(block << _SHIFT for block in blocks[:taken])),
            older,
        )


class _Packed:
    """Masks of slots, in turn, as runs over a list of instances of their own."""

    def __init__(self, instances: dict[int, InstanceId]) -> None:
        self._instances = instances
        self._places: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._name_bytes = self._mask_bytes = 0
        self.names: list[InstanceId] = []
        self.masks: list[bytes] = []
        self.runs = bytearray()

    def take(self, held: Sequence[int]) -> int:
        """How many of `held` fit."""
        starts = [place for place, (one, other) in enumerate(pairwise(held), 1) if one != other]
        for start, stop in pairwise((0, *starts, len(held)) if held else ()):
            number = self._numbers.get(held[start])
            if number is None:
                if self._mask_bytes >= MAX_MASK_BYTES or self._name_bytes >= MAX_NAME_BYTES:
                    return start
                number = self._numbers[held[start]] = self._add(held[start])
            self.runs += _RUN.pack(number, stop - start)
        return len(held)

    def _add(self, slots: int) -> int:
        """A mask; of one whose instances' names do not fit into any piece, some are left out."""
        bits = 0
        while slots:
            slot = (slots & -slots).bit_length() - 1
            slots &= slots - 1
            place = self._places.get(slot)
            if place is None:
                name = self._instances.get(slot)
                if (
                    name is None
                    or len(self.names) >= MAX_PIECE_INSTANCES
                    or self._name_bytes >= MAX_NAME_BYTES
                ):
                    continue
                place = self._places[slot] = len(self.names)
                self.names.append(name)
                self._name_bytes += len(name.encode("utf-8", "replace")) + 3
            bits |= 1 << place
        mask = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
        self._mask_bytes += len(mask) + 2
        self.masks.append(mask)
        return len(self.masks) - 1


class Taker:
    """Merges a sibling's pieces into one replica's view and index."""

    def __init__(self, view: ClusterView, index: PrefixIndex, reader: FeedReader) -> None:
        self._view, self._index, self._reader = view, index, reader

    def take(self, piece: SnapshotPiece) -> int:
        """Blocks taken over. Raises BadPiece, with nothing taken of it, if it contradicts itself."""
        runs = _runs(piece)
        self._reader.start_from(piece.writers)
        for one in piece.figures:
            self._take_figures(one)
        slots = [self._view.slot(name) for name in piece.instances]
        masks = [_local(mask, slots) for mask in piece.masks]
        hashes = [
            hash_ >> _SHIFT for hash_ in struct.unpack(f"<{len(piece.hashes) // HASH_BYTES}Q", piece.hashes)
        ]
        taken = start = 0
        for number, count in runs:
            mask = masks[number]
            if mask:
                taken += self._index.restore(hashes[start : start + count], mask, older=piece.older)
            start += count
        return taken

    def _take_figures(self, figures: InstanceFigures) -> None:
        """Those of whom more is known; sums of two replicas are of the same requests."""
        slot, loads = self._view.slot(figures.instance), self._view.loads
        if slot is None:
            return
        given, own = (
            figures.prefill_tokens + figures.decode_tokens,
            loads.prefill_tokens + loads.decode_tokens,
        )
        for field in LEARNED if given >= own.item(slot) else ():
            getattr(loads, field)[slot] = getattr(figures, field)


def _runs(piece: SnapshotPiece) -> list[tuple[int, int]]:
    if len(piece.runs) % _RUN.size or len(piece.hashes) % HASH_BYTES:
        raise BadPiece("runs or hashes are cut off")
    runs = list(_RUN.iter_unpack(piece.runs))
    if any(number >= len(piece.masks) for number, _ in runs):
        raise BadPiece("a run names a mask that is not there")
    if sum(count for _, count in runs) != len(piece.hashes) // HASH_BYTES:
        raise BadPiece("the runs do not add up to the hashes")
    return runs


def _local(mask: bytes, slots: Sequence[int | None]) -> int:
    """The bits of a piece's mask as bits of this replica's slots; unknown instances are left out."""
    bits, local = int.from_bytes(mask, "little") & ((1 << len(slots)) - 1), 0
    while bits:
        slot = slots[(bits & -bits).bit_length() - 1]
        bits &= bits - 1
        if slot is not None:
            local |= 1 << slot
    return local
