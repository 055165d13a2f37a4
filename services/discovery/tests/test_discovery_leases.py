"""The lease of a source: one holder, taken over only when it stands still in plain sight."""

from penstock.common.bus import Entry
from penstock.common.codec import encode_record
from penstock.discovery.leases import Lease, LeaseRecord

RENEW_S, TAKEOVER_S = 2.0, 10.0


def lease(holder: str = "a", incarnation: str = "1") -> Lease:
    return Lease(holder, incarnation, RENEW_S, TAKEOVER_S)


def entry(holder: str, revision: int, counter: int = 1, incarnation: str = "1") -> Entry:
    return Entry(encode_record(LeaseRecord(holder, incarnation, counter)), revision)


def held(revision: int = 1, at: float = 0.0) -> Lease:
    subject = lease()
    subject.see(None, at, listed=True)
    bid = subject.bid(at)
    assert bid is not None
    subject.won(bid, revision, at)
    return subject


def due(subject: Lease, now: float) -> int | None:
    """The revision that the due bid expects."""
    bid = subject.bid(now)
    return bid.expected if bid else None


def test_nothing_is_bid_before_the_registry_was_seen() -> None:
    assert due(lease(), 100.0) is None


def test_a_free_lease_is_taken_at_once_and_renewed_in_time() -> None:
    subject = held(revision=5)
    assert (subject.mine, subject.may_write(0.0), subject.holder) == (True, True, "a")
    assert (due(subject, 1.9), due(subject, 2.0)) == (None, 5)


def test_the_counter_moves_with_every_renewal() -> None:
    subject = held(revision=5)
    bid = subject.bid(2.0)
    assert bid is not None
    assert bid.value == encode_record(LeaseRecord("a", "1", 2))


def test_a_holder_that_is_not_confirmed_stops_writing_before_another_may_begin() -> None:
    subject = held(at=0.0)
    assert [subject.may_write(now) for now in (7.9, 8.0, 1000.0)] == [True, False, False]
    assert subject.mine


def test_a_moving_lease_of_another_is_left_alone() -> None:
    subject = lease()
    subject.see(entry("b", 1), 0.0, listed=True)
    for step in range(1, 20):
        now = step * 9.0
        assert due(subject, now) is None
        subject.see(entry("b", 1 + step, step), now)
    assert (subject.theirs, subject.mine, subject.may_write(0.0)) == (True, False, False)


def test_a_lease_that_stands_still_for_the_takeover_time_is_taken() -> None:
    subject = lease()
    subject.see(entry("b", 7), 0.0, listed=True)
    assert (due(subject, 9.9), due(subject, 10.0)) == (None, 7)


def test_the_same_entry_seen_again_is_not_a_move() -> None:
    subject = lease()
    subject.see(entry("b", 7), 0.0, listed=True)
    subject.see(entry("b", 7), 9.0)
    assert due(subject, 10.0) == 7


def test_time_without_sight_does_not_count_and_a_listing_gives_full_grace() -> None:
    subject = lease()
    subject.see(entry("b", 7), 0.0, listed=True)
    subject.pause()
    assert due(subject, 500.0) is None
    subject.see(entry("b", 7), 501.0, listed=True)
    assert (due(subject, 510.9), due(subject, 511.0)) == (None, 7)


def test_a_released_lease_is_taken_at_once() -> None:
    subject = lease()
    subject.see(entry("b", 7), 0.0, listed=True)
    subject.see(None, 0.1)
    assert due(subject, 0.1) == 0


def test_a_holder_that_another_one_replaced_knows_it() -> None:
    subject = held(revision=1)
    subject.see(entry("b", 9), 3.0)
    assert (subject.mine, subject.theirs, subject.may_write(3.0), subject.holder) == (False, True, False, "b")


def test_an_earlier_run_under_the_same_name_is_another_replica() -> None:
    subject = lease("a", "2")
    subject.see(entry("a", 3, incarnation="1"), 0.0, listed=True)
    assert (subject.theirs, due(subject, 9.0), due(subject, 10.0)) == (True, None, 3)


def test_a_late_echo_of_an_older_renewal_is_passed_over() -> None:
    subject = held(revision=8)
    subject.see(entry("b", 3), 1.0)
    assert (subject.mine, subject.revision) == (True, 8)


def test_a_bucket_created_anew_is_bid_for_with_its_low_revisions() -> None:
    subject = held(revision=800)
    subject.see(None, 1.0, listed=True)
    assert (subject.mine, subject.theirs, due(subject, 1.0)) == (False, False, 0)
    subject.see(entry("b", 2), 1.1)
    assert subject.theirs


def test_what_is_ours_stays_ours_while_the_registry_is_out_of_sight() -> None:
    subject = held()
    subject.pause()
    assert (subject.mine, due(subject, 5.0), subject.may_write(100.0)) == (True, None, False)


def test_a_renewal_whose_answer_was_lost_is_recognised_by_its_echo() -> None:
    subject = held(revision=1)
    subject.see(entry("a", 2, counter=2), 2.1)
    assert (subject.mine, due(subject, 2.5)) == (True, 2)


def test_a_release_ends_it_for_good() -> None:
    subject = held(revision=4)
    assert subject.release() == 4
    subject.see(entry("a", 5, counter=2), 1.0)
    subject.see(None, 1.1)
    assert (subject.mine, subject.theirs, due(subject, 100.0), subject.may_write(1.0)) == (
        False,
        False,
        None,
        False,
    )


def test_only_a_held_lease_is_given_back() -> None:
    subject = lease()
    subject.see(entry("b", 7), 0.0, listed=True)
    assert subject.release() == 0


def test_an_unreadable_lease_is_taken_over_like_that_of_a_dead_replica() -> None:
    subject = lease()
    subject.see(Entry(b"\xff{", 7), 0.0, listed=True)
    assert (due(subject, 9.0), due(subject, 10.0)) == (None, 7)
