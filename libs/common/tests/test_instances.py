"""The instance table: what a watch says, and what an emptied registry must not do to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.bus import Change, Entry, Listing, Lost, Position, WatchEvent
from penstock.common.codec import encode_record
from penstock.common.instances import InstanceTable, complete_key, encode_instance, instance_key
from penstock.common.messages import CompleteMarker
from penstock.common.model import Endpoint, Instance, InstanceState

A, B = "incarnation-a", "incarnation-b"


def instance(
    name: str,
    *,
    source: str = "static",
    models: Sequence[str] = ("m",),
    lora: Sequence[str] = (),
    port: int = 80,
) -> Instance:
    return Instance(
        id=name, endpoint=Endpoint("h", port), models=tuple(models), lora_adapters=tuple(lora), source=source
    )


def put(sequence: int, record: Instance, incarnation: str = A) -> Change:
    entry = Entry(encode_instance(record), sequence)
    return Change(Position(incarnation, sequence), instance_key(record.id), entry)


def gone(sequence: int, name: str, incarnation: str = A) -> Change:
    return Change(Position(incarnation, sequence), instance_key(name), None)


def marker(source: str = "static", sources: Sequence[str] = ("static",)) -> bytes:
    return encode_record(CompleteMarker(source, tuple(sources)))


def complete(
    sequence: int, source: str = "static", sources: Sequence[str] = ("static",), incarnation: str = A
) -> Change:
    return Change(
        Position(incarnation, sequence), complete_key(source), Entry(marker(source, sources), sequence)
    )


def listing(
    sequence: int, records: Iterable[Instance] = (), markers: Iterable[str] = (), incarnation: str = A
) -> Listing:
    """Records and markers, each as if written at the listing's own sequence."""
    entries = {instance_key(record.id): Entry(encode_instance(record), sequence) for record in records}
    sources = tuple(markers)
    entries |= {complete_key(source): Entry(marker(source, sources), sequence) for source in sources}
    return Listing(Position(incarnation, sequence), entries)


def table(*events: WatchEvent) -> InstanceTable:
    held = InstanceTable()
    for event in events:
        held.apply(event)
    return held


def names(held: InstanceTable) -> set[str]:
    return {record.id for record in held.instances()}


def test_a_table_knows_nothing_and_is_lost_before_the_first_listing() -> None:
    held = table()
    assert (len(held), held.synced, held.lost, held.version) == (0, False, True, 0)
    assert (held.get("a"), held.serving("m"), list(held.models())) == (None, (), [])


def test_instances_are_found_by_id_by_model_and_by_lora_adapter() -> None:
    b, a = instance("b", models=("m", "n")), instance("a", lora=("l",))
    held = table(listing(5, [b, a]))
    assert held.get("a") == a
    assert held.serving("m") == (a, b)
    assert held.serving("n") == (b,)
    assert held.serving("l") == (a,)
    assert held.serving("unknown") == ()
    assert set(held.models()) == {"m", "n", "l"}
    assert len(held) == 2


def test_changes_follow_the_listing() -> None:
    held = table(listing(5, [instance("a"), instance("b")]))
    assert held.apply(put(6, instance("c")))
    assert held.apply(put(7, instance("a", models=("other",))))
    assert held.apply(gone(8, "b"))
    assert names(held) == {"a", "c"}
    assert [record.id for record in held.serving("m")] == ["c"]
    assert [record.id for record in held.serving("other")] == ["a"]


def test_an_instance_that_was_written_again_unchanged_can_still_be_deleted() -> None:
    held = table(listing(5, [instance("a")]), put(6, instance("a")), gone(7, "a"))
    assert (len(held), held.get("a"), held.serving("m")) == (0, None, ())


def test_a_model_that_nobody_serves_any_more_is_forgotten() -> None:
    held = table(listing(5, [instance("a", models=("m",), lora=("l",))]), gone(6, "a"))
    assert (list(held.models()), held.serving("m"), held.serving("l")) == ([], (), ())


def test_only_what_changes_the_instances_counts_as_a_change() -> None:
    held = table(listing(5, [instance("a")]))
    version = held.version
    for event in (
        listing(9, [instance("a")]),
        put(10, instance("a")),
        gone(11, "unknown"),
        complete(12),
        Lost("x"),
    ):
        assert not held.apply(event)
    assert held.version == version
    assert held.apply(put(13, instance("a", port=81)))
    assert held.version == version + 1


