"""The prefix index against a model that remembers everything, and at its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.scheduler import prefix_index
from penstock.scheduler.draws import seed_of
from penstock.scheduler.prefix_index import PrefixIndex

SLOTS = 4
EVERY = (1 << SLOTS) - 1

Step = tuple[str, int, int]


def chain(*parts: str) -> list[int]:
    """Block hashes as the ingress makes them: each stands for all parts up to it."""
    return [seed_of(repr(parts[: end + 1])) for end in range(len(parts))]


def matched(index: PrefixIndex, hashes: list[int], candidates: int = EVERY) -> list[int]:
    """Length per slot, from the steps, which must thin out."""
    lengths, held_before, blocks_before = [0] * SLOTS, candidates, 0
    for blocks, held in index.match(hashes, candidates):
        assert blocks > blocks_before
        assert held
        assert held & ~held_before == 0
        for slot in range(SLOTS):
            if held >> slot & 1:
                lengths[slot] = blocks
        held_before, blocks_before = held, blocks
    return lengths


prompts = st.lists(st.sampled_from("abc"), min_size=1, max_size=9).map(tuple)
actions = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), prompts, st.integers(0, SLOTS - 1)),
        st.tuples(st.just("forget"), prompts, st.integers(0, SLOTS - 1)),
    ),
    max_size=30,
)


def apply(index: PrefixIndex, action: tuple[str, tuple[str, ...], int]) -> None:
    kind, prompt, slot = action
    hashes = chain(*prompt)
    if kind == "forget":
        index.forget(1 << slot)
    else:
        index.insert(hashes, slot, matched(index, hashes)[slot])


@given(actions, prompts, st.integers(0, EVERY))
def test_with_room_for_all_every_match_is_the_longest(
    done: list[tuple[str, tuple[str, ...], int]], prompt: tuple[str, ...], candidates: int
) -> None:
    index, held = PrefixIndex(10_000), [set[int]() for _ in range(SLOTS)]
    for action in done:
        apply(index, action)
        if action[0] == "forget":
            held[action[2]].clear()
        else:
            held[action[2]].update(chain(*action[1]))
    hashes = chain(*prompt)
    for slot, length in enumerate(matched(index, hashes, candidates)):
        expected = 0
        while candidates >> slot & 1 and expected < len(hashes) and hashes[expected] in held[slot]:
            expected += 1
        assert length == expected


@given(actions, prompts, st.integers(4, 40))
def test_at_the_bound_matches_shrink_but_stay_true(
    done: list[tuple[str, tuple[str, ...], int]], prompt: tuple[str, ...], bound: int
) -> None:
    index, held = PrefixIndex(bound), [set[int]() for _ in range(SLOTS)]
    for action in done:
        apply(index, action)
        assert len(index) <= bound
        if action[0] == "forget":
            held[action[2]].clear()
        else:
            held[action[2]].update(chain(*action[1]))
            # What was placed last is always known, as far as a generation holds it.
            own = matched(index, chain(*action[1]))[action[2]]
            assert own == min(len(action[1]), bound // 2)
    hashes = chain(*prompt)
    for slot, length in enumerate(matched(index, hashes)):
        assert all(block in held[slot] for block in hashes[:length])


@settings(max_examples=50)
@given(actions, prompts, st.integers(4, 40), st.data())
def test_tails_whose_heads_were_never_seen_make_no_match_longer_than_it_is(
    done: list[tuple[str, tuple[str, ...], int]], prompt: tuple[str, ...], bound: int, data: st.DataObject
) -> None:
    index, held = PrefixIndex(bound), [set[int]() for _ in range(SLOTS)]
    for kind, whole, slot in done:
        hashes = chain(*whole)
        if kind == "forget":
            index.insert(hashes[data.draw(st.integers(0, len(hashes))) :], slot)
        else:
            apply(index, (kind, whole, slot))
        held[slot].update(hashes)
    for slot, length in enumerate(matched(index, chain(*prompt))):
        assert all(block in held[slot] for block in chain(*prompt)[:length])


def test_insert_says_how_much_was_in_place_already() -> None:
    index = PrefixIndex(1000)
    assert index.insert(chain("a", "b"), 0) == 0
    assert index.insert(chain("a", "b", "c", "d"), 0, matched=2) == 2
    assert index.insert(chain("a", "b", "c", "d"), 0, matched=4) == 4
    assert index.insert(chain("a", "b"), 1, matched=0) == 0
    assert matched(index, chain("a", "b", "c", "d")) == [4, 2, 0, 0]


def test_used_blocks_survive_turnovers_and_unused_ones_do_not() -> None:
    index = PrefixIndex(20)
    used, unused = chain("u", "1"), chain("v", "1")
    index.insert(used, 0)
    index.insert(unused, 1)
    for number in range(40):
        assert matched(index, used) == [2, 0, 0, 0]
        index.insert(used, 0, 2)
        index.insert(chain(f"filler {number}"), 2)
    assert index.turnovers > 2
    assert matched(index, unused) == [0, 0, 0, 0]


def test_a_prompt_whose_insertion_turns_over_is_copied_whole() -> None:
    index = PrefixIndex(20)
    index.insert(chain("a", "b", "c", "d"), 0)
    index.insert(chain(*"vwxyz"), 1)
    grown = chain("a", "b", "c", "d", "e", "f")
    assert index.insert(grown, 0, matched=4) == 0
    index.insert(chain(*"12345"), 1)
    assert index.turnovers == 2
    assert matched(index, grown) == [6, 0, 0, 0]


def test_a_sibling_that_applies_only_the_tails_follows_turnovers() -> None:
    first, sibling = PrefixIndex(40), PrefixIndex(40)
    session: tuple[str, ...] = ("system",)
    for turn in range(60):
        session = session if len(session) == 8 else (*session, f"turn {turn}")
        for prompt, slot in ((chain(*session), 0), (chain(f"other {turn}", "x"), 1)):
            known = first.insert(prompt, slot, matched(first, prompt)[slot])
            sibling.insert(prompt[known:], slot)
        assert matched(sibling, chain(*session)) == matched(first, chain(*session))


def test_a_forgotten_slot_may_be_given_to_another_instance() -> None:
    index = PrefixIndex(8)
    index.insert(chain("a", "b"), 0)
    index.insert(chain("a", "b"), 1)
    index.insert(chain("c", "d", "e"), 0)
    index.forget(0b01)
    assert matched(index, chain("a", "b")) == [0, 2, 0, 0]
    assert matched(index, chain("c", "d", "e")) == [0, 0, 0, 0]
    index.insert(chain("a"), 0)
    assert matched(index, chain("a", "b")) == [1, 2, 0, 0]


def test_sets_that_became_equal_when_a_slot_was_forgotten_are_both_forgotten_later() -> None:
    index = PrefixIndex(100)
    index.insert(chain("x"), 1)
    for slot in (0, 1):
        index.insert(chain("a"), slot)
    index.forget(0b01)
    index.forget(0b10)
    assert matched(index, chain("x")) == matched(index, chain("a")) == [0, 0, 0, 0]


def test_a_generation_ends_at_its_bound_on_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_index, "MAX_MASKS", 3)
    index = PrefixIndex(1000)
    for slot in range(8):
        index.insert(chain("a", "b"), slot)
    assert index.turnovers == 2
    assert index.match(chain("a", "b"), 0xFF) == [(2, 0xFF)]


def test_without_blocks_or_candidates_nothing_matches() -> None:
    index = PrefixIndex(10)
    index.insert([], 0)
    index.insert(chain("a"), 0)
    assert index.match([], EVERY) == []
    assert index.match(chain("a"), 0) == []
    assert index.match(chain("a"), 0b10) == []


def test_an_index_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="room"):
        PrefixIndex(1)


@given(
    st.lists(st.tuples(st.sampled_from(["insert", "insert", "remove"]), prompts, st.integers(0, SLOTS - 1))),
    prompts,
    st.sampled_from([10_000, 24]),
)
def test_removed_blocks_match_no_longer_and_others_stay(
    done: list[tuple[str, tuple[str, ...], int]], prompt: tuple[str, ...], bound: int
) -> None:
    index, held = PrefixIndex(bound), [set[tuple[str, ...]]() for _ in range(SLOTS)]
    for kind, whole, slot in done:
        if kind == "insert":
            index.insert(chain(*whole), slot, matched(index, chain(*whole))[slot])
            held[slot].update(whole[: end + 1] for end in range(len(whole)))
        else:
            # A block goes with all that follows it, the last first.
            gone = sorted((one for one in held[slot] if one[: len(whole)] == whole), key=len, reverse=True)
            index.remove([chain(*one)[-1] for one in gone], slot)
            held[slot].difference_update(gone)
    for slot, length in enumerate(matched(index, chain(*prompt))):
        expected = next((n for n in range(len(prompt)) if prompt[: n + 1] not in held[slot]), len(prompt))
        assert length <= expected
        if bound == 10_000:
            assert length == expected


def test_removing_what_nobody_holds_changes_nothing() -> None:
    index = PrefixIndex(1000)
    index.insert(chain("a", "b"), 0)
    index.insert(chain("a"), 1)
    index.remove(chain("x", "y")[::-1], 0)
    index.remove(chain("a", "b")[::-1], 2)
    assert matched(index, chain("a", "b")) == [2, 1, 0, 0]
    index.remove(chain("a", "b")[::-1], 0)
    assert matched(index, chain("a", "b")) == [0, 1, 0, 0]


def test_blocks_that_were_not_used_for_the_maximum_age_are_gone() -> None:
    index = PrefixIndex(1000)
    old, used = chain("o"), chain("u")
    for now in range(0, 101, 10):
        if now == 0:
            index.insert(old, 0)
        index.insert(used, 1, matched(index, used)[1])
        index.expire(float(now), max_age_s=60.0)
        if now < 30:
            assert matched(index, old) == [1, 0, 0, 0]
    assert matched(index, old) == [0, 0, 0, 0]
    assert matched(index, used) == [0, 1, 0, 0]
