"""Leases: small parts of limits that the store has counted already, for this process to grant by itself.

A lease is at most a hundredth of a limit, and taken only while more than a tenth of it remains: what other
processes cannot have because this one holds it is small, and nobody holds any where it gets tight. As the
store has counted it, no limit is ever passed.
"""

from __future__ import annotations

import math

from penstock.ingress.limits import (
    MINUTE_S,
    TOKENS,
    Correction,
    Counts,
    Held,
    Part,
    Parts,
    Verdict,
    new_tuple,
    window,
)
from penstock.ingress.plans import Plan

# A lease is at most one part in so many of its limit, and leaves at least one part in so many free.
SHARE, FREE = 100, 10
# One that was not used for so long goes back.
UNUSED_S = 1.0
MAX_LEASES = 10_000


class Lease:
    """`left` of it, and what was `free` of the limit when the store was last asked, all of the lease taken
    off. Below `low` it is filled up; `before` is what was left when it was last looked at."""

    __slots__ = (
        *("before", "by_tokens", "ends_at", "free", "left", "limit", "low", "number", "part", "pending"),
        *("refused", "size"),
    )

    def __init__(self, part: Part, now: float) -> None:
        """`part` is of the whole limit."""
        self.part, self.limit, self.by_tokens = part, part.limit, part.what is TOKENS
        self.size = part.limit // SHARE
        self.low = self.size // 2
        self.pending = False
        self.begin(now)

    def begin(self, now: float) -> None:
        """In the window that `now` lies in; nothing of it is here yet."""
        window_s = self.part.window_s
        self.number = window(now, window_s)
        self.ends_at = float((self.number + 1) * window_s)
        self.left, self.free, self.before, self.refused = 0, self.limit, 0, False

    def end(self) -> None:
        """Nothing of it is granted any more."""
        self.left, self.ends_at = 0, 0.0


class Leased(Held):
    """A claim granted by the leases of `plan`, out of window `minute`."""

    __slots__ = ("_counts", "_minute", "_plan", "_tokens")

    def __init__(self, headers: bytes, plan: Plan, tokens: int, counts: Counts) -> None:
        """`counts` hear what goes beyond the leases."""
        super().__init__(headers, plan.counts_tokens)
        self._plan, self._minute, self._tokens, self._counts = plan, plan.minute, tokens, counts

    def settle(self, tokens: int | None) -> None:
        """As of `Held`."""
        held, self._tokens = self._tokens, -1
        if tokens is None or tokens == held or held < 0 or self._plan.leases is None:
            return
        delta = tokens - held
        first, last = self._plan.leases
        lease = last if last.by_tokens else first
        if self._minute == lease.number and 0 <= lease.left - delta <= lease.size and not lease.pending:
            lease.left -= delta
        else:
            place = lease.part.key, MINUTE_S, self._minute, delta
            self._counts.correct([new_tuple(Correction, place)])


