"""A generation of the prefix index says what a plain dict of sets would, in the order in which blocks came.

As Python it is one; `make compiled` holds the table of machine code to it, too."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler.chain import chain_of, unpack
from penstock.scheduler.generations import first_generation

# Some of which share their lower bits, as hashes that someone made up may.
BLOCKS = [number << 40 for number in range(40)] + [number + 1 for number in range(40)]
BLOCKS += [(1 << 64) - 1 - number for number in range(9)] + [1 << 63, (1 << 63) - 1]
spans = st.tuples(st.integers(0, len(BLOCKS) - 1), st.integers(0, 70), st.integers(0, (1 << 70) - 1))


@settings(deadline=None)
@given(st.lists(spans, max_size=20), st.lists(spans, max_size=20), st.integers(0, (1 << 70) - 1))
def test_it_holds_what_a_dict_holds(
    before: list[tuple[int, int, int]], since: list[tuple[int, int, int]], gone: int
) -> None:
    older = first_generation()
    newer = older.next_one()
    models: list[dict[int, int]] = [{}, {}]
    for model, generation, done in ((models[0], older, before), (models[1], newer, since)):
        for start, length, slots in done:
            blocks = BLOCKS[start : start + length]
            generation.put(generation.chain(blocks), 0, len(blocks), slots)
            model |= dict.fromkeys(blocks, slots)
        generation.forget(gone)
        for block in model:
            model[block] &= ~gone
        assert len(generation) == len(model)
        assert generation.page(0, 1000) == ([*model], [*model.values()])
        assert generation.page(3, 2) == ([*model][3:5], [*model.values()][3:5])
    both = models[0] | models[1]
    every = newer.chain(BLOCKS)
    for position, block in enumerate(BLOCKS):
        assert newer.own_slots_at(every, position) == models[1].get(block, -1)
        assert newer.slots_at(every, position, older) == both.get(block, 0)
    for slots in {*both.values(), 1 << 71}:
        assert newer.has_set(slots) == (slots in {one & ~gone for _, length, one in since})


def test_it_grows_and_forgets_nothing() -> None:
    rng, generation, model = random.Random(1), first_generation(), dict[int, int]()
    for number in range(300):
        blocks = [rng.getrandbits(60) for _ in range(rng.randrange(64))]
        generation.put(generation.chain(blocks), 0, len(blocks), 1 << number % 7)
        model |= dict.fromkeys(blocks, 1 << number % 7)
    assert len(model) > 5000
    assert generation.page(0, len(model)) == ([*model], [*model.values()])
    assert generation.sets() == 7
    known = generation.chain([*model])
    assert all(generation.own_slots_at(known, at) == held for at, held in enumerate(model.values()))
    empty = generation.next_one()
    assert len(empty) == empty.sets() == 0
    assert empty.slots_at(known, 0, generation) == model[known[0]]


@given(st.binary(max_size=400))
def test_a_chain_is_what_was_packed(packed: bytes) -> None:
    packed = packed[: len(packed) // 8 * 8]
    chain, blocks = chain_of(packed), unpack(packed)
    assert [*chain] == blocks
    assert len(chain) == len(blocks)
    assert [chain[position] for position in range(len(chain))] == blocks
