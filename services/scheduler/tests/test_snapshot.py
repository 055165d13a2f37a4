"""Snapshots of one replica for another: complete, in bounded pieces, and harmless whatever they say."""

from __future__ import annotations

import struct
from random import Random

import msgspec
import pytest

from penstock.common.bus import Entry, Listing, Position
from penstock.common.codec import decode, encode, encode_record
from penstock.common.identity import Identity
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.messages import (
    MAX_PIECE_BLOCKS,
    CompleteMarker,
    Placed,
    PlacedFeed,
    SnapshotCursor,
    SnapshotPiece,
    WriterPosition,
)
from penstock.common.model import Endpoint, Instance
from penstock.scheduler.feed import MAX_BACKLOG, Backlog
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.replica import Replica
from penstock.scheduler.snapshot import BLOCKS, BadPiece

MOST_BYTES = 256 * 1024


def replica(name: str, *instances: str, max_blocks: int = 100_000) -> Replica:
    one = Replica(Identity("scheduler", name, "1"), Catalog(Thresholds()), "cache-aware", max_blocks)
    entries = {complete_key("t"): Entry(encode_record(CompleteMarker("t", ("t",))), 1)}
    for revision, instance in enumerate(instances, 2):
        record = Instance(id=instance, endpoint=Endpoint("h", 1), models=("m",))
        entries[instance_key(instance)] = Entry(encode_instance(record), revision)
    one.registry(Listing(Position("1", 100), entries))
    return one


def give(giver: Replica, taker: Replica) -> list[SnapshotPiece]:
    """Every piece, over the wire."""
    pieces: list[SnapshotPiece] = []
    cursor: SnapshotCursor | None = None
    while not pieces or cursor is not None:
        data = encode(giver.giver.piece(cursor))
        assert len(data) <= MOST_BYTES
        pieces.append(decode(SnapshotPiece, data))
        taker.taker.take(pieces[-1])
        cursor = pieces[-1].next
        assert len(pieces) < 1000
    return pieces


def chain(rng: Random, blocks: int) -> list[int]:
    return [rng.getrandbits(60) for _ in range(blocks)]


def holders(one: Replica, hashes: list[int]) -> list[tuple[int, set[str]]]:
    """(leading blocks, ids of the instances that hold them)."""
    names = one.view.names()
    steps = one.index.match(hashes, -1)
    return [(blocks, {name for slot, name in names.items() if slots >> slot & 1}) for blocks, slots in steps]


def test_a_replica_knows_after_a_snapshot_what_its_sibling_knew() -> None:
    rng = Random(1)
    # In another order, so that slots differ.
    giver, taker = replica("s1", "a", "b", "c"), replica("s2", "b", "d", "c", "a")
    system = chain(rng, 20)
    prompts = [system + chain(rng, rng.randrange(1, 300)) for _ in range(80)]
    for prompt in prompts:
        for name in rng.sample("abc", rng.randrange(1, 4)):
            slot = giver.view.slot(name)
            assert slot is not None
            giver.index.insert(prompt, slot)
    pieces = give(giver, taker)
    assert len([piece for piece in pieces if piece.hashes]) > 2
    assert len(taker.index) == len(giver.index)
    for prompt in prompts:
        assert holders(taker, prompt) == holders(giver, prompt) != []


def test_what_an_index_turned_over_before_and_while_it_is_given_arrives() -> None:
    rng = Random(2)
    giver, taker = replica("s1", "a", max_blocks=20_000), replica("s2", "a", max_blocks=20_000)
    old, new, newest = chain(rng, 9_000), chain(rng, 9_000), chain(rng, 9_000)
    giver.index.insert(old, 0)
    giver.index.insert(new, 0)
    assert giver.index.turnovers == 1
    first = giver.giver.piece(SnapshotCursor(BLOCKS, 1, 0))
    give(giver, taker)
    assert holders(taker, old) == [(9_000, {"a"})]
    assert holders(taker, new) == [(9_000, {"a"})]
    other = replica("s3", "a", max_blocks=20_000)
    other.taker.take(first)
    giver.index.insert(newest, 0)
    cursor = first.next
    while cursor is not None:
        piece = giver.giver.piece(cursor)
        other.taker.take(piece)
        cursor = piece.next
    assert holders(other, new)[-1][0] >= 9_000 - MAX_PIECE_BLOCKS


def test_figures_and_positions_are_taken_over() -> None:
    giver, taker = replica("s1", "a", "b"), replica("s2", "b", "a")
    giver.follow(PlacedFeed("s9", "7", 41, (Placed("d", "i", "1", "a"),)), 0.0)
    loads = giver.view.loads
    slot = giver.view.slot("b")
    assert slot is not None
    loads.prefill_ms[slot], loads.prefill_tokens[slot], loads.usual[slot] = 500.0, 1000.0, 3.0
    (piece, *_) = give(giver, taker)
    assert set(piece.writers) == {WriterPosition("s9", "7", 41), WriterPosition("s1", "1", 0)}
    there, slot = taker.view.loads, taker.view.slot("b")
    assert slot is not None
    assert (there.prefill_ms[slot], there.prefill_tokens[slot], there.usual[slot]) == (500.0, 1000.0, 3.0)
    taker.follow(PlacedFeed("s9", "7", 44, (Placed("e", "i", "1", "a"),)), 0.0)
    assert taker.behind == taker.feed_missed == 2


