"""Counts of rate limits on the bus: each a number that every ingress adds to, all at once, by one message for
all claims of a turn of the event loop.

What is added comes back as the sum, so that each ingress knows which of its own claims came before the limit:
the others are taken back. No count is read first, and none is compared and set.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b

from penstock.common.bus import Bus
from penstock.common.errors import BusError
from penstock.common.subjects import LIMITS
from penstock.ingress.limits import OVERFLOW, Correction, Parts, Verdict, window
from penstock.ingress.ports import StoreLost
from penstock.ingress.tasked_store import TaskedStore

log = logging.getLogger(__name__)

# The server's clock says which window a claim is in; it is read this often, and after each loss.
CLOCK_EVERY_S = 5.0
# Names that one process counts apart within a window of the clock; further ones share one count.
MAX_NAMES = 50_000

# Name of a count, seconds of its window, number of the window.
Place = tuple[str, int, int]


class BusLimitStore(TaskedStore):
    """The bus belongs to others, and stays when this is closed."""

    def __init__(self, bus: Bus, timeout_s: float) -> None:
        self._bus, self._timeout_s = bus, timeout_s
        self._ahead_s = 0.0
        self._clock_due = 0.0
        # By length of the window: its number, and the names that were counted in it.
        self._names: dict[int, tuple[int, set[str]]] = {}

    async def ask(self, claims: Sequence[Parts], corrections: Sequence[Correction]) -> list[Verdict]:
        """As of `TaskedStore`."""
        # Looked at more than once.
        claims = [list(parts) for parts in claims]
        try:
            async with asyncio.timeout(self._timeout_s):
                now = await self._now(probing=not (claims or corrections))
                added: Counter[Place] = Counter()
                for correction in corrections:
                    number = window(now, correction.window_s)
                    if correction.delta > 0 or correction.number == number:
                        added[self._place(correction.key, correction.window_s, number)] += correction.delta
                claimed = [
                    [self._place(part.key, part.window_s, window(now, part.window_s)) for part in parts]
                    for parts in claims
                ]
                asked: Counter[Place] = Counter()
                for parts, places in zip(claims, claimed, strict=True):
                    for part, place in zip(parts, places, strict=True):
                        asked[place] += part.amount
                counts = await self._add(added, asked)
                verdicts, refused = _decide(claims, claimed, counts, now)
                # Waited for, so that who is told of a refusal can no more see its claim in any count.
                await self._take_back(refused)
        except BusError as exc:
            self._clock_due = 0.0
            raise StoreLost(str(exc)[:256]) from exc
        except TimeoutError:
            self._clock_due = 0.0
            raise StoreLost(f"no answer within {self._timeout_s:g} s") from None
        return verdicts

    async def _now(self, *, probing: bool) -> float:
        """The server's clock. Raises BusError."""
        if probing or time.monotonic() >= self._clock_due:
            self._ahead_s = await self._bus.ensure_counters(LIMITS) - time.monotonic()
            self._clock_due = time.monotonic() + CLOCK_EVERY_S
        return time.monotonic() + self._ahead_s

    def _place(self, key: str, window_s: int, number: int) -> Place:
        held = self._names.get(window_s)
        if held is None or held[0] != number:
            held = self._names[window_s] = number, set()
        names = held[1]
        if key not in names:
            if len(names) >= MAX_NAMES:
                key = OVERFLOW
            names.add(key)
        return key, window_s, number

    async def _add(self, added: Counter[Place], asked: Counter[Place]) -> dict[Place, int]:
        """Add everything, one message per count; what each count was before what is `asked`."""
        places = list(added.keys() | asked.keys())
        sums = await self._bus.add(LIMITS, [(_key(place), added[place] + asked[place]) for place in places])
        before: dict[Place, int] = {}
        lost: dict[Place, int] = {}
        for place, total in zip(places, sums, strict=True):
            before[place] = total - asked[place]
            if before[place] < 0:
                # Given back to a count that has been lost since: it must not let more through than its limit.
                lost[place] = before[place]
                before[place] = 0
        await self._take_back(lost)
        return before

    async def _take_back(self, amounts: Mapping[Place, int]) -> None:
        """Subtract. What the bus does not take leaves a count too high until its window is over."""
        if not amounts:
            return
        try:
            await self._bus.add(LIMITS, [(_key(place), -amount) for place, amount in amounts.items()])
        except BusError as exc:
            log.debug("counts were not corrected: %s", exc)


def _decide(
    claims: Sequence[Parts],
    claimed: Sequence[Sequence[Place]],
    counts: dict[Place, int],
    now: float,
) -> tuple[list[Verdict], Mapping[Place, int]]:
    """Grant in order what fits; the verdicts, and what has to be taken back for the others."""
    refused: Counter[Place] = Counter()
    verdicts = []
    for parts, places in zip(claims, claimed, strict=True):
        over = -1
        for index, (part, place) in enumerate(zip(parts, places, strict=True)):
            counts[place] += part.amount
            if over < 0 and counts[place] > part.limit:
                over = index
        if over >= 0:
            for part, place in zip(parts, places, strict=True):
                counts[place] -= part.amount
                refused[place] += part.amount
        verdicts.append(Verdict(over, tuple(counts[place] for place in places), now))
    return verdicts, refused


@lru_cache(4096)
def _key(place: Place) -> str:
    """Three tokens; of the name its hash, which says nothing and has one length."""
    name, window_s, number = place
    digest = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return f"{digest}.{window_s}.{number}"
