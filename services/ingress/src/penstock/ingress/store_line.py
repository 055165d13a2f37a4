"""The line of claims to a store of limits that processes share: one call per turn of the loop for all that
came meanwhile, small leases that spare most requests the wait, and what happens while the store is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial

from penstock.common.telemetry import Metrics
from penstock.ingress.leases import UNUSED_S, Leased, Leases
from penstock.ingress.limits import Correction, Part, Parts, Verdict
from penstock.ingress.plans import Plan
from penstock.ingress.ports import LimitStore, StoreLost

log = logging.getLogger(__name__)

MAX_BATCH = 512
MAX_CORRECTIONS = 10_000
# Corrections wait so long for claims that they can go with.
CORRECT_S = 0.05
RETRY_S = 0.25

# Told the store's verdict, None if it is away.
Settled = Callable[[Verdict | None], None]


_Claim = tuple[Plan, Parts, Settled]


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
        # There are leases, or the store is away: something to look at from time to time.
        self._woken = asyncio.Event()
        # A call is under way; one is about to be made; corrections have waited long enough.
        self._asking = self._scheduled = self._due = False
        self._claims: list[_Claim] = []
        self._corrections: list[Correction] = []
        # A timer runs: of the first correction that waited for one, which may have gone since.
        self._correcting = False
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
            self._soon()
        return Leased(lines, plan, tokens, self)

    def ask(self, plan: Plan, parts: Parts, settled: Settled) -> None:
        """Have the store decide; `settled` is called later."""
        self._by_store.value += 1
        self._claims.append((plan, parts, settled))
        if not (self._asking or self._scheduled):
            self._soon()

    def correct(self, corrections: Iterable[Correction]) -> None:
        """Keep them for a moment; beyond MAX_CORRECTIONS they are dropped, and counted."""
        for correction in corrections:
            if self._leases.holds(correction[0]):
                delta = self._leases.absorb(correction, self._wall() + self._ahead_s)
                if not delta:
                    continue
                correction = correction._replace(delta=delta)
            self._add(correction)

    def _add(self, correction: Correction) -> None:
        if len(self._corrections) >= MAX_CORRECTIONS:
            self._dropped.inc()
            return
        self._corrections.append(correction)
        if not self._correcting:
            self._correcting = True
            asyncio.get_running_loop().call_later(CORRECT_S, self._correct)

    def _correct(self) -> None:
        self._correcting = False
        if self._corrections:
            self._due = True
            self._soon()

    async def run(self) -> None:
        """Give back leases that nobody uses, and see whether a store that is away has come back: an eternal
        loop."""
        try:
            while True:
                if self.lost or self._leases.any:
                    await asyncio.sleep(RETRY_S)
                else:
                    await self._woken.wait()
                    # What is new has not been unused for long.
                    self._looked_at = self._wall() + self._ahead_s
                self._woken.clear()
                self._give_back()
                self._ask(probing=self.lost)
        finally:
            await self._store.close()

    def _give_back(self) -> None:
        now = self._wall() + self._ahead_s
        # A wall clock that was set back does not keep leases.
        if not 0 <= self._looked_at + UNUSED_S - now <= UNUSED_S:
            self._looked_at = now
            for correction in self._leases.unused(now):
                self._add(correction)

    def _soon(self) -> None:
        """Ask at the end of this turn of the loop, unless that is to come anyway."""
        if not (self._asking or self._scheduled or self.lost):
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._ask)

    def _ask(self, *, probing: bool = False) -> None:
        """Ask for all that came, unless an answer is still to come: then it goes with the next call."""
        self._scheduled = False
        if self._asking:
            return
        claims = self._claims
        if len(claims) > MAX_BATCH:
            claims, self._claims = claims[:MAX_BATCH], claims[MAX_BATCH:]
        else:
            self._claims = []
        wanted = self._leases.wanted() if self._leases.wanting else []
        corrections = self._take_corrections() if self._corrections else []
        if not (claims or wanted or corrections or probing):
            return
        self._asking = True
        parts: list[Parts] = [claim[1] for claim in claims]
        parts += [[part] for part in wanted]
        self._store.settle(parts, corrections, partial(self._answered, claims, wanted, len(corrections)))

    def _answered(
        self, claims: list[_Claim], wanted: list[Part], corrections: int, verdicts: list[Verdict] | StoreLost
    ) -> None:
        self._asking = False
        if isinstance(verdicts, StoreLost):
            # Nobody knows whether they were counted, so they are not sent again.
            self._dropped.inc(by=corrections)
            self._leases.lost()
            self._lose(True, str(verdicts))
            claims, self._claims = [*claims, *self._claims], []
            for _, _, settled in claims:
                settled(None)
            return
        self._lose(False, "")
        if verdicts:
            self._ahead_s = verdicts[-1].now - self._wall()
        leases = self._leases
        for part, verdict in zip(wanted, verdicts[len(claims) :], strict=True):
            leases.answered(part, verdict)
        for index, (plan, parts, settled) in enumerate(claims):
            verdict = verdicts[index]
            if verdict[0] < 0:
                leases.counted(plan, parts, verdict)
            settled(verdict)
        if leases.any and not self._woken.is_set():
            self._woken.set()
        if self._claims or self._due or leases.wanting:
            self._soon()

    def _take_corrections(self) -> list[Correction]:
        held, self._corrections, self._due = self._corrections, [], False
        if len(held) > MAX_BATCH:
            held = _merged(held)
            self._corrections, self._due = held[MAX_BATCH:], len(held) > MAX_BATCH
        return held[:MAX_BATCH]

    def _lose(self, lost: bool, cause: str) -> None:
        if lost is not self.lost:
            self.lost = lost
            self._woken.set()
            self._say_lost(lost, cause)


def _merged(corrections: list[Correction]) -> list[Correction]:
    """One for each count and window."""
    sums: dict[tuple[str, int, int], int] = {}
    for key, window_s, number, delta in corrections:
        place = key, window_s, number
        sums[place] = sums.get(place, 0) + delta
    return [Correction(*place, delta) for place, delta in sums.items()]
