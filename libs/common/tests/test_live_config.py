"""Live configuration: what a watch says, and what an emptied bucket must not do to it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.bus import Change, Entry, Listing, Lost, Position, WatchEvent
from penstock.common.codec import decode_record, encode_record
from penstock.common.live_config import (
    DRAIN,
    KINDS,
    MAX_HISTORY,
    PROFILE,
    USER,
    ConfigRecord,
    Document,
    LiveConfig,
    config_key,
    successor,
)

A, B = "incarnation-a", "incarnation-b"


def record(name: str, value: object, version: int = 1, *, kind: str = USER, deleted: bool = False) -> bytes:
    """As written at a second of its version."""
    stamp = f"2030-01-01T00:00:{version:02d}Z"
    return encode_record(
        ConfigRecord(value, version, "me", stamp, "admin", kind=kind, name=name, deleted=deleted)
    )


def put(sequence: int, name: str, data: bytes, incarnation: str = A, kind: str = USER) -> Change:
    return Change(Position(incarnation, sequence), config_key(kind, name), Entry(data, sequence))


def listing(sequence: int, incarnation: str = A, **documents: bytes) -> Listing:
    entries = {config_key(USER, name): Entry(data, sequence) for name, data in documents.items()}
    return Listing(Position(incarnation, sequence), entries)


def config(*events: WatchEvent, keeps: bool = True) -> LiveConfig:
    held = LiveConfig(keeps=keeps)
    for event in events:
        held.apply(event)
    return held


def values(held: LiveConfig, kind: str = USER) -> dict[str, object]:
    return {name: document.value for name, document in held.documents(kind).items()}


def test_nothing_is_known_before_the_first_listing() -> None:
    held = config()
    assert (held.synced, held.lost, held.version, len(held)) == (False, True, 0, 0)
    assert (held.get(USER, "a"), values(held), held.record(USER, "a")) == (None, {}, (None, 0))


def test_an_empty_listing_is_a_listing() -> None:
    held = config(listing(0))
    assert (held.synced, held.lost, held.version) == (True, False, 0)


def test_documents_are_found_by_kind_and_name_with_who_wrote_them() -> None:
    held = config(listing(3, a=record("a", {"rpm": 5}, 2)))
    assert held.get(USER, "a") == Document({"rpm": 5}, 2, "me", "2030-01-01T00:00:02Z", "admin")
    assert held.get(PROFILE, "a") is None
    assert values(held) == {"a": {"rpm": 5}}


def test_changes_name_what_changed_and_views_follow() -> None:
    held = config(listing(1))
    view = held.documents(USER)
    assert held.apply(put(2, "a", record("a", 1))) == [(USER, "a")]
    assert held.apply(put(3, "b/c", record("b/c", 2))) == [(USER, "b/c")]
    assert {name: document.value for name, document in view.items()} == {"a": 1, "b/c": 2}
    assert held.apply(put(4, "a", record("a", None, 2, deleted=True))) == [(USER, "a")]
    assert list(view) == ["b/c"]
    assert held.apply(Change(Position(A, 5), config_key(USER, "b/c"), None)) == [(USER, "b/c")]
    assert (dict(view), held.version) == ({}, 4)


def test_a_listing_of_the_same_incarnation_drops_what_it_does_not_hold() -> None:
    held = config(listing(2, a=record("a", 1), b=record("b", 1)))
    assert held.apply(listing(5, b=record("b", 1))) == [(USER, "a")]
    assert held.owed() == []


def test_what_was_written_before_the_listing_changes_nothing() -> None:
    held = config(listing(9, a=record("a", "current", 2)))
    assert held.apply(put(4, "a", record("a", "old"))) == []
    assert held.apply(put(12, "a", record("a", "of another bucket", 3), incarnation=B)) == []
    assert values(held) == {"a": "current"}


def test_a_lost_watch_keeps_what_is_known() -> None:
    held = config(listing(1, a=record("a", 1)), Lost("cut"))
    assert (held.lost, held.synced, values(held)) == (True, True, {"a": 1})


@pytest.mark.parametrize("keeps", [True, False])
def test_an_emptied_bucket_does_not_empty_the_configuration(keeps: bool) -> None:
    held = config(listing(7, a=record("a", 1), b=record("b", 1)), keeps=keeps)
    assert held.apply(listing(0, incarnation=B)) == []
    assert values(held) == {"a": 1, "b": 1}
    assert held.apply(put(1, "a", record("a", 1), incarnation=B)) == []
    assert values(held) == {"a": 1, "b": 1}


def test_what_an_emptied_bucket_lost_is_owed_to_it_until_it_is_there() -> None:
    a, gone = record("a", 1), record("gone", None, 2, deleted=True)
    held = config(listing(7, a=a, gone=gone), listing(0, incarnation=B))
    assert sorted(held.owed()) == [(config_key(USER, "a"), a, 0), (config_key(USER, "gone"), gone, 0)]
    held.apply(put(1, "a", a, incarnation=B))
    assert held.owed() == [(config_key(USER, "gone"), gone, 0)]
    held.apply(put(2, "gone", gone, incarnation=B))
    assert (held.owed(), values(held)) == ([], {"a": 1})


def test_of_two_who_write_back_the_later_record_wins() -> None:
    late = record("a", "late", 5)
    held = config(listing(7, a=late), listing(1, incarnation=B, a=record("a", "early", 3)))
    assert values(held) == {"a": "late"}
    assert held.owed() == [(config_key(USER, "a"), late, 1)]
    assert held.record(USER, "a")[1] == 1
    held.apply(put(2, "a", late, incarnation=B))
    assert held.owed() == []


def test_what_was_written_after_the_loss_is_not_overwritten() -> None:
    held = config(listing(7, a=record("a", "old", 5)), listing(0, incarnation=B))
    afterwards = encode_record(
        ConfigRecord("new", 1, "me", "2031-01-01T00:00:00Z", "admin", kind=USER, name="a")
    )
    assert held.apply(put(1, "a", afterwards, incarnation=B)) == [(USER, "a")]
    assert (values(held), held.owed()) == ({"a": "new"}, [])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"{",
        b"[" * 100_000,
        record("another", 1),
        record("a", 1, kind=DRAIN),
        b'{"value": 1, "version": 0, "kind": "user", "name": "a"}',
        b'{"value": 1, "version": 1, "kind": "U.>", "name": "a"}',
        b'{"value": 1, "version": 1, "kind": "user", "name": "' + b"x" * 600 + b'"}',
        b'{"value": NaN, "version": 1, "kind": "user", "name": "a"}',
    ],
)
def test_an_undecodable_record_is_counted_and_the_last_good_one_stays(data: bytes) -> None:
    held = config(listing(1, a=record("a", 1)))
    assert held.apply(put(2, "a", data)) == []
    assert (held.undecodable, values(held)) == (1, {"a": 1})
    assert held.apply(put(3, "a", record("a", 2, 2))) == [(USER, "a")]


def test_an_unknown_kind_is_kept_for_a_later_release() -> None:
    data = record("a", 1, kind="of-tomorrow")
    held = config(listing(0), put(1, "a", data, kind="of-tomorrow"))
    assert "of-tomorrow" not in KINDS
    assert values(held, "of-tomorrow") == {"a": 1}


def test_marks_of_deleted_documents_are_found_by_age() -> None:
    held = config(listing(4, a=record("a", 1), old=record("old", None, 5, deleted=True)))
    assert list(held.marks("2030-01-01T00:00:05Z")) == []
    assert list(held.marks("2030-01-01T00:00:06Z")) == [(config_key(USER, "old"), 4)]
    held.apply(listing(0, incarnation=B))
    assert list(held.marks("2040")) == []


def test_a_record_holds_its_past_as_far_as_it_fits() -> None:
    held: ConfigRecord | None = None
    for version in range(1, 20):
        document = Document({"n": version}, version)
        data = successor(held, document, kind=USER, name="a", deleted=False, limit_bytes=10_000)
        held = decode_record(ConfigRecord, data)
    assert held is not None
    assert [past.value["n"] for past in held.history] == list(range(18, 18 - MAX_HISTORY, -1))
    big = successor(held, Document("x" * 1000, 20), kind=USER, name="a", deleted=False, limit_bytes=1400)
    assert len(big) <= 1400
    assert 0 < len(decode_record(ConfigRecord, big).history) < MAX_HISTORY


def test_a_deleted_document_remembers_what_it_was() -> None:
    first = decode_record(
        ConfigRecord,
        successor(None, Document(1, 1), kind=USER, name="a", deleted=False, limit_bytes=999),
    )
    mark = decode_record(
        ConfigRecord,
        successor(first, Document(None, 2), kind=USER, name="a", deleted=True, limit_bytes=999),
    )
    again = decode_record(
        ConfigRecord,
        successor(mark, Document(3, 3), kind=USER, name="a", deleted=False, limit_bytes=999),
    )
    assert (mark.deleted, [past.value for past in mark.history]) == (True, [1])
    assert (again.deleted, [past.value for past in again.history]) == (False, [1])


EVENTS = st.lists(
    st.tuples(st.integers(1, 30), st.sampled_from("abc"), st.integers(0, 3) | st.none()), max_size=30
)


@given(EVENTS)
def test_repeated_and_stale_changes_after_a_listing_do_no_harm(
    events: list[tuple[int, str, int | None]],
) -> None:
    """Each sequence says one thing; whatever order it comes in again, the latest of each moment counts."""
    held, expected, latest = config(listing(0)), dict[str, int](), 0
    for sequence, name, value in events:
        entry = None if value is None else Entry(record(name, value), sequence)
        held.apply(Change(Position(A, sequence), config_key(USER, name), entry))
        if sequence > latest:
            latest = sequence
            expected.pop(name, None) if value is None else expected.update({name: value})
    assert values(held) == expected


def test_a_document_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Document(1, 1).version = 2  # type: ignore[misc]  # that is what is tried
    assert msgspec.json.decode(encode_record(Document(1, 1)), type=Document) == Document(1, 1)
