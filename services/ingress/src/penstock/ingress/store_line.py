"""The line of claims to a store of limits that processes share: one call per turn of the loop for all that
came meanwhile, small leases that spare most requests the wait, and what happens while the store is away."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec

from penstock.common.telemetry import Metrics
from penstock.ingress.leases import UNUSED_S, Leases
from penstock.ingress.limits import MINUTE_S, Correction, Part, Plan, Verdict
from penstock.ingress.ports import LimitStore, StoreLost

log = logging.getLogger(__name__)

MAX_BATCH = 512
MAX_CORRECTIONS = 10_000
# Corrections wait so long for claims that they can go with.
CORRECT_S = 0.05
RETRY_S = 0.25

# Told the store's verdict, None if it is away.
Settled = Callable[[Verdict | None], None]


class _Claim(NamedTuple):
    plan: Plan
    parts: list[Part]
    settled: Settled


class Leased(msgspec.Struct, gc=False):
    """A claim granted by leases; fulfils `penstock.ingress.limits.Held`. `minute` numbers its window."""

    line: StoreLine
    plan: Plan
    tokens: int
    minute: int
    headers: bytes
    counts_tokens: bool
    hide_usage: bool = False
    settled: bool = False

    def settle(self, tokens: int | None) -> None:
        """As of `Held`."""
        if tokens is None or tokens == self.tokens or self.settled:
            return
        self.settled = True
        delta = tokens - self.tokens
        first, last = self.plan.leases
        lease = last if last.by_tokens else first
        if self.minute == lease.number and 0 <= lease.left - delta <= lease.size and not lease.pending:
            lease.left -= delta
        else:
            self.line.correct([Correction(lease.part.key, MINUTE_S, self.minute, delta)])


class StoreLine:
    """Claims and corrections on their way to the store. `lost` while it is away."""

    def __init__(
        self,
        store: LimitStore,
        metrics: Metrics,
        say_lost: Callable[[bool, str], None],
        wall: Callable[[], float],
    ) -> None:
        """`say_lost` hears of each change; `wall`: seconds since 1970."""
        self._store, self._say_lost, self._wall = store, say_lost, wall
        self._leases = Leases()
        # The store's clock less ours.
        self._ahead_s = 0.0
        self._looked_at = 0.0
        self._woken = asyncio.Event()
        self._claims: list[_Claim] = []
        self._corrections: dict[tuple[str, int, int], int] = {}
        self._correcting: asyncio.TimerHandle | None = None
        self.lost = False
        self._dropped = metrics.counter(
            "penstock_ingress_limit_corrections_dropped_total",
            "Corrections of estimated tokens that the store did not get",
        )
        calls = metrics.counter(
            "penstock_ingress_limit_claims_total", "Claims of limited requests by who decided", "by"
        )
        self._by_lease, self._by_store = calls.labels("lease"), calls.labels("store")

    def grant(self, plan: Plan, tokens: int) -> Leased | None:
        """Decide by leases; None: the store has to be asked."""
        now = self._wall() + self._ahead_s
        lines = self._leases.grant(plan, tokens, now)
        if lines is None:
            return None
        self._by_lease.value += 1
        if self._leases.wanting:
            self._woken.set()
        return Leased(self, plan, tokens, int(now // MINUTE_S), lines, plan.counts_tokens)

    def ask(self, plan: Plan, parts: list[Part], settled: Settled) -> None:
        """Have the store decide; `settled` is called later."""
        self._by_store.value += 1
        self._claims.append(_Claim(plan, parts, settled))
        self._woken.set()

    def correct(self, corrections: Iterable[Correction]) -> None:
        """Keep them for a moment; beyond MAX_CORRECTIONS they are dropped, and counted."""
        now = self._wall() + self._ahead_s
        for correction in corrections:
            if delta := self._leases.absorb(correction, now):
                self._add(correction._replace(delta=delta))

    def _add(self, correction: Correction) -> None:
        key, window_s, number, delta = correction
        place = key, window_s, number
        if place not in self._corrections and len(self._corrections) >= MAX_CORRECTIONS:
            self._dropped.inc()
            return
        self._corrections[place] = self._corrections.get(place, 0) + delta
        if self._correcting is None:
            self._correcting = asyncio.get_running_loop().call_later(CORRECT_S, self._woken.set)

    async def run(self) -> None:
        """Ask the store whenever there is something to ask: an eternal loop."""
        try:
            while True:
                await (asyncio.sleep(RETRY_S) if self.lost else self._something())
                self._woken.clear()
                self._give_back()
                await self._turn()
        finally:
            await self._store.close()

    def _give_back(self) -> None:
        now = self._wall() + self._ahead_s
        # A wall clock that was set back does not keep leases.
        if not 0 <= self._looked_at + UNUSED_S - now <= UNUSED_S:
            self._looked_at = now
            for correction in self._leases.unused(now):
                self._add(correction)

    async def _something(self) -> None:
        if self._woken.is_set():
            return
        try:
            async with asyncio.timeout(UNUSED_S if self._leases.any else None):
                await self._woken.wait()
        except TimeoutError:
            # Leases are looked at.
            return

    async def _turn(self) -> None:
        claims, self._claims = self._claims[:MAX_BATCH], self._claims[MAX_BATCH:]
        wanted, corrections = self._leases.wanted(), self._take_corrections()
        if self._claims or self._corrections:
            self._woken.set()
        if not (claims or wanted or corrections or self.lost):
            return
        try:
            verdicts = await self._store.settle(
                [*(claim.parts for claim in claims), *([part] for part in wanted)], corrections
            )
        except StoreLost as exc:
            # Nobody knows whether they were counted, so they are not sent again.
            self._dropped.inc(by=len(corrections))
            self._leases.lost()
            self._lose(True, str(exc))
            claims, self._claims = [*claims, *self._claims], []
            for claim in claims:
                claim.settled(None)
            return
        self._lose(False, "")
        if verdicts:
            self._ahead_s = verdicts[-1].now - self._wall()
        for part, verdict in zip(wanted, verdicts[len(claims) :], strict=True):
            self._leases.answered(part, verdict)
        for claim, verdict in zip(claims, verdicts, strict=False):
            if verdict.over < 0:
                self._leases.counted(claim.plan, claim.parts, verdict)
            claim.settled(verdict)
        if self._leases.wanting:
            self._woken.set()

    def _take_corrections(self) -> list[Correction]:
        if self._correcting is not None:
            self._correcting.cancel()
            self._correcting = None
        places = list(itertools.islice(self._corrections, MAX_BATCH))
        return [Correction(*place, self._corrections.pop(place)) for place in places]

    def _lose(self, lost: bool, cause: str) -> None:
        if lost is not self.lost:
            self.lost = lost
            self._say_lost(lost, cause)