def test_placements_wait_for_the_snapshot_and_are_applied_in_slices() -> None:
    one = replica("s1", "a")
    one.hold()
    for number in range(1, 8):
        one.follow(PlacedFeed("s2", "1", number, (Placed(f"d{number}", "i", "1", "a"),)), 0.0)
    assert (one.ledger.in_flight, one.behind) == (0, 7)
    assert one.catch_up(0.0, 3)
    assert (one.ledger.in_flight, one.behind) == (3, 4)
    one.follow(PlacedFeed("s2", "1", 8, (Placed("d8", "i", "1", "a"),)), 0.0)
    assert not one.catch_up(0.0, 100)
    one.follow(PlacedFeed("s2", "1", 9, (Placed("d9", "i", "1", "a"),)), 0.0)
    assert (one.ledger.in_flight, one.behind, one.feed_missed) == (9, 0, 0)


def test_a_backlog_past_its_bound_gives_up_its_oldest() -> None:
    backlog, feed = Backlog(), PlacedFeed("s2", "1", 1, (Placed("d", "i", "1", "a"),) * 32)
    given_up = [one for _ in range(MAX_BACKLOG // 32 + 2) for one in backlog.put(feed)]
    assert (len(given_up), backlog.placements) == (2, MAX_BACKLOG)


def test_pieces_keep_their_bound_with_the_longest_names_and_a_mask_for_every_block() -> None:
    names = [f"{number:03}" + "n" * 509 for number in range(120)]
    giver, taker = replica("s1", *names), replica("s2", *names)
    rng = Random(3)
    for _ in range(5000):
        giver.index.restore([rng.getrandbits(60)], rng.getrandbits(120))
    pieces = give(giver, taker)
    assert sum(len(piece.hashes) for piece in pieces) == 5000 * 8
    assert len(taker.index) == 5000


def test_an_index_too_small_for_it_keeps_what_fits() -> None:
    giver, taker = replica("s1", "a"), replica("s2", "a", max_blocks=1000)
    for seed in range(20):
        giver.index.insert(chain(Random(seed), 100), 0)
    give(giver, taker)
    assert 0 < len(taker.index) <= 1000


HASHES = struct.pack("<3Q", 16, 32, 48)


@pytest.mark.parametrize(
    "piece",
    [
        SnapshotPiece("x", "1", hashes=HASHES),
        SnapshotPiece("x", "1", hashes=HASHES[:-1], runs=struct.pack("<HH", 0, 3), masks=(b"\1",)),
        SnapshotPiece("x", "1", hashes=HASHES, runs=struct.pack("<HH", 0, 2), masks=(b"\1",)),
        SnapshotPiece("x", "1", hashes=HASHES, runs=struct.pack("<HH", 1, 3), masks=(b"\1",)),
        SnapshotPiece("x", "1", hashes=HASHES, runs=b"\0\0\3", masks=(b"\1",)),
    ],
)
def test_a_piece_that_contradicts_itself_changes_nothing(piece: SnapshotPiece) -> None:
    one = replica("s1", "a")
    writers = (WriterPosition("s9", "1", 10**9),)
    with pytest.raises(BadPiece):
        one.taker.take(msgspec.structs.replace(piece, writers=writers, instances=("a",)))
    assert len(one.index) == 0
    one.follow(PlacedFeed("s9", "1", 10**9 + 5, (Placed("d", "i", "1", "a"),)), 0.0)
    assert one.behind == 0


def test_bits_and_names_that_mean_nothing_here_are_left_out() -> None:
    one = replica("s1", "a")
    piece = SnapshotPiece(
        "x",
        "1",
        instances=("nobody", "a"),
        masks=(b"\xff" * 512, b"\1"),
        runs=struct.pack("<4H", 0, 2, 1, 1),
        hashes=HASHES,
    )
    assert one.taker.take(piece) == 2
    assert holders(one, [1, 2, 3]) == [(2, {"a"})]


def test_a_cursor_that_makes_no_sense_gives_an_end() -> None:
    giver = replica("s1", "a")
    giver.index.insert([1, 2], 0)
    for cursor in (
        SnapshotCursor(BLOCKS, 2**40, 0),
        SnapshotCursor(BLOCKS, 0, 2**40),
        SnapshotCursor(7, 0, 0),
        SnapshotCursor(0, 0, 2**40),
    ):
        following: SnapshotCursor | None = cursor
        for _ in range(5):
            following = giver.giver.piece(following).next
            if following is None:
                break
        assert following is None
