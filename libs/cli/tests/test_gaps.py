"""Missing numbers of the routing log are found, and forgotten once they came late."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.cli.gaps import MAX_GAPS, MAX_WRITERS, GapTracker, parse_range


@pytest.mark.parametrize(
    ("ranges", "gaps", "missing"),
    [
        ([(1, 3), (4, 4), (5, 9)], [], 0),
        ([(100, 103), (104, 110)], [], 0),
        ([(1, 3), (6, 9)], [(4, 5)], 2),
        ([(1, 3), (6, 9), (4, 5)], [(4, 5)], 0),
        ([(1, 3), (9, 9), (5, 6)], [(4, 8)], 3),
        ([(1, 3), (4, 6), (4, 6)], [], 0),
        ([(1, 1), (3, 3), (5, 5)], [(2, 2), (4, 4)], 2),
    ],
    ids=[
        "consecutive messages leave none",
        "what came before the first message seen does not count",
        "a jump is a gap",
        "a late message fills its gap",
        "a late message in the middle splits its gap",
        "a repeated message changes nothing",
        "several gaps add up",
    ],
)
def test_gaps_of_one_writer(ranges: list[tuple[int, int]], gaps: list[tuple[int, int]], missing: int) -> None:
    tracker = GapTracker()
    found = [gap for first, last in ranges if (gap := tracker.see("w", "i", first, last))]
    assert (found, tracker.missing) == (gaps, missing)


def test_writers_and_their_incarnations_count_apart() -> None:
    tracker = GapTracker()
    assert tracker.see("a", "1", 1, 5) is None
    assert tracker.see("b", "1", 9, 9) is None
    assert tracker.see("a", "2", 1, 1) is None
    assert tracker.see("a", "1", 7, 7) == (6, 6)


@given(st.permutations(range(2, 12)))
def test_in_whatever_order_they_come_nothing_is_missing_once_all_came(order: list[int]) -> None:
    tracker = GapTracker()
    for number in [1, *order]:
        tracker.see("w", "i", number, number)
    assert tracker.missing == 0


def test_memory_is_bounded_whatever_headers_say() -> None:
    tracker = GapTracker()
    for number in range(1, 3 * MAX_GAPS, 2):
        tracker.see("w", "i", number, number)
    assert tracker.missing == MAX_GAPS
    for number in range(MAX_WRITERS):
        tracker.see(f"other-{number}", "i", 1, 1)
    assert tracker.missing == 0
    assert tracker.see("w", "i", 10_000, 10_000) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7-9", (7, 9)),
        ("7-7", (7, 7)),
        ("9-7", None),
        ("0-3", None),
        ("-3", None),
        ("7", None),
        ("", None),
        ("a-b", None),
        ("1-" + "9" * 5000, None),
    ],
)
def test_only_a_range_is_a_range(text: str, value: tuple[int, int] | None) -> None:
    assert parse_range(text) == value
