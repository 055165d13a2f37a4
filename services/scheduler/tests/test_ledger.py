"""The ledger by plain values: who counts, until when, and what lateness and loss do to it."""

from __future__ import annotations

import pytest

from penstock.common.messages import InFlight, LoadReport, Placed
from penstock.scheduler import ledger as bounds
from penstock.scheduler.ledger import InFlightLedger


def placed(decision: str, instance: str = "a", *, ingress: str = "i", incarnation: str = "1") -> Placed:
    return Placed(decision, ingress, incarnation, instance, tokens=10)


def work(decision: str, instance: str = "a", tokens: int = 10) -> InFlight:
    return InFlight(decision, instance, tokens)


def report(
    sequence: int,
    *in_flight: InFlight,
    finished: tuple[str, ...] = (),
    ingress: str = "i",
    incarnation: str = "1",
    piece: int = 0,
    pieces: int = 0,
    leaving: bool = False,
) -> LoadReport:
    return LoadReport(ingress, incarnation, sequence, in_flight, finished, piece, pieces, leaving)


def snapshot(sequence: int, *in_flight: InFlight, incarnation: str = "1") -> LoadReport:
    return report(sequence, *in_flight, incarnation=incarnation, pieces=1)


def test_a_placement_counts_at_once_and_once() -> None:
    ledger = InFlightLedger()
    assert ledger.place(placed("d"), 1.0, now=0.0)
    assert not ledger.place(placed("d"), 1.0, now=0.1)
    assert ledger.load("a") == (1, 10)
    assert ledger.changes() == [("a", 1, 10, 0)]
    assert ledger.changes() == []


def test_a_placement_that_no_report_covers_is_dropped_in_time() -> None:
    ledger = InFlightLedger()
    ledger.place(placed("d"), 1.0, now=0.0)
    ledger.place(placed("d"), 1.0, now=0.9)
    ledger.expire(0.99)
    assert ledger.load("a") == (1, 10)
    ledger.expire(1.0)
    assert ledger.load("a") == (0, 0)


def test_a_placement_that_a_report_covers_stays_until_the_ingress_finishes_it() -> None:
    ledger = InFlightLedger()
    ledger.place(placed("d"), 1.0, now=0.0)
    ledger.report(report(1, work("d", "a", 25)), now=0.5)
    ledger.expire(3.0)
    assert ledger.load("a") == (1, 25)
    ledger.report(report(2, finished=("d",)), now=3.0)
    assert ledger.load("a") == (0, 0)


def test_the_ingress_decides_where_the_work_is() -> None:
    ledger = InFlightLedger()
    ledger.place(placed("d", "a"), 1.0, now=0.0)
    ledger.report(report(1, work("d", "b")), now=0.1)
    ledger.place(placed("d", "a"), 1.0, now=0.2)
    assert (ledger.load("a"), ledger.load("b")) == ((0, 0), (1, 10))


def test_a_second_placement_of_one_decision_moves_it() -> None:
    ledger = InFlightLedger()
    ledger.place(placed("d", "a"), 1.0, now=0.0)
    ledger.place(placed("d", "b"), 1.0, now=0.5)
    assert (ledger.load("a"), ledger.load("b")) == ((0, 0), (1, 10))
    ledger.expire(1.2)
    assert ledger.load("b") == (1, 10)
    ledger.expire(1.5)
    assert ledger.load("b") == (0, 0)


def test_a_finish_that_overtakes_its_placement_is_remembered_for_a_minute() -> None:
    ledger = InFlightLedger()
    ledger.expire(100.0)
    ledger.report(report(1, finished=("d",)), now=100.0)
    assert not ledger.place(placed("d"), 1.0, now=159.0)
    for now in (160.0, 220.0):
        ledger.expire(now)
    assert ledger.place(placed("d"), 1.0, now=221.0)


def test_reports_in_any_order_give_the_same_sums() -> None:
    reports = [
        report(1, work("d"), work("e")),
        report(2, work("d", "a", 30), finished=("e",)),
        report(3, work("f"), finished=("d",)),
    ]
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0], [0, 0, 2, 1, 1, 0]):
        ledger = InFlightLedger()
        for number in order:
            ledger.report(reports[number], now=0.0)
        assert ledger.load("a") == (1, 10), order


