"""What one replica knows and tells: reservations, the feed to its siblings, who is alive."""

from __future__ import annotations

import pytest

from penstock.common.bus import Entry, Listing, Position
from penstock.common.codec import encode, encode_record
from penstock.common.identity import Identity
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.messages import (
    MAX_BATCH,
    MAX_BLOCKS,
    CompleteMarker,
    Heartbeat,
    InFlight,
    LoadReport,
    Placed,
    PlacedFeed,
    ScheduleBatch,
    ScheduleRequest,
)
from penstock.common.model import Endpoint, Instance
from penstock.common.subjects import PLACED
from penstock.scheduler.feed import FeedReader, FeedWriter
from penstock.scheduler.peers import MAX_PEERS, SILENCE_S, Peers
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.replica import Replica, confirm_within_s

OWN = Identity("scheduler", "s1", "1")


def placed(decision: str = "d", tail: bytes = b"") -> Placed:
    return Placed(decision, "i" * 128, "1" * 128, "n" * 512, 10, 0, tail)


def test_messages_keep_every_bound_and_number_placements_from_one() -> None:
    writer = FeedWriter(OWN)
    large = [placed(f"d{n}", bytes(MAX_BLOCKS * 8)) for n in range(MAX_BATCH)]
    messages = [*writer.messages(large, 1.0), *writer.messages([placed()] * (MAX_BATCH + 1), 1.0)]
    expected = 1
    for message in messages:
        assert message.first_sequence == expected
        assert 0 < len(message.placed) <= MAX_BATCH
        assert len(encode(message)) <= PLACED.max_bytes
        expected += len(message.placed)
    assert expected == 1 + 2 * MAX_BATCH + 1
    assert list(writer.messages([], 1.0)) == []


@pytest.mark.parametrize(
    ("firsts", "missed"),
    [([1, 2, 3], 0), ([5, 6], 0), ([1, 4, 5], 2), ([1, 1, 2], 0), ([1, 4, 2, 5], 2)],
)
def test_a_reader_counts_what_it_missed(firsts: list[int], missed: int) -> None:
    reader = FeedReader(OWN)
    assert sum(reader.missed(PlacedFeed("s2", "1", first, (placed(),))) for first in firsts) == missed


def test_writers_are_followed_apart_and_in_bounded_number() -> None:
    reader = FeedReader(OWN)
    reader.missed(PlacedFeed("s2", "1", 1, (placed(),)))
    assert reader.missed(PlacedFeed("s2", "2", 9, (placed(),))) == 0
    for number in range(1000):
        reader.missed(PlacedFeed(f"x{number}", "1", 1, ()))
    assert reader.missed(PlacedFeed("s2", "1", 9, (placed(),))) == 0


def test_own_messages_are_known_by_their_head_alone() -> None:
    reader = FeedReader(OWN)
    for count in (0, 1, 20, MAX_BATCH):
        for first in (1, 200, 2**39):
            message = encode(PlacedFeed("s1", "1", first, (placed(tail=bytes(64)),) * count))
            assert reader.own_placements(message) == count
    long = Identity("scheduler", "s" * 128, "1")
    assert FeedReader(long).own_placements(encode(PlacedFeed(long.id, "1", 1, (placed(),)))) == 1
    of_others = [
        encode(PlacedFeed("s2", "1", 1, (placed(),))),
        encode(PlacedFeed("s1", "2", 1, (placed(),))),
        encode(PlacedFeed("s11", "1", 1, (placed(),))),
        encode(PlacedFeed("s1", "1", 1, (placed(),) * (MAX_BATCH + 1))),
        encode(PlacedFeed("s1", "1", 1, (placed(),)))[:20],
        b"s1",
        b"",
    ]
    assert [reader.own_placements(message) for message in of_others] == [-1] * len(of_others)


def replica(*instances: str) -> Replica:
    one = Replica(OWN, Catalog(Thresholds()), "least-request", 10_000)
    if instances:
        one.registry(listing(*instances))
    return one


def listing(*instances: str) -> Listing:
    entries = {complete_key("t"): Entry(encode_record(CompleteMarker("t", ("t",))), 1)}
    for revision, name in enumerate(instances, 2):
        instance = Instance(id=name, endpoint=Endpoint("h", 1), models=("m",))
        entries[instance_key(name)] = Entry(encode_instance(instance), revision)
    return Listing(Position("1", 100), entries)


def batch(*requests: ScheduleRequest, budget_ms: float = 50.0) -> ScheduleBatch:
    return ScheduleBatch("i", "1", budget_ms, requests)