def test_whatever_is_older_than_the_table_changes_nothing() -> None:
    held = table(listing(5, [instance("a")]), put(6, instance("b")), gone(7, "a"))
    for stale in (put(5, instance("a")), put(7, instance("a")), gone(6, "b"), put(3, instance("c"))):
        assert not held.apply(stale)
    assert names(held) == {"b"}


def test_changes_of_another_incarnation_wait_for_its_listing() -> None:
    held = table(listing(5, [instance("a")]))
    assert not held.apply(put(99, instance("b"), B))
    assert not held.apply(gone(99, "a", B))
    assert names(held) == {"a"}


def test_losing_the_watch_changes_nothing_but_the_mark() -> None:
    held = table(listing(5, [instance("a")], ["static"]), Lost("gone"))
    assert (names(held), held.synced, held.lost) == ({"a"}, True, True)
    held.apply(listing(5, [instance("a")], ["static"]))
    assert not held.lost


def test_a_listing_of_the_same_incarnation_is_the_truth() -> None:
    held = table(
        listing(5, [instance("a"), instance("b")]), Lost("x"), listing(9, [instance("b"), instance("c")])
    )
    assert names(held) == {"b", "c"}


def test_a_store_that_was_set_back_is_believed() -> None:
    held = table(listing(5, [instance("a", port=5)]), put(9, instance("a", port=9)), Lost("x"))
    held.apply(listing(5, [instance("a", port=5)]))
    assert held.get("a") == instance("a", port=5)
    held.apply(put(6, instance("a", port=6)))
    assert held.get("a") == instance("a", port=6)


def test_an_empty_registry_never_empties_the_table() -> None:
    held = table(
        listing(500, [instance("a"), instance("b")], ["static"]), Lost("x"), listing(0, incarnation=B)
    )
    assert names(held) == {"a", "b"}
    assert (held.synced, held.lost) == (True, False)


def test_records_of_an_older_incarnation_stay_until_their_source_is_complete() -> None:
    held = table(
        listing(500, [instance("a"), instance("b", port=1)], ["static"]),
        listing(0, incarnation=B),
        put(1, instance("b", port=2), B),
        put(2, instance("c"), B),
    )
    assert names(held) == {"a", "b", "c"}
    assert held.get("b") == instance("b", port=2)
    assert held.apply(complete(3, incarnation=B))
    assert names(held) == {"b", "c"}


def test_a_listing_that_is_repeated_before_the_marker_keeps_them_too() -> None:
    held = table(
        listing(500, [instance("a"), instance("b")], ["static"]),
        listing(0, incarnation=B),
        Lost("x"),
        listing(1, [instance("b", port=2)], incarnation=B),
        Lost("x"),
        listing(1, [instance("b", port=2)], incarnation=B),
    )
    assert names(held) == {"a", "b"}
    held.apply(complete(2, incarnation=B))
    assert names(held) == {"b"}


def test_a_third_incarnation_keeps_what_the_second_had_not_replaced() -> None:
    held = table(
        listing(500, [instance("a"), instance("b")], ["static"]),
        listing(1, [instance("b")], incarnation=B),
        listing(0, incarnation="incarnation-c"),
    )
    assert names(held) == {"a", "b"}
    held.apply(listing(2, [instance("c")], ["static"], incarnation="incarnation-c"))
    assert names(held) == {"c"}


def test_what_the_next_incarnation_deletes_is_gone_without_a_marker() -> None:
    held = table(listing(500, [instance("a"), instance("b")]), listing(0, incarnation=B), gone(1, "a", B))
    assert names(held) == {"b"}


def test_a_source_that_is_complete_does_not_speak_for_another() -> None:
    both = ("redis", "static")
    held = table(
        listing(500, [instance("s"), instance("r", source="redis")], both),
        listing(0, incarnation=B),
        complete(1, "static", both, B),
    )
    assert names(held) == {"r"}
    held.apply(complete(2, "redis", both, B))
    assert names(held) == set()


def test_records_of_a_source_that_is_run_no_more_go_with_the_first_marker() -> None:
    held = table(
        listing(500, [instance("s"), instance("r", source="redis")], ("redis", "static")),
        listing(0, incarnation=B),
        put(1, instance("s"), B),
        complete(2, "static", ("static",), B),
    )
    assert names(held) == {"s"}


@pytest.mark.parametrize(
    ("markers", "synced"),
    [
        ([], False),
        ([("static", ("static",))], True),
        ([("static", ("static", "redis"))], False),
        ([("static", ("static", "redis")), ("redis", ("static", "redis"))], True),
    ],
)
def test_a_table_is_synced_once_every_source_is_complete(
    markers: list[tuple[str, tuple[str, ...]]], synced: bool
) -> None:
    held = table(listing(5, [instance("a")]))
    for number, (source, sources) in enumerate(markers):
        held.apply(complete(6 + number, source, sources))
    assert held.synced is synced