def test_a_gap_makes_the_ingress_dirty_until_its_next_whole_snapshot() -> None:
    ledger = InFlightLedger()
    ledger.report(report(1, work("d")), now=0.0)
    assert ledger.dirty == 0
    ledger.report(report(3, work("e")), now=0.0)
    assert ledger.dirty == 1
    ledger.report(report(4, work("e"), pieces=2, piece=0), now=0.0)
    assert ledger.dirty == 1
    ledger.report(report(5, work("f"), pieces=2, piece=1), now=0.0)
    assert ledger.dirty == 0
    assert ledger.load("a") == (2, 20)


def test_an_ingress_first_heard_in_the_middle_is_dirty_but_a_snapshot_is_a_beginning() -> None:
    ledger = InFlightLedger()
    ledger.report(report(7, work("d")), now=0.0)
    assert (ledger.dirty, ledger.has_snapshot_of("i")) == (1, False)
    ledger.report(snapshot(8, work("d")), now=0.0)
    assert (ledger.dirty, ledger.has_snapshot_of("i")) == (0, True)


def test_pieces_replace_everything_once_all_are_in_in_any_order() -> None:
    ledger = InFlightLedger()
    ledger.report(report(1, work("gone"), work("d")), now=0.0)
    ledger.report(report(4, work("f"), pieces=3, piece=2), now=0.0)
    ledger.report(report(2, work("d"), pieces=3, piece=0), now=0.0)
    assert ledger.load("a") == (3, 30)
    ledger.report(report(3, work("e"), pieces=3, piece=1), now=0.0)
    assert ledger.load("a") == (3, 30)
    assert ledger.dirty == 0


def test_a_snapshot_leaves_placements_alone_that_it_cannot_know() -> None:
    ledger = InFlightLedger()
    ledger.place(placed("d"), 1.0, now=0.0)
    ledger.report(snapshot(1), now=0.1)
    assert ledger.load("a") == (1, 10)
    ledger.expire(1.0)
    assert ledger.load("a") == (0, 0)


def test_what_came_after_a_snapshot_outlives_it_when_the_snapshot_is_late() -> None:
    ledger = InFlightLedger()
    ledger.report(report(3, work("new"), work("grown", tokens=50), finished=("done",)), now=0.0)
    ledger.report(snapshot(2, work("done"), work("grown", tokens=20)), now=0.0)
    assert ledger.load("a") == (2, 60)


