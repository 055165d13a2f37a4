"""An audit's view of writers: numbers without a gap, in any order, each message what the next one names."""

from __future__ import annotations

import itertools
import random

import pytest

from penstock.cli.audit import chains as bounds
from penstock.cli.audit.chains import Chains, Fault, Part
from penstock.common.event_batches import chain

NAME = "scheduler/s1", "run1"


def written(
    *sizes: int, name: tuple[str, str] = NAME, first: int = 1, previous: str = "", at: float = 1.0
) -> list[Part]:
    """Messages of a writer with so many events each."""
    parts = []
    for number, size in enumerate(sizes):
        part = Part(*name, first, first + size - 1, previous, b"payload %d" % number, float(number), at)
        parts.append(part)
        previous, first = chain(previous, part.payload), first + size
    return parts


def seen(*parts: Part, whole: bool = True) -> list[tuple[str, int, int]]:
    """(kind, first, last) of what is wrong."""
    return [(fault.kind, fault.first, fault.last) for fault in faults(*parts, whole=whole)]


def faults(*parts: Part, whole: bool = True) -> list[Fault]:
    chains = Chains()
    found = [fault for part in parts if (fault := chains.see(part)) is not None]
    return found + list(chains.faults(whole=whole))


def test_messages_in_order_are_whole_and_their_end_is_known() -> None:
    chains = Chains()
    parts = written(3, 1, 64)
    assert [chains.see(part) for part in parts] == [None] * 3
    assert list(chains.faults(whole=True)) == []
    assert chains.writers[NAME].ends == {68: chain(parts[2].previous, parts[2].payload)}


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_any_order_is_whole(order: tuple[int, ...]) -> None:
    parts = written(3, 1, 64, 2)
    assert seen(*(parts[place] for place in order)) == []


@pytest.mark.parametrize(("missing", "range_"), [(0, (1, 3)), (1, (4, 4)), (2, (5, 68))])
def test_a_message_that_is_missing_is_named_by_its_numbers(missing: int, range_: tuple[int, int]) -> None:
    parts = written(3, 1, 64, 2)
    del parts[missing]
    assert seen(*parts) == [("sequence", *range_)]


def test_what_came_before_the_range_that_is_read_is_not_missing() -> None:
    parts = written(3, 1, 64, 2)
    assert seen(*parts[1:], whole=False) == []
    assert seen(parts[2], parts[1], parts[3], whole=False) == []
    assert seen(parts[1], parts[3], whole=False) == [("sequence", 5, 68)]


@pytest.mark.parametrize("place", range(3))
def test_a_changed_payload_breaks_the_chain(place: int) -> None:
    parts = written(3, 1, 64, 2)
    old = parts[place]
    parts[place] = Part(*NAME, old.first, old.last, old.previous, b"another", old.time, old.written)
    assert seen(*parts) == [("chain", parts[place + 1].first, parts[place + 1].last)]


def test_a_changed_hash_breaks_the_chain_on_both_sides() -> None:
    parts = written(3, 1, 64)
    old = parts[1]
    parts[1] = Part(*NAME, old.first, old.last, "0" * 64, old.payload, old.time, old.written)
    assert [kind for kind, *_ in seen(*parts)] == ["chain", "chain"]


def test_a_message_that_is_there_again_is_counted_and_compared() -> None:
    chains = Chains()
    first, second = written(3, 1)
    for part in (first, second, first):
        assert chains.see(part) is None
    assert chains.repeated == 1
    forged = chains.see(Part(*NAME, 1, 3, "", b"forged", 1.0, 1.0))
    assert forged is not None
    assert forged.kind == "altered"
    assert list(chains.faults(whole=True)) == []


def test_the_log_says_why_itself() -> None:
    chains = Chains()
    parts = written(3, 5, 1)
    chains.see(parts[0])
    chains.see(parts[2])
    chains.told(NAME, 4, 8, "the buffer was full")
    (fault,) = chains.faults(whole=True)
    assert (fault.first, fault.last, fault.count, fault.cause) == (4, 8, 5, "the buffer was full")


def test_what_a_spool_held_and_the_stream_does_not_is_missing() -> None:
    chains = Chains()
    chains.see(written(3)[0])
    chains.over(NAME, "it was killed", 10, told=True)
    (fault,) = chains.faults(whole=True)
    assert (fault.first, fault.last, fault.cause) == (4, 10, "not in the stream; it was killed")


def test_a_writer_is_gone_once_somebody_says_so_or_it_was_started_again() -> None:
    chains = Chains()
    chains.see(written(1)[0])
    assert chains.gone(NAME) == ""
    chains.see(written(1, name=("scheduler/s1", "run2"), at=2.0)[0])
    # What it had on disk is put into the log by others, and late.
    chains.see(written(1, name=("scheduler/s1", "run0"), at=0.5)[0])
    assert chains.gone(("scheduler/s1", "run0")) == "the process was started again"
    assert chains.gone(NAME) == "the process was started again"
    assert chains.gone(("scheduler/s1", "run2")) == ""
    assert chains.gone(("scheduler/other", "run1")) == ""
    chains.over(("scheduler/s1", "run2"), "by itself", told=True)
    assert chains.gone(("scheduler/s1", "run2")) == "by itself"


def test_the_end_of_a_writer_that_nobody_told_is_not_known() -> None:
    chains = Chains()
    for run, at in (("run1", 1.0), ("run2", 2.0), ("run3", 3.0)):
        chains.see(written(3, name=("scheduler/s1", run), at=at)[0])
    chains.over(("scheduler/s1", "run2"), "by itself", told=True)
    (fault,) = chains.faults(whole=True)
    assert (fault.kind, fault.incarnation, fault.first, fault.count) == ("tail", "run1", 4, 0)
    assert fault.cause.endswith("; the process was started again")
    assert chains.unsent("scheduler") == ["scheduler/s1 run run1"]
    assert chains.unsent("ingress") == []


def test_memory_is_bounded_and_what_is_forgotten_is_still_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, bound in (("MAX_WRITERS", 3), ("MAX_HASHES", 5), ("MAX_RANGES", 4)):
        monkeypatch.setattr(bounds, name, bound)
    chains = Chains()
    for writer in range(10):
        one, _, three = written(1, 1, 1, name=(f"scheduler/{writer}", "run"))
        chains.see(one)
        chains.see(three)
    assert len(chains.writers) == 3
    # Of a writer that was forgotten nothing more is known than when it was.
    assert sum(fault.count for fault in chains.faults(whole=True)) == 10
    holes = written(*[1] * 40, name=("scheduler/holes", "run"))
    for part in holes[::2]:
        chains.see(part)
    missing = chains.writers["scheduler/holes", "run"].missing
    assert len(missing) <= 4
    assert {number for low, high in missing for number in range(low, high + 1)} >= set(range(2, 39, 2))


def test_random_orders_and_repetitions_of_what_is_there_name_exactly_what_is_not() -> None:
    rng = random.Random(7)
    for _ in range(200):
        parts = written(*(rng.randint(1, 5) for _ in range(12)))
        there = [part for part in parts if rng.random() < 0.7]
        told = [*there, *rng.sample(there, len(there) // 3)]
        rng.shuffle(told)
        named = {number for _, low, high in seen(*told) for number in range(low, high + 1)}
        last = max((part.last for part in there), default=0)
        held = {number for part in there for number in range(part.first, part.last + 1)}
        assert named == set(range(1, last + 1)) - held
