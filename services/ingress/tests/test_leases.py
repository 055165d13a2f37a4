"""Leases: what a process may grant by itself, and that it is never more than the store has counted."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.ingress.leases import FREE, SHARE, UNUSED_S, Leases
from penstock.ingress.limits import (
    MINUTE_S,
    REQUESTS,
    TOKENS,
    Correction,
    LocalCounts,
    Part,
    Verdict,
    window,
)
from penstock.ingress.plans import Plan

NOW = 1_700_000_040.0


def part(limit: int = 1000, amount: int = 1, key: str = "k", what: str = "") -> Part:
    return Part(key, MINUTE_S, amount, limit, what or (TOKENS if amount > 1 else REQUESTS), "user")


class Process:
    """One process: asks the store as its line does, one call at a time."""

    def __init__(self, store: LocalCounts) -> None:
        self.store, self.leases = store, Leases()
        self.plans: dict[tuple[tuple[str, int], ...], Plan] = {}

    def grant(self, parts: list[Part], now: float) -> Verdict | None:
        plan = self.plan(parts)
        if self.leases.grant(plan, parts[0].amount, now) is None:
            return None
        assert plan.leases is not None
        return Verdict(-1, tuple(one.limit - one.free - one.left for one in plan.leases[: len(parts)]), now)

    def plan(self, parts: list[Part]) -> Plan:
        return self.plans.setdefault(tuple((part.key, part.limit) for part in parts), Plan(parts))

    def claim(self, parts: list[Part], now: float) -> Verdict:
        verdict = self.grant(parts, now)
        if verdict is None:
            verdict = self.store.claim(parts, now)
            if verdict.over < 0:
                self.leases.counted(self.plan(parts), parts, verdict)
        self.refill(now)
        return verdict

    def refill(self, now: float) -> None:
        for wanted in self.leases.wanted():
            self.leases.answered(wanted, self.store.claim([wanted], now))

    def correct(self, correction: Correction, now: float) -> None:
        if rest := self.leases.absorb(correction, now):
            self.store.correct([correction._replace(delta=rest)], now)

    def give_back(self, now: float) -> None:
        self.store.correct(self.leases.unused(now), now)


def counted(store: LocalCounts, one: Part, now: float) -> int:
    """What the store holds, by asking for more than can be granted."""
    return store.claim([one._replace(amount=one.limit + 1)], now).used[0]


def test_the_second_claim_is_followed_by_a_lease_that_grants_the_next() -> None:
    store = LocalCounts()
    process = Process(store)
    for number in range(1, 8):
        assert process.claim([part()], NOW).used == (number,)
        assert counted(store, part(), NOW) == (1 if number == 1 else 12)


def test_a_lease_is_a_hundredth_of_the_limit_and_leaves_a_tenth_free() -> None:
    store = LocalCounts()
    process = Process(store)
    granted = 0
    while process.claim([part(1000)], NOW).over < 0:
        granted += 1
        ahead = counted(store, part(1000), NOW) - granted
        assert 0 <= ahead <= 1000 // SHARE
        if ahead:
            assert granted <= 1000 - 1000 // FREE
    assert granted == 1000


def test_small_limits_and_large_requests_are_never_leased() -> None:
    for claim in ([part(199)], [part(10_000, 101)], [part(10_000), part(100, key="other")]):
        store = LocalCounts()
        process = Process(store)
        for number in range(1, 20):
            process.claim(claim, NOW)
            assert counted(store, claim[0], NOW) == number * claim[0].amount


def test_a_lease_ends_with_its_window_and_with_its_limit() -> None:
    store = LocalCounts()
    process = Process(store)
    for _ in range(5):
        process.claim([part()], NOW)
    assert process.grant([part()], NOW) is not None
    assert process.claim([part(2000)], NOW).over < 0
    assert process.grant([part(2000)], NOW) is None
    assert process.grant([part()], NOW + MINUTE_S) is None
    assert process.grant([part()], NOW - 1) is None
    assert process.claim([part()], NOW + MINUTE_S).used == (1,)


def test_what_is_not_used_goes_back() -> None:
    store = LocalCounts()
    process = Process(store)
    for _ in range(3):
        process.claim([part()], NOW)
    assert counted(store, part(), NOW) == 12
    process.give_back(NOW)
    assert counted(store, part(), NOW) == 12
    process.give_back(NOW + UNUSED_S)
    assert counted(store, part(), NOW) == 3
    assert process.claim([part()], NOW + UNUSED_S).used == (4,)
    process.give_back(NOW + 2 * MINUTE_S)
    assert not process.leases.any


def test_corrections_go_through_the_lease_as_far_as_it_goes() -> None:
    store, tokens = LocalCounts(), part(100_000, 500)
    process = Process(store)
    for _ in range(3):
        process.claim([tokens], NOW)
    assert counted(store, tokens, NOW) == 1000 + 1000
    number = window(NOW, MINUTE_S)
    process.correct(Correction("k", MINUTE_S, number, 200), NOW)
    assert counted(store, tokens, NOW) == 2000
    process.correct(Correction("k", MINUTE_S, number, -900), NOW)
    # 300 were left, 700 fill it, 200 go back.
    assert counted(store, tokens, NOW) == 1800
    process.correct(Correction("k", MINUTE_S, number - 1, 50), NOW)
    assert counted(store, tokens, NOW) == 1850
    process.correct(Correction("k", MINUTE_S, number, 1500), NOW)
    assert counted(store, tokens, NOW) == 1850 + 500


def test_without_the_store_there_are_no_leases() -> None:
    process = Process(LocalCounts())
    for _ in range(3):
        process.claim([part()], NOW)
    process.leases.lost()
    assert process.grant([part()], NOW) is None


@settings(max_examples=60, deadline=None)
@given(
    processes=st.sampled_from([1, 4, 8]),
    limit=st.integers(1, 3000),
    most=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
def test_no_burst_of_any_number_of_processes_passes_a_limit(
    processes: int, limit: int, most: int, seed: int
) -> None:
    """Claims, corrections and returned leases in any order, over the turns of windows."""
    rng, store = random.Random(seed), LocalCounts()
    group = [Process(store) for _ in range(processes)]
    granted: dict[int, int] = {}
    held: list[tuple[int, int]] = []
    now = NOW
    for _ in range(1500):
        now += rng.choice((0.0, 0.001, 0.05))
        process, number = rng.choice(group), window(now, MINUTE_S)
        if held and rng.random() < 0.2:
            of, amount = held.pop(rng.randrange(len(held)))
            spent = rng.randint(0, amount)
            process.correct(Correction("k", MINUTE_S, of, spent - amount), now)
            granted[of] -= amount - spent
        elif rng.random() < 0.02:
            process.give_back(now)
        else:
            amount = rng.randint(1, most)
            if process.claim([part(limit, amount, what=TOKENS)], now).over < 0:
                granted[number] = granted.get(number, 0) + amount
                held.append((number, amount))
        assert granted.get(number, 0) <= limit
        assert counted(store, part(limit), now) >= min(granted.get(number, 0), limit)
