"""What the registrations bucket lists, by the events of its watch and the time that goes by."""

from __future__ import annotations

from penstock.common.bus import Change, Entry, Listing, Lost, Position
from penstock.common.model import Endpoint, Instance
from penstock.common.records import Record, RecordError
from penstock.discovery.registrations import MAX_REGISTRATIONS, Registrations

TTL_S = 60.0
WALL_S = 1_000_000.0


def parse(key: str, value: bytes) -> Record:
    """`name port timestamp_s` in plain text."""
    try:
        name, port, stamp_s = value.decode().split()
        instance = Instance(id=name, endpoint=Endpoint("10.0.0.1", int(port)))
        return Record(instances=(instance,), timestamp_ms=int(float(stamp_s) * 1000))
    except ValueError:
        raise RecordError("not a record") from None


def value(name: str, port: int = 8000, stamp_s: float = WALL_S) -> bytes:
    return f"{name} {port} {stamp_s}".encode()


def listing(incarnation: str = "one", sequence: int = 10, **entries: Entry) -> Listing:
    return Listing(Position(incarnation, sequence), entries)


def change(key: str, entry: Entry | None, sequence: int = 20) -> Change:
    return Change(Position("one", sequence), key, entry)


def table(*events: Listing, now_s: float = 0.0) -> Registrations:
    made = Registrations(parse, TTL_S)
    for event in events:
        made.apply(event, now_s, WALL_S)
    return made


def listed(of: Registrations) -> dict[str, int]:
    return {instance.id: instance.endpoint.port for instance in of.state()[0]}


def test_a_registration_stays_for_its_time_from_its_last_write() -> None:
    held = table(listing(a=Entry(value("a"), 1)))
    held.apply(change("a", Entry(value("a", 8001), 21), 21), 50.0, WALL_S)
    held.expire(100.0)
    assert listed(held) == {"a": 8001}
    assert held.next_expiry_s() == 110.0
    held.expire(110.0)
    assert listed(held) == {}
    assert held.next_expiry_s() is None


def test_a_deleted_registration_is_gone_at_once() -> None:
    held = table(listing(a=Entry(value("a"), 1), b=Entry(value("b"), 2)))
    held.apply(change("a", None), 1.0, WALL_S)
    assert listed(held) == {"b": 8000}


def test_time_stands_still_while_the_watch_is_lost() -> None:
    held = table(listing(a=Entry(value("a"), 1)))
    held.apply(Lost("gone"), 50.0, WALL_S)
    held.apply(Lost("gone again"), 70.0, WALL_S)
    assert (held.stale, held.next_expiry_s()) == ("gone", None)
    held.expire(500.0)
    assert listed(held) == {"a": 8000}
    held.apply(listing(a=Entry(value("a"), 1)), 500.0, WALL_S)
    assert (held.stale, held.next_expiry_s()) == ("", 510.0)


def test_what_a_bucket_created_anew_lacks_stays_for_one_time() -> None:
    held = table(listing(a=Entry(value("a"), 1), b=Entry(value("b"), 2)))
    held.apply(listing("two", 1, b=Entry(value("b", 9000), 1)), 50.0, WALL_S)
    assert listed(held) == {"a": 8000, "b": 9000}
    held.expire(109.0)
    assert listed(held) == {"a": 8000, "b": 9000}
    held.apply(listing("three", 0), 109.0, WALL_S)
    held.expire(110.0)
    assert listed(held) == {"b": 9000}, "a third bucket gives no second time to what the second one lacked"
    held.expire(169.0)
    assert listed(held) == {}


def test_what_the_same_bucket_lacks_was_deleted_meanwhile() -> None:
    held = table(listing(a=Entry(value("a"), 1)))
    held.apply(Lost("gone"), 1.0, WALL_S)
    held.apply(listing(sequence=30), 2.0, WALL_S)
    assert listed(held) == {}


def test_a_registration_that_ended_before_the_first_listing_waits_until_it_is_written_again() -> None:
    held = table(listing(a=Entry(value("a", stamp_s=WALL_S - 61), 1)))
    instances, skipped = held.state()
    assert (instances, list(skipped)) == ((), ["a"])
    held.apply(change("a", Entry(value("a", stamp_s=WALL_S - 61), 21), 21), 1.0, WALL_S)
    assert listed(held) == {"a": 8000}, "its clock is behind, but it lives"
    held.apply(Lost("gone"), 2.0, WALL_S)
    held.apply(listing(a=Entry(value("a", stamp_s=WALL_S - 61), 22)), 3.0, WALL_S + 1e6)
    assert listed(held) == {"a": 8000}, "a clock that jumps ends nothing"


def test_a_record_that_nobody_can_read_is_named_until_it_goes() -> None:
    held = table(listing(a=Entry(value("a"), 1), x=Entry(b"?", 2)))
    assert (listed(held), held.state()[1]) == ({"a": 8000}, {"x": "not a record"})
    held.apply(change("x", None), 1.0, WALL_S)
    assert held.state()[1] == {}


def test_an_id_under_two_keys_is_listed_once_and_the_second_key_is_named() -> None:
    held = table(listing(k1=Entry(value("a", 1), 1), k2=Entry(value("a", 2), 2)))
    assert (listed(held), list(held.state()[1])) == ({"a": 1}, ["k2"])


def test_an_older_change_than_what_is_held_is_passed_over() -> None:
    held = table(listing(a=Entry(value("a", 8002), 5)))
    held.apply(change("a", Entry(value("a", 8001), 4), 4), 1.0, WALL_S)
    assert listed(held) == {"a": 8002}


def test_registrations_are_bounded() -> None:
    held = table(listing())
    for n in range(MAX_REGISTRATIONS + 10):
        held.apply(change(f"k{n}", Entry(value(f"i{n}"), 20 + n), 20 + n), 0.0, WALL_S)
    assert len(listed(held)) == MAX_REGISTRATIONS
    held.apply(change("k5", Entry(value("i5", 9), 99_999), 99_999), 0.0, WALL_S)
    assert listed(held)["i5"] == 9
