"""Who waits is served by priority, by turns among users, in order of arrival; nobody starves or is lost."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.ingress.waiting import MAX_RETRY_S, Line, Lines, Ticket

KEY = ("m", "")


def join(
    lines: Lines[str], name: str, user: str = "", priority: int = 0, key: object = KEY, until: float = 9.0
) -> Ticket[str]:
    line = lines.open(key, "m", "")
    return lines.join(line, name, priority=priority, user=user, since=0.0, until=until)


def serve(lines: Lines[str], now: float = 0.0) -> Ticket[str]:
    ticket = lines.first(lambda line: True)
    assert ticket is not None
    ticket.line.ask(ticket)
    lines.leave(ticket, now)
    return ticket


def order(lines: Lines[str]) -> list[str]:
    return [serve(lines).holder for _ in range(lines.count)]


def test_higher_priorities_go_first_and_equal_ones_in_order_of_arrival() -> None:
    lines: Lines[str] = Lines()
    for name, priority in (("a", 0), ("b", -5), ("c", 7), ("d", 0), ("e", 7)):
        join(lines, name, priority=priority)
    # All of one user: turns change nothing within it.
    assert order(lines) == ["c", "e", "a", "d", "b"]


def test_users_take_turns_however_many_requests_one_of_them_has() -> None:
    lines: Lines[str] = Lines()
    for number in range(4):
        join(lines, f"a{number}", "a")
    join(lines, "b0", "b")
    join(lines, "b1", "b")
    assert [serve(lines).holder for _ in range(3)] == ["a0", "b0", "a1"]
    join(lines, "c0", "c")
    assert order(lines) == ["b1", "a2", "c0", "a3"]


def test_a_user_who_comes_back_at_once_does_not_pass_those_who_wait() -> None:
    lines: Lines[str] = Lines()
    join(lines, "a0", "a")
    join(lines, "b0", "b")
    join(lines, "b1", "b")
    served = []
    for number in range(1, 4):
        served.append(serve(lines).holder)
        join(lines, f"a{number}", "a")
    assert served == ["a0", "b0", "b1"]


def test_one_whose_placement_failed_has_its_place_again() -> None:
    lines: Lines[str] = Lines()
    first, second = join(lines, "a"), join(lines, "b")
    first.line.ask(first)
    assert lines.first(lambda line: True) is second
    first.line.back(first)
    first.line.back(first)
    assert order(lines) == ["a", "b"]


def test_a_full_room_takes_from_the_longest_line_and_from_the_user_with_most() -> None:
    lines: Lines[str] = Lines()
    for number in range(4):
        join(lines, f"a{number}", "a")
    line = lines.open(KEY, "m", "")
    fresh: Line[str] = lines.open("other", "m2", "")
    for who, priority, displaced in (("b", 0, "a3"), ("a", 0, None), ("a", 1, "a3"), ("b", -1, None)):
        ticket = lines.to_displace(line, priority, who)
        assert (ticket and ticket.holder) == displaced
    other = lines.to_displace(fresh, -9, "a")
    assert other is not None
    assert other.holder == "a3"


def test_the_time_to_come_back_grows_with_the_line_and_the_pace_within_bounds() -> None:
    lines: Lines[str] = Lines()
    tickets = [join(lines, str(number)) for number in range(8)]
    line = tickets[0].line
    assert line.retry_after_s() == 8.0
    for second in range(4):
        serve(lines, 2.0 * second)
    assert line.retry_after_s() == pytest.approx(8.0)
    serve(lines, 1e6)
    assert line.retry_after_s() == MAX_RETRY_S


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("join"), st.sampled_from("abc"), st.integers(-1, 1)),
        st.tuples(st.sampled_from(["serve", "cancel", "ask", "back"]), st.just(""), st.integers(0, 30)),
    ),
    max_size=120,
)


@given(STEPS)
def test_sizes_are_right_and_everybody_leaves_whatever_happens(steps: list[tuple[str, str, int]]) -> None:
    lines: Lines[str] = Lines()
    held: list[Ticket[str]] = []
    for what, user, number in steps:
        if what == "join":
            held.append(join(lines, "", user, number))
        elif held:
            ticket = held[number % len(held)]
            if what == "ask":
                ticket.line.ask(ticket)
            elif what == "back":
                ticket.line.back(ticket)
            else:
                held.remove(ticket)
                lines.leave(ticket, 0.0 if what == "serve" else None)
        assert lines.count == len(held) == sum(map(len, lines))
    for ticket in list(held):
        ticket.line.back(ticket)
    served = [serve(lines) for _ in held]
    # By priority, and within one user of a priority in order of arrival.
    assert [t.place for t in served] == sorted(t.place for t in held)
    for user in "abc":
        for priority in (-1, 0, 1):
            mine = [t.place[2] for t in served if t.user == user and t.place[0] == -priority]
            assert mine == sorted(mine)
    assert list(lines) == []


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=40), st.data())
def test_nobody_is_passed_more_than_once_a_round_by_each_other_user(
    users: list[str], data: st.DataObject
) -> None:
    lines: Lines[str] = Lines()
    for number, user in enumerate(users):
        join(lines, str(number), user)
    mine = users.index(watched := data.draw(st.sampled_from(users)))
    passed: Counter[str] = Counter()
    while (ticket := serve(lines)).holder != str(mine):
        passed[ticket.user] += 1
        # Who was served is back at once, and others keep coming.
        join(lines, "again", ticket.user)
        join(lines, "more", data.draw(st.sampled_from("abcd")) if lines.count < 80 else ticket.user)
    # It was the first of its user: it belongs to the first round.
    assert all(count <= 1 for user, count in passed.items() if user != watched)
    assert not passed[watched]