def test_a_source_is_complete_in_its_own_incarnation_only() -> None:
    held = table(listing(500, [instance("a")], ["static"]), listing(1, [instance("b")], incarnation=B))
    held.apply(put(2, instance("c"), B))
    assert names(held) == {"a", "b", "c"}


BROKEN = {
    "no JSON": b"\xff\x00",
    "another type": b"[]",
    "a field out of bounds": b'{"id": "a", "endpoint": {"host": "h", "port": 0}}',
    "deep nesting": b'{"x":' + b"[" * 100_000,
    "the id of another key": encode_instance(instance("b")),
    "empty": b"",
}


@pytest.mark.parametrize("value", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_record_is_counted_and_costs_only_itself(value: bytes) -> None:
    held = table(listing(5, [instance("a")]))
    assert not held.apply(Change(Position(A, 6), instance_key("a"), Entry(value, 6)))
    assert (names(held), held.undecodable) == ({"a"}, 1)
    broken = Listing(Position(A, 7), {instance_key("a"): Entry(value, 6), instance_key("z"): Entry(value, 7)})
    held.apply(broken)
    assert (names(held), held.undecodable) == ({"a"}, 3)
    held.apply(put(8, instance("a", port=81)))
    assert held.get("a") == instance("a", port=81)


def test_a_broken_marker_completes_nothing() -> None:
    held = table(listing(5, [instance("a")]))
    held.apply(Change(Position(A, 6), complete_key("static"), Entry(b"{}", 6)))
    held.apply(Change(Position(A, 7), complete_key("other"), Entry(marker("static"), 7)))
    assert (held.synced, held.undecodable) == (False, 2)


def test_keys_of_other_kinds_are_ignored() -> None:
    held = table(Listing(Position(A, 5), {"lease.static": Entry(b"\xff", 5)}))
    held.apply(Change(Position(A, 6), "lease.static", None))
    assert (len(held), held.undecodable) == (0, 0)


def test_states_that_take_work_are_told_from_those_that_do_not() -> None:
    states = {s for s in InstanceState if Instance(id="a", endpoint=Endpoint("h", 1), state=s).takes_work}
    assert states == {InstanceState.READY, InstanceState.STALE}


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Change], list[Change]]:
    """Changes as a bucket makes them, and the same with earlier ones repeated anywhere in between."""
    history: list[Change] = []
    for sequence in range(11, 11 + draw(st.integers(1, 12))):
        name = draw(st.sampled_from("abc"))
        kind = draw(st.sampled_from(["put", "put", "delete", "marker"]))
        history.append(
            put(sequence, instance(name, port=draw(st.integers(1, 2))))
            if kind == "put"
            else gone(sequence, name)
            if kind == "delete"
            else complete(sequence)
        )
    disturbed: list[Change] = []
    for index, change in enumerate(history):
        disturbed.append(change)
        disturbed += draw(st.lists(st.sampled_from(history[: index + 1]), max_size=3))
    return history, disturbed


@given(histories(), st.booleans())
def test_stale_and_repeated_changes_make_no_difference(
    history: tuple[list[Change], list[Change]], inherited: bool
) -> None:
    """Before the first change the table holds a listing, or what an older incarnation left of one."""
    first: list[WatchEvent] = [listing(10, [instance("a"), instance("b")])]
    if inherited:
        before = Listing(Position("older", 900), listing(900, [instance("a"), instance("z")]).entries)
        first = [before, listing(10)]
    plain, disturbed = (table(*first, *changes) for changes in history)
    assert list(map(plain.get, "abcz")) == list(map(disturbed.get, "abcz"))
    assert (plain.serving("m"), plain.synced) == (disturbed.serving("m"), disturbed.synced)
    assert plain.version == disturbed.version


@given(histories())
def test_listing_again_equals_having_followed(history: tuple[list[Change], list[Change]]) -> None:
    followed = table(listing(10, [instance("a"), instance("b")]), *history[0])
    entries = dict(listing(10, [instance("a"), instance("b")]).entries)
    for change in history[0]:
        if change.entry is None:
            entries.pop(change.key, None)
        else:
            entries[change.key] = change.entry
    listed = table(Listing(history[0][-1].position, entries))
    assert listed.serving("m") == followed.serving("m")
    followed.apply(Listing(history[0][-1].position, entries))
    assert listed.serving("m") == followed.serving("m")
