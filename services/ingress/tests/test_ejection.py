"""Circuit breakers and how much of a pool they may eject."""

from dataclasses import replace

from penstock.ingress.ejection import Breakers, Circuit, Limits

LIMITS = Limits(failures=3, percent=50, requests=10, open_s=5, ejected_percent=50)


class Rig:
    def __init__(self, limits: Limits = LIMITS) -> None:
        self.changes: list[tuple[str, str]] = []
        self.breakers = Breakers(limits, lambda target, state: self.changes.append((target, state.value)))

    def fail(self, target: str, times: int, now: float = 0.0) -> None:
        for _ in range(times):
            self.breakers.failed(target, now)


def test_failures_in_a_row_open_it_and_a_success_between_them_does_not() -> None:
    rig = Rig()
    rig.fail("a", 2)
    rig.breakers.succeeded("a", 0.0)
    rig.fail("a", 2)
    assert rig.breakers.allows("a", 0.0)
    rig.fail("a", 1)
    assert not rig.breakers.allows("a", 0.0)
    assert (rig.changes, rig.breakers.tripped) == ([("a", "open")], {"a"})


def test_a_share_of_failures_opens_it_only_with_enough_requests_and_within_the_window() -> None:
    rig = Rig()
    for _ in range(4):
        rig.fail("a", 1)
        rig.breakers.succeeded("a", 0.0)
    assert rig.breakers.state("a") is Circuit.CLOSED
    rig.fail("a", 1)
    rig.breakers.succeeded("a", 0.0)
    rig.fail("a", 1)
    assert rig.breakers.state("a") is Circuit.OPEN
    old = Rig()
    for now in (0.0, 100.0, 200.0, 300.0, 400.0, 500.0):
        old.fail("a", 1, now)
        old.breakers.succeeded("a", now)
    assert old.breakers.state("a") is Circuit.CLOSED


def test_half_open_lets_one_probe_through_whose_end_decides() -> None:
    rig = Rig()
    rig.fail("a", 3)
    assert not rig.breakers.allows("a", 4.9)
    assert rig.breakers.allows("a", 5.0)
    assert rig.breakers.allows("a", 5.0)
    rig.breakers.sent("a", 5.0)
    assert not rig.breakers.allows("a", 5.1)
    rig.breakers.failed("a", 5.2)
    assert not rig.breakers.allows("a", 15.1)
    assert rig.breakers.allows("a", 15.2)
    rig.breakers.sent("a", 15.2)
    rig.breakers.succeeded("a", 15.3)
    assert rig.breakers.allows("a", 15.3)
    states = [state for _, state in rig.changes]
    assert states == ["open", "half_open", "open", "half_open", "closed"]


def test_a_probe_whose_client_left_or_that_is_never_heard_of_makes_room_for_another() -> None:
    rig = Rig()
    rig.fail("a", 3)
    assert rig.breakers.allows("a", 5.0)
    rig.breakers.sent("a", 5.0)
    rig.breakers.undecided("a")
    assert rig.breakers.allows("a", 5.0)
    rig.breakers.sent("a", 5.0)
    assert not rig.breakers.allows("a", 64.0)
    assert rig.breakers.allows("a", 65.0)


def test_it_stays_open_for_twice_as_long_each_time_up_to_sixteen_times() -> None:
    rig, now, waits = Rig(), 0.0, []
    rig.fail("a", 3)
    for _ in range(7):
        wait = next(w for w in (5, 10, 20, 40, 80, 160) if rig.breakers.allows("a", now + w))
        waits.append(wait)
        now += wait
        rig.breakers.sent("a", now)
        rig.breakers.failed("a", now)
    assert waits == [5, 10, 20, 40, 80, 80, 80]


def test_a_pool_keeps_its_floor_and_the_worst_go_first() -> None:
    rig = Rig()
    for target, times in (("a", 3), ("b", 5), ("c", 4)):
        rig.fail(target, times)
    rig.fail("elsewhere", 9)
    assert rig.breakers.ejected("abcd", 0.0) == ("b", "c")
    assert rig.breakers.ejected("abc", 0.0) == ("b",)
    assert rig.breakers.ejected("a", 0.0) == ()
    assert rig.breakers.ejected("xyz", 0.0) == ()


def test_rules_can_be_switched_off() -> None:
    rig = Rig(replace(LIMITS, failures=0, percent=0))
    rig.fail("a", 1000)
    assert rig.breakers.allows("a", 0.0)
    none = Rig(replace(LIMITS, ejected_percent=0))
    none.fail("a", 3)
    assert none.breakers.ejected("abcd", 0.0) == ()


def test_what_is_well_again_or_gone_is_forgotten() -> None:
    rig = Rig()
    rig.fail("a", 1)
    assert rig.breakers.targets
    for now in (1.0, 15.0, 40.0):
        rig.breakers.succeeded("a", now)
    assert not rig.breakers.targets
    rig.fail("b", 3)
    rig.breakers.forget(lambda target: target == "b")
    assert rig.breakers.tripped | rig.breakers.targets.keys() == set()
    for number in range(20_000):
        rig.breakers.failed(str(number), 0.0)
    assert len(rig.breakers.targets) <= 8192