@pytest.mark.parametrize(
    ("case", "reports", "counted"),
    [
        ("older than the snapshot, which lacks it", [snapshot(3), report(1, work("d"))], 0),
        ("finished, then started again", [report(3, work("d")), report(2, finished=("d",))], 1),
        (
            "finished twice, the later finish counts",
            [report(5, finished=("d",)), report(3, finished=("d",)), report(4, work("d"))],
            0,
        ),
        ("finished and started again in one report", [report(1, work("d"), finished=("d",))], 1),
        (
            "a piece of an older snapshot among the pieces of a later one",
            [
                report(1, work("d")),
                report(4, pieces=2, piece=0),
                report(3, work("d"), pieces=2, piece=1),
                report(5, pieces=2, piece=1),
            ],
            0,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_latest_word_on_a_decision_counts(case: str, reports: list[LoadReport], counted: int) -> None:
    ledger = InFlightLedger()
    for one in reports:
        ledger.report(one, now=0.0)
    assert ledger.load("a")[0] == counted


def test_a_new_incarnation_replaces_the_old_one_and_stragglers_do_not_bring_it_back() -> None:
    ledger = InFlightLedger()
    ledger.report(report(1, work("d")), now=0.0)
    ledger.report(report(1, work("e", "b"), incarnation="2"), now=0.1)
    assert (ledger.load("a"), ledger.load("b")) == ((0, 0), (1, 10))
    assert not ledger.report(report(1, work("d")), now=0.2)
    assert not ledger.place(placed("x"), 1.0, now=0.2)
    assert (ledger.load("a"), ledger.load("b")) == ((0, 0), (1, 10))


def test_a_straggler_of_an_unknown_old_incarnation_is_corrected_by_the_living() -> None:
    ledger = InFlightLedger()
    ledger.report(snapshot(5, work("e", "b"), incarnation="2"), now=0.0)
    ledger.report(report(9, work("d"), incarnation="1"), now=0.1)
    ledger.report(snapshot(6, work("e", "b"), incarnation="2"), now=0.2)
    assert (ledger.load("a"), ledger.load("b")) == ((0, 0), (1, 10))


def test_an_ingress_that_leaves_is_released_at_once_and_for_good() -> None:
    ledger = InFlightLedger()
    ledger.report(report(1, work("d")), now=0.0)
    ledger.report(report(2, leaving=True), now=0.1)
    assert (ledger.load("a"), ledger.ingresses) == ((0, 0), 0)
    assert not ledger.report(report(1, work("d")), now=0.2)
    assert not ledger.place(placed("x"), 1.0, now=0.2)
    assert ledger.in_flight == 0


def test_a_silent_ingress_is_released_and_counted_again_when_it_returns() -> None:
    ledger = InFlightLedger()
    ledger.report(report(1, work("d")), now=0.0)
    assert ledger.expire(4.9) == []
    assert ledger.expire(5.0) == ["i"]
    assert ledger.load("a") == (0, 0)
    ledger.report(snapshot(9, work("d")), now=6.0)
    assert ledger.load("a") == (1, 10)
    assert ledger.dirty == 0


def test_while_the_bus_is_lost_no_clock_runs_and_after_it_grace_is_full() -> None:
    ledger = InFlightLedger()
    ledger.report(report(1, work("d")), now=0.0)
    ledger.place(placed("e", "b"), 1.0, now=4.0)
    ledger.pause(4.5)
    assert ledger.expire(1000.0) == []
    ledger.resume(1000.0)
    ledger.expire(1000.4)
    assert ledger.load("b") == (1, 10)
    ledger.expire(1000.5)
    assert ledger.load("b") == (0, 0)
    assert ledger.expire(1004.9) == []
    assert ledger.expire(1005.0) == ["i"]


FAR = 2**40


@pytest.mark.parametrize(
    "forged",
    [
        report(FAR, work("forged"), finished=("d",)),
        snapshot(FAR, work("forged")),
        report(FAR, work("forged"), piece=0, pieces=2),
    ],
    ids=["changes", "a snapshot", "a snapshot that never ends"],
)
def test_a_sequence_that_its_ingress_never_reaches_is_given_up_in_seconds(forged: LoadReport) -> None:
    ledger = InFlightLedger()
    ledger.report(snapshot(1, work("d")), now=0.0)
    ledger.report(forged, now=0.1)
    for second in range(1, 5):
        ledger.report(snapshot(1 + second, work("e", "b")), now=float(second))
    assert (ledger.load("a"), ledger.load("b")) == ((0, 0), (1, 10))
    assert (ledger.in_flight, ledger.dirty) == (1, 0)
    assert ledger.dropped["numbers fell"] == 1


def test_repeated_reports_of_a_living_ingress_are_no_sign_that_its_numbers_fell() -> None:
    ledger = InFlightLedger()
    for second in range(1, 10):
        ledger.report(snapshot(second, work("d")), now=float(second))
        for old in range(1, second):
            ledger.report(report(old, work("old")), now=second + 0.5)
    assert (ledger.load("a"), ledger.dropped["numbers fell"]) == ((1, 10), 0)


@pytest.mark.parametrize(("piece", "pieces"), [(1, 1), (5, 2), (0, bounds.MAX_PIECES + 1), (2**40, 2**40)])
def test_a_malformed_snapshot_is_refused(piece: int, pieces: int) -> None:
    ledger = InFlightLedger()
    assert not ledger.report(report(1, work("d"), piece=piece, pieces=pieces), now=0.0)
    assert ledger.in_flight == 0
    assert ledger.dropped["malformed report"] == 1


def test_a_piece_numbered_before_the_first_report_completes_nothing() -> None:
    ledger = InFlightLedger()
    ledger.report(report(1, pieces=3, piece=2), now=0.0)
    assert not ledger.has_snapshot_of("i")


def test_past_its_bounds_the_ledger_counts_no_more_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_INGRESSES", 2)
    monkeypatch.setattr(bounds, "MAX_PER_INGRESS", 2)
    ledger = InFlightLedger()
    for ingress in "ijk":
        ledger.report(
            report(1, work(ingress + "1"), work(ingress + "2"), work(ingress + "3"), ingress=ingress), now=0.0
        )
    assert ledger.load("a") == (4, 40)
    assert ledger.dropped == {"ledger full": 2, "too many ingresses": 1}
    ledger.report(report(2, work("i4"), finished=("i1",)), now=0.0)
    assert ledger.load("a") == (4, 40)


def test_tombstones_are_bounded_and_the_oldest_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_TOMBSTONES", 2)
    ledger = InFlightLedger()
    for number in range(3):
        ledger.report(report(number + 1, finished=(f"a{number}", f"b{number}")), now=0.0)
        ledger.expire(0.0)
    assert not ledger.place(placed("b2"), 1.0, now=0.0)
    assert ledger.place(placed("a0"), 1.0, now=0.0)


def test_prompt_tokens_are_pending_from_the_placement_until_a_first_answer() -> None:
    ledger = InFlightLedger()
    ledger.place(Placed("d1", "i", "1", "a", 1000, 0, b"", 700), 1.0, 0.0)
    assert ledger.full_load("a") == ("a", 1, 1000, 700)
    # An ingress that does not know what was cached does not raise what the placement knew.
    ledger.report(LoadReport("i", "1", 1, (InFlight("d1", "a", 1000),)), 0.1)
    assert ledger.full_load("a") == ("a", 1, 1000, 700)
    ledger.report(
        LoadReport("i", "1", 2, (InFlight("d1", "a", 1000, 1), InFlight("d2", "a", 500, 0, 400))), 0.2
    )
    assert ledger.full_load("a") == ("a", 2, 1501, 100)
    # Moved to another instance, its whole prompt is to be computed there.
    ledger.report(LoadReport("i", "1", 3, (InFlight("d2", "b", 500),)), 0.3)
    assert (ledger.full_load("a")[3], ledger.full_load("b")[3]) == (0, 500)
    ledger.report(LoadReport("i", "1", 4, (), ("d1", "d2")), 0.4)
    assert ledger.full_load("a") == ("a", 0, 0, 0)
    assert ledger.full_load("b") == ("b", 0, 0, 0)


def left(ledger: InFlightLedger) -> list[tuple[str, str, str]]:
    return [(one.incarnation, one.decision_id, one.instance) for one in ledger.orphans(100)]


def test_a_silent_ingress_leaves_what_it_had_in_hand_and_what_it_never_confirmed() -> None:
    ledger = InFlightLedger()
    ledger.report(snapshot(1, work("a"), work("b+p", "p"), work("b", "d")), now=0.0)
    ledger.place(placed("c", "x"), 1.0, now=0.0)
    ledger.report(report(2, finished=("a",)), now=0.5)
    ledger.expire(2.0)
    assert left(ledger) == []
    ledger.expire(10.0)
    assert left(ledger) == [("1", "", ""), ("1", "c", "x"), ("1", "b", "d")]
    assert left(ledger) == []


def test_an_ingress_that_is_started_again_leaves_what_it_had_and_one_that_says_goodbye_nothing() -> None:
    ledger = InFlightLedger()
    ledger.report(snapshot(1, work("a")), now=0.0)
    ledger.report(snapshot(1, work("b"), incarnation="2"), now=0.1)
    assert left(ledger) == [("1", "", ""), ("1", "a", "a")]
    ledger.report(report(2, incarnation="2", pieces=1, leaving=True), now=0.2)
    ledger.expire(20.0)
    assert left(ledger) == []


def test_what_is_left_is_bounded_and_what_is_over_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MAX_ORPHANS", 3)
    monkeypatch.setattr(bounds, "MAX_UNCONFIRMED", 2)
    ledger = InFlightLedger()
    ledger.report(snapshot(1), now=0.0)
    for name in "abcd":
        ledger.place(placed(name), 1.0, now=0.0)
    ledger.expire(2.0)
    ledger.report(snapshot(2, work("e"), work("f")), now=2.0)
    ledger.expire(10.0)
    assert left(ledger) == [("1", "", ""), ("1", "c", "a"), ("1", "d", "a")]
    assert ledger.dropped["orphans"] == 2
