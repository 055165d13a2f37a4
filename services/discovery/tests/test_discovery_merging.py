"""Several sources and hostile ones: who speaks for an instance, what is passed over, whose records go."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.bus import Change, Entry, Listing, Lost, Position
from penstock.common.codec import encode_record
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.messages import CompleteMarker
from penstock.common.model import Endpoint, Instance
from penstock.discovery.allowed import AllowedHosts, is_address, parse_allowed
from penstock.discovery.claims import TAKINGS, WINDOW_S, Claims
from penstock.discovery.flaps import MAX_REMEMBERED, Flaps
from penstock.discovery.leases import Lease, LeaseRecord, lease_key
from penstock.discovery.merging import Listings
from penstock.discovery.orphans import Orphans
from penstock.discovery.ports import MAX_SKIPPED, MORE, bounded
from penstock.discovery.registry import RegistryView
from penstock.discovery.screening import MAX_INSTANCES, Screen, Told, printable


def instance(name: str = "a", host: str = "h", **fields: Any) -> Instance:
    return msgspec.structs.replace(Instance(id=name, endpoint=Endpoint(host, 1)), **fields)


def listing(*names: str) -> dict[str, Instance]:
    return {name: instance(name) for name in names}


def test_the_static_list_speaks_first_and_the_others_in_their_order() -> None:
    listings = Listings(["redis", "etcd", "endpoints"])
    assert listings.order == ("endpoints", "redis", "etcd")
    listings.take("redis", listing("a", "b", "c"))
    listings.take("etcd", listing("b", "d"))
    listings.take("endpoints", listing("c"))
    assert [sorted(listings.won(name)) for name in listings.order] == [["c"], ["a", "b"], ["d"]]
    assert [listings.speaker(name) for name in "abcde"] == ["redis", "redis", "endpoints", "etcd", ""]


@given(st.lists(st.tuples(st.sampled_from(["x", "y", "endpoints"]), st.sets(st.sampled_from("abcd")))))
def test_every_instance_that_is_listed_has_one_speaker_whatever_the_order_of_listings(
    steps: list[tuple[str, set[str]]],
) -> None:
    listings = Listings(["x", "y", "endpoints"])
    last: dict[str, set[str]] = {}
    for source, names in steps:
        listings.take(source, listing(*names))
        last[source] = names
    won = [name for source in listings.order for name in listings.won(source)]
    assert sorted(won) == sorted(set().union(*last.values()))
    assert all(listings.speaker(name) == source for source in listings.order for name in listings.won(source))


@pytest.mark.parametrize(
    ("networks", "host", "refused"),
    [
        ("", "10.0.0.1", False),
        ("", "127.0.0.1", False),
        ("", "engine-1.local", False),
        ("", "169.254.169.254", True),
        ("", "::ffff:169.254.169.254", True),
        ("", "fe80::1", True),
        ("", "fd00:ec2::254", True),
        ("", "0.0.0.0", True),
        ("", "::", True),
        ("", "224.0.0.1", True),
        ("10.0.0.0/8", "10.9.9.9", False),
        ("10.0.0.0/8", "::ffff:10.9.9.9", False),
        ("10.0.0.0/8", "11.0.0.1", True),
        ("10.0.0.0/8,fd00::/8", "fd00::1", False),
        ("169.254.0.0/16", "169.254.1.1", False),
        ("0.0.0.0/0", "0.0.0.0", True),
        ("192.0.2.7", "192.0.2.7", False),
    ],
)
def test_addresses_where_no_instance_may_be_are_refused(networks: str, host: str, refused: bool) -> None:
    assert bool(parse_allowed(networks).refusal(host)) is refused


def test_names_are_no_addresses_and_every_faulty_network_is_named() -> None:
    assert [is_address(host) for host in ("10.0.0.1", "::1", "engine-1", "")] == [True, True, False, False]
    with pytest.raises(ValueError, match=r"'x' is not a network.*'10.0.0.0/99'"):
        parse_allowed("x,10.0.0.0/99")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (instance(""), "its id is empty"),
        (instance("x" * 600), "not a Instance"),
        (instance("b", "h ost"), "not a Instance"),
        (instance("b", "169.254.169.254"), "169.254.169.254 is a link-local or metadata address"),
        (instance("b", weight=float("nan")), "not a Instance"),
        (instance("b", dp_size=0), "not a Instance"),
        (instance("b", models=7), "not a Instance"),
        (instance("b", owner="\ud800"), "not a valid instance: it holds text that is not Unicode"),
        (instance("b", models=("m" * 500,) * 40), "bytes, over 16384"),
        (instance("a"), "another record of this source has the same id"),
    ],
)
def test_a_bad_instance_is_passed_over_with_its_reason_and_the_others_pass(
    bad: Instance, reason: str
) -> None:
    screen = Screen(AllowedHosts())
    for _ in range(2):
        passed, refused = screen.sift([instance("a"), bad, instance("z")])
        assert list(passed) == ["a", "z"]
        ((key, why),) = refused.items()
        assert key == str(bad.id)
        assert reason in why


def test_a_source_that_lists_without_end_is_cut() -> None:
    many = [instance(str(n)) for n in range(MAX_INSTANCES + 1)]
    passed, refused = Screen(AllowedHosts()).sift(many)
    assert (len(passed), list(refused)) == (MAX_INSTANCES, [str(MAX_INSTANCES)])


def test_what_is_passed_over_is_told_once_for_each_reason_and_again_after_it_was_right() -> None:
    told = Told()
    rounds: list[tuple[dict[str, str], bool]] = [
        ({"k": "bad"}, True),
        ({"k": "bad"}, True),
        ({"k": "worse"}, True),
        ({}, False),
        ({"k": "worse"}, True),
        ({}, True),
        ({"k": "worse"}, True),
    ]
    heard = [told.fresh(skipped, complete=complete) for skipped, complete in rounds]
    assert heard == [[("k", "bad")], [], [("k", "worse")], [], [], [], [("k", "worse")]]


def test_a_flood_of_bad_records_is_counted_and_not_named() -> None:
    kept = bounded({f"k{n:04}": "bad" for n in range(500)})
    assert (len(kept), kept[MORE]) == (MAX_SKIPPED + 1, "400 more records were passed over")


def test_hostile_text_becomes_one_line() -> None:
    assert printable("a\nb\x1b[31m\ud800" + "x" * 300).startswith("a\ufffdb\ufffd[31m?x")
    assert len(printable("x" * 300)) == 256


def test_two_sources_that_take_a_record_from_each_other_stop_for_a_while() -> None:
    claims = Claims()
    taken = 0
    for now in range(int(WINDOW_S)):
        if claims.may_take("k", float(now)):
            claims.took("k", float(now))
            taken += 1
    assert taken == TAKINGS
    assert claims.may_take("other", 1.0)
    assert claims.may_take("k", WINDOW_S)
    assert claims.may_take("k", -1e9)


def test_flaps_remember_a_bounded_number_of_instances() -> None:
    flaps = Flaps(600)
    for n in range(MAX_REMEMBERED + 10):
        flaps.fell(str(n), 0.0)
    assert (flaps.recent("0", 1.0), flaps.recent(str(MAX_REMEMBERED), 1.0)) == (0, 1)


RENEW_S, TAKEOVER_S = 2.0, 10.0


def lease_entry(revision: int, *, reads: bool) -> Entry:
    return Entry(encode_record(LeaseRecord("b", "1", revision, reads)), revision)


def test_a_replica_that_reads_the_source_takes_over_from_one_that_does_not() -> None:
    lease = Lease("a", "1", RENEW_S, TAKEOVER_S)
    lease.see(lease_entry(1, reads=True), 0.0, listed=True)
    for step in range(1, 8):
        now = 2.0 * step
        lease.see(lease_entry(1 + step, reads=False), now)
        assert lease.bid(now, reads=False) is None
        assert (lease.bid(now) is not None) is (now >= 12.0)
    lease.see(lease_entry(20, reads=True), 15.0)
    assert lease.bid(15.0) is None


def test_of_two_replicas_the_one_that_reads_the_source_goes_first() -> None:
    lease = Lease("a", "1", RENEW_S, TAKEOVER_S)
    lease.see(lease_entry(1, reads=True), 0.0, listed=True)
    assert [bool(lease.bid(now, reads=False)) for now in (10.0, 19.9, 20.0)] == [False, False, True]
    assert lease.bid(10.0, reads=True)


def registry(*sources: str) -> tuple[RegistryView, Listing]:
    records = {name: instance(name, source=name) for name in sources}
    entries = {instance_key(name): Entry(encode_instance(record), 1) for name, record in records.items()}
    marker = Entry(encode_record(CompleteMarker("marked", ("marked",))), 2)
    event = Listing(Position("i", 9), {**entries, complete_key("marked"): marker})
    view = RegistryView()
    view.apply(event)
    return view, event


def moved(source: str, sequence: int) -> Change:
    return Change(Position("i", sequence), lease_key(source), Entry(b"", sequence))


def test_records_go_once_no_lease_of_their_source_moved_for_long_enough() -> None:
    view, event = registry("own", "alive", "dead")
    orphans = Orphans(["own"], 300)
    orphans.see(event, 0.0)
    for now in range(0, 300, 2):
        orphans.see(moved("alive", 10 + now), float(now))
        assert orphans.due(view, float(now)) == []
    assert orphans.due(view, 300.0) == ["dead", "marked"]
    assert orphans.due(view, 598.0) == ["alive", "dead", "marked"]


def test_time_out_of_sight_counts_for_nothing_and_zero_keeps_all() -> None:
    view, event = registry("dead")
    orphans, never = Orphans(["own"], 300), Orphans(["own"], 0)
    for watcher in (orphans, never):
        watcher.see(event, 0.0)
    orphans.see(Lost("gone"), 200.0)
    assert orphans.due(view, 1000.0) == []
    orphans.see(event, 1000.0)
    assert (orphans.due(view, 1299.0), orphans.due(view, 1300.0)) == ([], ["dead", "marked"])
    assert never.due(view, 1e9) == []
