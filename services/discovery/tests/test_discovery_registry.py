"""The registry's view and the plan of writes: whatever happened to the bucket, the plan mends it."""

from hypothesis import given
from hypothesis import strategies as st

from penstock.common.bus import Change, Entry, Listing, Lost, Position
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.model import Endpoint, Instance
from penstock.discovery.registry import RegistryView, Write, plan

MARKER = complete_key("s"), b"{}"


def record(name: str, source: str = "s", owner: str = "") -> Instance:
    return Instance(id=name, endpoint=Endpoint(name, 1), source=source, owner=owner)


def entry(name: str, revision: int, source: str = "s") -> tuple[str, Entry]:
    return instance_key(name), Entry(encode_instance(record(name, source)), revision)


def listed(*entries: tuple[str, Entry], incarnation: str = "i", sequence: int = 100) -> Listing:
    return Listing(Position(incarnation, sequence), dict(entries))


def view_of(*entries: tuple[str, Entry]) -> RegistryView:
    view = RegistryView()
    view.apply(listed(*entries))
    return view


def wanted(*names: str) -> dict[str, bytes]:
    return {instance_key(name): encode_instance(record(name)) for name in names}


def test_what_is_missing_is_written_and_what_stands_is_left() -> None:
    writes = plan(view_of(entry("a", 3)), "s", wanted("a", "b"), None)
    assert writes == [Write(instance_key("b"), wanted("b")[instance_key("b")], 0)]


def test_a_record_that_differs_is_written_over_the_revision_it_has() -> None:
    held = instance_key("a"), Entry(encode_instance(record("a", owner="x")), 9)
    assert plan(view_of(held), "s", wanted("a"), None) == [Write(held[0], wanted("a")[held[0]], 9)]


def test_an_unreadable_record_is_overwritten_when_wanted_and_left_alone_when_not() -> None:
    held = instance_key("a"), Entry(b"\xff", 9)
    assert [write.expected for write in plan(view_of(held), "s", wanted("a"), None)] == [9]
    assert plan(view_of(held), "s", {}, None) == []


def test_own_records_that_are_not_wanted_are_deleted_and_those_of_others_stay() -> None:
    writes = plan(view_of(entry("a", 3), entry("b", 4, source="other")), "s", {}, None)
    assert writes == [Write(instance_key("a"), None, 3)]


def test_the_marker_comes_only_when_nothing_else_is_left_to_write() -> None:
    view = view_of(entry("old", 2))
    assert MARKER[0] not in [write.key for write in plan(view, "s", wanted("a"), MARKER)]
    view = view_of(entry("a", 3))
    assert plan(view, "s", wanted("a"), MARKER) == [Write(MARKER[0], MARKER[1], 0)]
    view = view_of(entry("a", 3), (MARKER[0], Entry(MARKER[1], 4)))
    assert plan(view, "s", wanted("a"), MARKER) == []


def test_a_bucket_created_anew_is_written_again_from_revision_zero() -> None:
    view = view_of(entry("a", 30), (MARKER[0], Entry(MARKER[1], 40)))
    view.apply(listed(incarnation="j", sequence=0))
    assert [(write.key, write.expected) for write in plan(view, "s", wanted("a"), MARKER)] == [
        (instance_key("a"), 0)
    ]


def test_the_view_is_live_between_a_listing_and_a_loss() -> None:
    view = RegistryView()
    seen = [view.live]
    for event in (listed(), Lost("gone"), listed()):
        view.apply(event)
        seen.append(view.live)
    assert seen == [False, True, False, True]


def test_what_an_older_incarnation_held_is_known_until_its_source_is_complete() -> None:
    view = view_of(entry("a", 30), entry("b", 31))
    view.apply(listed(incarnation="j", sequence=0))
    assert {instance.id for instance in view.of_source("s")} == {"a", "b"}
    key, held = entry("a", 1)
    view.apply(Change(Position("j", 1), key, held))
    view.apply(Change(Position("j", 2), MARKER[0], Entry(MARKER[1], 2)))
    assert {instance.id for instance in view.of_source("s")} == {"a"}


def test_an_acknowledged_write_counts_before_its_echo_and_the_echo_changes_nothing() -> None:
    view = view_of()
    (write,) = plan(view, "s", wanted("a"), None)
    view.wrote("i", write, 101)
    assert plan(view, "s", wanted("a"), None) == []
    assert write.value is not None
    view.apply(Change(Position("i", 101), write.key, Entry(write.value, 101)))
    assert plan(view, "s", wanted("a"), None) == []


def test_an_acknowledgement_from_before_a_new_incarnation_counts_for_nothing() -> None:
    view = view_of()
    (write,) = plan(view, "s", wanted("a"), None)
    view.apply(listed(incarnation="j", sequence=0))
    view.wrote("i", write, 101)
    assert plan(view, "s", wanted("a"), None) == [write]


def test_an_acknowledged_deletion_counts() -> None:
    view = view_of(entry("a", 3))
    (write,) = plan(view, "s", {}, None)
    view.wrote("i", write, 4)
    assert plan(view, "s", {}, None) == []


@given(
    held=st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["s", "other", "changed"])),
    names=st.sets(st.sampled_from("abcd")),
)
def test_one_plan_carried_out_leaves_nothing_but_the_marker(held: dict[str, str], names: set[str]) -> None:
    entries = [
        (instance_key(name), Entry(encode_instance(record(name, "s", owner="x")), revision))
        if source == "changed"
        else entry(name, revision, source)
        for revision, (name, source) in enumerate(held.items(), 1)
    ]
    view = view_of(*entries)
    for revision, write in enumerate(plan(view, "s", wanted(*names), None), 101):
        view.wrote("i", write, revision)
    assert plan(view, "s", wanted(*names), MARKER) == [Write(MARKER[0], MARKER[1], 0)]
    assert {instance.id for instance in view.of_source("s")} == names
