"""The line of claims to a store: what goes with which call, what waits for it, what is granted at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from integration.servers import eventually

from penstock.common.telemetry import Metrics
from penstock.ingress.limits import MINUTE_S, REQUESTS, TOKENS, Correction, LocalCounts, Part, Parts, Verdict
from penstock.ingress.plans import Plan
from penstock.ingress.ports import Settled, StoreLost
from penstock.ingress.store_line import StoreLine

NOW = 1_700_000_040.0


class Store:
    """Counts when it is told to; each call is (how many claims, how many corrections)."""

    def __init__(self) -> None:
        self.counts = LocalCounts()
        self.calls: list[tuple[int, int]] = []
        self.away = self.closed = False
        self._asked: tuple[Sequence[Parts], Sequence[Correction], Settled] | None = None

    def settle(self, claims: Sequence[Parts], corrections: Sequence[Correction], settled: Settled) -> None:
        assert self._asked is None, "a call is under way"
        self._asked = claims, corrections, settled
        self.calls.append((len(claims), len(corrections)))

    async def answer(self) -> None:
        """To the call that is under way, or comes."""
        await eventually(lambda: self._asked)
        assert self._asked is not None
        (claims, corrections, settled), self._asked = self._asked, None
        if self.away:
            settled(StoreLost("away"))
            return
        self.counts.correct(corrections, NOW)
        settled([self.counts.claim(parts, NOW) for parts in claims])

    async def close(self) -> None:
        self.closed = True


class Lab:
    """A line, its store, and what claims were told."""

    def __init__(self) -> None:
        self.store = Store()
        self.said: list[bool] = []
        self.told: list[Verdict | None] = []
        self.line = StoreLine(self.store, Metrics(), lambda lost, _: self.said.append(lost), lambda: NOW)

    def ask(self, plan: Plan, tokens: int = 1) -> None:
        self.line.ask(plan, plan.parts(tokens), self.told.append)


@pytest.fixture
async def lab() -> AsyncIterator[Lab]:
    lab = Lab()
    running = asyncio.create_task(lab.line.run())
    yield lab
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert lab.store.closed


def plan(user: str = "u", limit: int = 1000, what: str = REQUESTS) -> Plan:
    return Plan([Part(user, MINUTE_S, 1, limit, what, "user")])


async def test_claims_of_a_turn_share_a_call_and_those_that_come_meanwhile_the_next(lab: Lab) -> None:
    for user in "abc":
        lab.ask(plan(user))
    await eventually(lambda: lab.store.calls)
    for user in "de":
        lab.ask(plan(user))
    await lab.store.answer()
    assert len(lab.told) == 3
    await lab.store.answer()
    assert lab.store.calls == [(3, 0), (2, 0)]
    assert [verdict.over for verdict in lab.told if verdict is not None] == [-1] * 5


async def test_who_asks_again_within_a_second_is_granted_at_once_from_then_on(lab: Lab) -> None:
    one = plan()
    for _ in range(2):
        assert lab.line.grant(one, 1) is None
        lab.ask(one)
        await lab.store.answer()
        # The loop looks at what came; that must not make it forget.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await lab.store.answer()
    granted = lab.line.grant(one, 1)
    assert granted is not None
    assert b"x-ratelimit-remaining-requests: 997\r\n" in granted.headers


async def test_corrections_go_with_the_next_claims_or_alone_after_a_moment(lab: Lab) -> None:
    tokens = plan("t", 1000, TOKENS)
    for also in (True, False):
        lab.ask(tokens, 100)
        await lab.store.answer()
        verdict = lab.told[-1]
        assert verdict is not None
        lab.store.calls.clear()
        tokens.held(tokens.parts(100), verdict, lab.line).settle(30)
        if also:
            lab.ask(plan("other"))
        await lab.store.answer()
        assert lab.store.calls == [(1 if also else 0, 1)]
        # The next one is another user.
        tokens = plan("t2", 1000, TOKENS)
    assert lab.store.counts.claim([Part("t2", MINUTE_S, 0, 1000, TOKENS, "")], NOW).used == (30,)


async def test_a_store_that_is_away_is_asked_until_it_is_back(lab: Lab) -> None:
    lab.store.away = True
    lab.ask(plan())
    await lab.store.answer()
    assert (lab.told, lab.said, lab.line.lost) == ([None], [True], True)
    await lab.store.answer()
    assert lab.said == [True]
    lab.store.away = False
    await lab.store.answer()
    assert (lab.said, lab.line.lost) == ([True, False], False)
    lab.ask(plan())
    await lab.store.answer()
    assert lab.told[-1] == Verdict(-1, (1,), NOW)