class Leases:
    """The leases of one process. Moments are those of the store's clock."""

    def __init__(self) -> None:
        self._leases: dict[str, Lease] = {}
        self._wanted: list[Lease] = []
        # Those that were asked for in the last UNUSED_S and are without a lease.
        self._seen: list[Plan] = []

    @property
    def any(self) -> bool:
        """Whether `unused` has something to look at."""
        return bool(self._leases or self._seen)

    def holds(self, key: str) -> bool:
        """Whether there is a lease of a count."""
        return key in self._leases

    @property
    def wanting(self) -> bool:
        """Whether `wanted` has something to ask for."""
        return bool(self._wanted)

    def grant(self, plan: Plan, tokens: int, now: float) -> bytes | None:
        """Take a claim out of leases, whole; the header lines that tell it. None: ask the store.

        On the path of every request: a loop, a call or an object more is 1 us of it."""
        if not plan.leased_from <= now < plan.leased_until and not self._look_at(plan, now):
            return None
        leases = plan.leases
        if leases is None:
            return None
        first, other = leases
        of_first, of_other = tokens if first.by_tokens else 1, tokens if other.by_tokens else 1
        if first.left < of_first or other.left < of_other:
            return None
        first.left = left = first.left - of_first
        if left < first.low:
            self._want(first)
        lines: bytes
        if other is first:
            lines = plan.lines % (first.free + left)
            return lines
        other.left = of_other = other.left - of_other
        if of_other < other.low:
            self._want(other)
        lines = plan.lines % (first.free + left, other.free + of_other)
        return lines

    def _look_at(self, plan: Plan, now: float) -> bool:
        """Once a second: whether the plan's leases are of this window; its header lines anew."""
        if plan.leases is None:
            return False
        first, other = plan.leases
        for lease in (first, other):
            if lease.number != window(now, lease.part.window_s) or not lease.ends_at:
                return False
        plan.leased_from = float(math.floor(now))
        plan.leased_until = min(plan.leased_from + 1, first.ends_at, other.ends_at)
        plan.minute = window(now, MINUTE_S)
        plan.lines = plan.shape.lines(now)
        return True

    def counted(self, plan: Plan, parts: Parts, verdict: Verdict) -> None:
        """The store granted a claim. The second one within UNUSED_S is followed by leases, if all of its
        limits are large enough to lease what such a claim needs, and there are not several of a kind."""
        if not (plan.seen or (plan.leases is not None and plan.leases[0].ends_at)):
            plan.seen = True
            self._seen.append(plan)
            return
        for part in parts:
            if part.limit < SHARE * max(2, part.amount):
                return
        leases: list[Lease] = []
        for part, used in zip(parts, verdict.used, strict=True):
            lease = self._lease(part, verdict.now)
            # One of another limit, which was changed, goes back by `unused`.
            if lease is None or lease.limit != part.limit:
                return
            leases.append(lease)
            if lease.number != window(verdict.now, part.window_s):
                lease.begin(verdict.now)
            lease.free = lease.limit - used
            self._want(lease)
        if not plan.several:
            plan.leases = leases[0], leases[-1]
            plan.leased_until = 0.0

    def _lease(self, part: Part, now: float) -> Lease | None:
        lease = self._leases.get(part.key)
        if lease is None and len(self._leases) < MAX_LEASES:
            lease = self._leases[part.key] = Lease(part, now)
        return lease

    def wanted(self) -> list[Part]:
        """Claims for leases; each is answered by `answered`, or `lost`."""
        wanted, self._wanted = self._wanted, []
        parts = []
        for lease in wanted:
            lease.pending = lease.left < lease.size
            if lease.pending:
                limit = lease.limit - lease.limit // FREE
                parts.append(lease.part._replace(amount=lease.size - lease.left, limit=limit))
        return parts

    def answered(self, part: Part, verdict: Verdict) -> None:
        """The store's answer to a claim for a lease; a refused one is not asked for again in its window."""
        lease = self._leases[part.key]
        lease.pending, lease.refused = False, verdict.over >= 0
        if lease.refused:
            return
        if lease.number != window(verdict.now, part.window_s):
            lease.begin(verdict.now)
        lease.left += part.amount
        lease.free = lease.limit - verdict.used[0]

    def lost(self) -> None:
        """The store is away: nobody knows which leases it has counted."""
        for lease in self._leases.values():
            lease.end()
        self._leases.clear()
        self._wanted.clear()
        self._forget()

    def absorb(self, correction: Correction, now: float) -> int:
        """Take a correction into the lease of its count as far as it goes; what the store has to be told."""
        lease = self._leases.get(correction.key)
        if lease is None or lease.number != correction.number or now >= lease.ends_at:
            return correction.delta
        delta = correction.delta
        if delta > 0:
            taken = min(lease.left, delta)
        else:
            # What is asked for fills it.
            full = lease.pending or lease.refused
            taken = 0 if full else -min(lease.size - lease.left, -delta)
        lease.left -= taken
        return delta - taken

    def unused(self, now: float) -> list[Correction]:
        """To be asked every UNUSED_S: leases that were not used since go back; past ones are forgotten."""
        back = []
        self._forget()
        for key, lease in list(self._leases.items()):
            if lease.pending:
                continue
            if now >= lease.ends_at:
                lease.ends_at = 0.0
                del self._leases[key]
            elif lease.left and lease.left == lease.before:
                back.append(Correction(key, lease.part.window_s, lease.number, -lease.left))
                lease.free += lease.left
                lease.left = 0
            lease.before = lease.left
        return back

    def _forget(self) -> None:
        for plan in self._seen:
            plan.seen = False
        self._seen.clear()

    def _want(self, lease: Lease) -> None:
        if not (lease.pending or lease.refused):
            lease.pending = True
            self._wanted.append(lease)
