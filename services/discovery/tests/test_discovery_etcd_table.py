"""The table of etcd's records: listings, changes, leases, lost data, bounds."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from penstock.common.model import Endpoint, Instance
from penstock.common.records import Record, RecordError
from penstock.discovery.etcd_table import Bounds, EtcdTable, Listing
from penstock.discovery.etcd_wire import Header, KeyChange, KeyValue
from penstock.discovery.moment import Moment

TTL_S = 60.0
WALL_S = 1_700_000_000.0
AT = Moment(1000.0, WALL_S)


def parse(key: str, value: bytes) -> Record:
    if value == b"bad":
        raise RecordError("it is bad")
    content: dict[str, Any] = json.loads(value)
    instance = Instance(id=content["id"], endpoint=Endpoint("a", content.get("port", 1)))
    return Record((instance,), content.get("timestamp_ms", 0))


def kv(key: str, revision: int, *, lease: int = 7, value: bytes | None = None, **content: Any) -> KeyValue:
    said = value if value is not None else json.dumps({"id": key, **content}).encode()
    return KeyValue(key.encode(), said, revision, lease)


def put(key: str, revision: int, **content: Any) -> KeyChange:
    return KeyChange(kv(key, revision, **content))


def gone(key: str, revision: int) -> KeyChange:
    return KeyChange(KeyValue(key.encode(), b"", revision), "DELETE")


def listing(revision: int, *kvs: KeyValue, cluster: int = 1, cut: bool = False) -> Listing:
    return Listing(Header(cluster, revision), kvs, cut)


def later(seconds: float, wall_jump_s: float = 0.0) -> Moment:
    return Moment(AT.now_s + seconds, AT.wall_s + seconds + wall_jump_s)


def table(*kvs: KeyValue, revision: int = 10, bounds: Bounds | None = None) -> EtcdTable:
    made = EtcdTable(parse, TTL_S, bounds)
    made.replace(listing(revision, *kvs), AT)
    return made


def ids(held: EtcdTable) -> list[str]:
    return [instance.id for instance in held.state()[0]]


def test_a_listing_and_the_changes_after_it_are_held() -> None:
    held = table(kv("a", 3), kv("b", 4))
    assert held.apply([put("c", 11), gone("a", 12)], AT)
    assert ids(held) == ["b", "c"]
    assert held.agrees(Header(1, 12), 2, 11)


def test_a_heartbeat_that_says_the_same_is_no_change() -> None:
    held = table(kv("a", 3))
    assert not held.apply([put("a", 11)], AT)
    assert held.apply([put("a", 12, port=2)], AT)


def test_a_later_listing_takes_away_what_it_does_not_name() -> None:
    held = table(kv("a", 3), kv("b", 4))
    assert held.replace(listing(12, kv("b", 4)), AT) == 0
    assert ids(held) == ["b"]


def test_a_record_that_cannot_be_read_is_named_until_it_is_gone() -> None:
    held = table(kv("a", 3), kv("b", 4, value=b"bad"), KeyValue(b"\xff", b"{}", 5), KeyValue(b"c", None, 6))
    assert ids(held) == ["a"]
    skipped = held.state()[1]
    assert skipped["b"] == "it is bad"
    assert skipped["\\xff"] == "its key is not UTF-8"
    assert "larger than" in skipped["c"]
    assert held.agrees(Header(1, 10), 4, 6)
    held.apply([gone("b", 11), put("c", 12)], AT)
    assert ids(held) == ["a", "c"]
    assert set(held.state()[1]) == {"\\xff"}


def test_an_id_under_two_keys_is_listed_once_and_the_second_key_named() -> None:
    held = table(kv("a", 3, id="x", port=1), kv("b", 4, id="x", port=2))
    instances, skipped = held.state()
    assert [i.endpoint.port for i in instances] == [1]
    assert "stands under a" in skipped["b"]


def test_a_record_without_a_lease_ends_when_its_timestamp_is_too_old() -> None:
    stamp = int((WALL_S - 20) * 1000)
    held = table(
        kv("a", 3, lease=0, timestamp_ms=stamp), kv("leased", 4, timestamp_ms=1), kv("plain", 5, lease=0)
    )
    assert not held.expire(AT.now_s + 39)
    assert held.expire(AT.now_s + 41)
    assert ids(held) == ["leased", "plain"]
    assert "no lease" in held.state()[1]["a"]
    assert held.agrees(Header(1, 10), 3, 5)
    held.replace(listing(11, kv("a", 3, lease=0, timestamp_ms=stamp)), later(50))
    assert ids(held) == []


def test_one_that_is_too_old_when_it_comes_is_never_listed() -> None:
    held = table(kv("a", 3, lease=0, timestamp_ms=1))
    assert ids(held) == []
    assert held.apply([put("b", 11, lease=0, timestamp_ms=1)], AT)
    assert ids(held) == []
    assert set(held.state()[1]) == {"a", "b"}


def test_a_clock_that_jumps_ends_nothing_and_a_timestamp_from_the_future_counts_as_now() -> None:
    future = int((WALL_S + 9000) * 1000)
    held = table(
        kv("a", 3, lease=0, timestamp_ms=int(WALL_S * 1000)), kv("b", 4, lease=0, timestamp_ms=future)
    )
    held.apply([], later(10, wall_jump_s=7200))
    assert not held.expire(AT.now_s + 59)
    assert held.expire(AT.now_s + 61)
    assert ids(held) == []


def test_after_an_outage_records_without_a_lease_get_a_whole_time_again() -> None:
    record = kv("a", 3, lease=0, timestamp_ms=int(WALL_S * 1000))
    held = table(record)
    held.replace(listing(10, record), later(600), was_away=True)
    assert ids(held) == ["a"]
    assert not held.expire(AT.now_s + 600 + TTL_S - 1)
    assert held.expire(AT.now_s + 600 + TTL_S + 1)


def test_a_store_that_lost_its_data_keeps_its_instances_for_one_lease_time() -> None:
    held = table(kv("a", 3), kv("b", 4))
    assert held.replace(listing(1), AT) == 2
    assert ids(held) == ["a", "b"]
    assert held.agrees(Header(1, 1), 0, 0)
    held.apply([put("a", 2, port=9)], later(5))
    assert not held.expire(AT.now_s + 59)
    assert held.expire(AT.now_s + 61)
    assert ids(held) == ["a"]


def test_what_is_kept_survives_further_listings_until_its_time() -> None:
    held = table(kv("a", 3), kv("b", 4))
    held.replace(listing(1), AT)
    assert held.replace(listing(2, kv("a", 2)), later(30)) == 1
    assert ids(held) == ["a", "b"]
    held.replace(listing(2, kv("a", 2)), later(61))
    assert ids(held) == ["a"]


def test_a_kept_record_is_gone_once_somebody_writes_and_deletes_it() -> None:
    held = table(kv("a", 3))
    held.replace(listing(1), AT)
    held.apply([put("a", 2), gone("a", 3)], AT)
    assert ids(held) == []


def test_an_instance_that_comes_back_under_another_key_counts_once() -> None:
    held = table(kv("a", 3, id="x", port=1))
    held.replace(listing(2, kv("z", 2, id="x", port=2)), AT)
    instances, skipped = held.state()
    assert [(i.id, i.endpoint.port) for i in instances] == [("x", 2)]
    assert not skipped


def test_another_cluster_or_a_history_that_cannot_be_is_lost_data() -> None:
    for new in (
        listing(20, cluster=2),
        # Filled faster than we looked: the revision is higher, but `c` is older than what was listed.
        listing(20, kv("c", 2)),
        listing(20, kv("a", 2)),
    ):
        held = table(kv("a", 3), kv("b", 4))
        assert held.replace(new, AT) > 0, new
        assert {"a", "b"} <= set(ids(held))


def test_a_change_seen_and_then_listed_is_not_lost_data() -> None:
    held = table(kv("a", 3))
    held.apply([put("a", 11), put("b", 12), gone("b", 13)], AT)
    assert held.replace(listing(14, kv("a", 11), kv("c", 14)), AT) == 0
    assert ids(held) == ["a", "c"]


def test_a_watch_that_misses_a_change_disagrees() -> None:
    held = table(kv("a", 3), kv("b", 4))
    assert held.agrees(Header(1, 10), 2, 4)
    for header, count, newest in (
        (Header(1, 11), 1, 4),
        (Header(1, 11), 3, 11),
        (Header(1, 11), 2, 11),
        (Header(1, 9), 2, 4),
        (Header(2, 10), 2, 4),
    ):
        assert not held.agrees(header, count, newest), (header, count, newest)


def test_records_over_the_bounds_are_left_out_and_named() -> None:
    held = table(kv("a", 3), kv("b", 4), bounds=Bounds(records=2))
    held.apply([put("c", 11)], AT)
    assert ids(held) == ["a", "b"]
    assert "2 records" in str(held.state()[1])
    held.apply([gone("a", 12), put("c", 13)], AT)
    assert ids(held) == ["b", "c"]
    small = table(kv("a", 3), kv("b", 4), bounds=Bounds(value_bytes=12))
    assert ids(small) == ["a"]
    small.apply([gone("a", 11), put("b", 12)], AT)
    assert ids(small) == ["b"]


NAMES = st.sampled_from(["a", "b", "c"])
STEPS = st.lists(st.tuples(NAMES, st.sampled_from(["put", "delete", "list", "wipe", "wait"])), max_size=40)


@given(STEPS)
def test_any_history_ends_in_what_the_store_holds_once_its_time_is_over(steps: list[tuple[str, str]]) -> None:
    """The store is modelled; some changes reach the table by its watch, all of them by a listing."""
    held, store, revision, now_s = EtcdTable(parse, TTL_S), dict[str, KeyValue](), 1, 0.0
    held.replace(listing(1), Moment(0, WALL_S))
    for name, step in [*steps, ("a", "list"), ("a", "wait")]:
        at = Moment(now_s, WALL_S)
        if step == "put":
            revision += 1
            store[name] = kv(name, revision, port=revision)
            held.apply([KeyChange(store[name])], at)
        elif step == "delete" and name in store:
            revision += 1
            del store[name]
            held.apply([gone(name, revision)], at)
        elif step == "wipe":
            store, revision = {}, 1
        elif step == "list":
            held.replace(listing(revision, *store.values()), at)
        elif step == "wait":
            now_s += TTL_S + 1
            held.expire(now_s)
    # A wipe is only known once it is listed.
    held.replace(listing(revision, *store.values()), Moment(now_s, WALL_S))
    held.expire(now_s + TTL_S + 1)
    assert {i.id: i.endpoint.port for i in held.state()[0]} == {
        name: json.loads(one.value or b"")["port"] for name, one in store.items()
    }