def place(one: Replica, request: ScheduleRequest, now: float = 0.0) -> Placed:
    (reserved,) = one.reserve(batch(request), request, one.decide(request, now), now)
    return reserved


def test_round_robin_goes_on_from_request_to_request() -> None:
    one = replica("a", "b", "c")
    order = [
        place(one, ScheduleRequest(f"d{n}", "r", "m", strategy="round-robin")).instance for n in range(6)
    ]
    assert order[:3] == order[3:]
    assert sorted(order[:3]) == ["a", "b", "c"]


def test_replicas_do_not_begin_round_robin_with_the_same_instance() -> None:
    request = ScheduleRequest("d", "r", "m", strategy="round-robin")
    first = set()
    for number in range(20):
        one = Replica(Identity("scheduler", f"s{number}", "1"), Catalog(Thresholds()), "random", 10_000)
        one.registry(listing("a", "b", "c"))
        first.add(place(one, request).instance)
    assert first == {"a", "b", "c"}


def test_siblings_are_told_the_part_of_the_prompt_that_was_not_in_place() -> None:
    one, hashes = replica("a"), bytes(range(32))
    first = place(one, ScheduleRequest("d1", "r", "m", prompt_tokens=9, block_hashes=hashes))
    assert (first.matched_blocks, first.tail, first.tokens) == (0, hashes, 9)
    second = place(one, ScheduleRequest("d2", "r", "m", block_hashes=hashes + bytes(8)))
    assert (second.matched_blocks, second.tail) == (4, bytes(8))


def test_a_rejection_reserves_nothing() -> None:
    one, request = replica("a"), ScheduleRequest("d", "r", "other")
    assert one.reserve(batch(request), request, one.decide(request, 0.0), 0.0) == []
    assert one.ledger.in_flight == 0


@pytest.mark.parametrize(
    ("budget_ms", "window_s"), [(50.0, 1.0), (500.0, 1.0), (700.0, 1.4), (60_000.0, 60.0)]
)
def test_a_placement_waits_for_its_report_for_twice_the_budget_within_bounds(
    budget_ms: float, window_s: float
) -> None:
    assert confirm_within_s(batch(budget_ms=budget_ms)) == pytest.approx(window_s)


def test_work_on_an_instance_that_the_registry_names_later_is_known_then() -> None:
    one = replica()
    one.report(LoadReport("i", "1", 1, (InFlight("w", "a", 7),)), now=0.0)
    assert one.registry(listing("a", "b")) == (["a", "b"], [])
    slot = one.view.slot("a")
    assert slot is not None
    assert (one.view.loads.requests[slot], one.view.loads.tokens[slot]) == (1, 7)
    assert one.registry(listing("a", "b")) is None


def test_a_run_of_the_same_name_before_this_one_is_a_sibling() -> None:
    one = replica()
    one.follow(PlacedFeed("s1", "1", 1, (placed("own"),)), now=0.0)
    assert one.ledger.in_flight == 0
    one.follow(PlacedFeed("s1", "0", 1, (placed("before"),)), now=0.0)
    assert one.ledger.in_flight == 1


def test_a_sibling_cannot_make_a_placement_last_or_break_the_index() -> None:
    one = replica()
    one.follow(PlacedFeed("s2", "1", 1, (placed("d", b"odd"),), confirm_within_s=600.0), now=0.0)
    assert (one.ledger.in_flight, len(one.index)) == (1, 0)
    for second in range(1, 61):
        one.report(LoadReport("i" * 128, "1" * 128, second), now=float(second))
        assert one.ledger.in_flight == 1
        one.expire(float(second))
    assert one.ledger.in_flight == 0


def test_peers_are_bounded_and_fall_silent() -> None:
    peers = Peers(OWN)
    for number in range(MAX_PEERS + 10):
        peers.heard(Heartbeat("ingress", f"i{number}", "1", ready=True), now=0.0)
    assert len(peers.ingresses) == MAX_PEERS
    peers.heard(Heartbeat("ingress", "i0", "1", ready=True), now=SILENCE_S)
    peers.expire(SILENCE_S + 0.1)
    assert peers.ingresses == ["i0"]


def test_time_before_a_siblings_placement_is_not_taken_off_its_prefill() -> None:
    one = replica("a")
    one.decide(ScheduleRequest("d0", "r", "m"), 10.0)
    placed_there = Placed("d1", "i", "1", "a", 8000, 0, b"", 8000)
    one.follow(PlacedFeed("s2", "1", 1, (placed_there,)), 20.0)
    one.decide(ScheduleRequest("d2", "r", "m"), 20.1)
    slot = one.view.slot("a")
    assert one.view.loads.backlog_ms[slot] == pytest.approx(900)
