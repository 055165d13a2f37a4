"""Leases: small parts of limits that the store has counted already, for this process to grant by itself.

A lease is at most a hundredth of a limit, and taken only while more than a tenth of it remains: what other
processes cannot have because this one holds it is small, and nobody holds any where it gets tight. As the
store has counted it, no limit is ever passed.
"""

from __future__ import annotations

from collections.abc import Sequence

from penstock.ingress.limits import Correction, Part, Verdict, window

# A lease is at most one part in so many of its limit, and leaves at least one part in so many free.
SHARE, FREE = 100, 10
# One that was not used for so long goes back.
UNUSED_S = 1.0
MAX_LEASES = 10_000


class _Lease:
    """`left` of it, and what the store had `counted` when it was last asked, all of the lease included."""

    __slots__ = (
        "counted",
        "ends_at",
        "left",
        "limit",
        "number",
        "part",
        "pending",
        "refused",
        "size",
        "used_at",
    )

    def __init__(self, part: Part, now: float) -> None:
        self.part, self.limit = part, part.limit
        self.number = window(now, part.window_s)
        self.ends_at = (self.number + 1) * part.window_s
        self.size, self.left, self.counted, self.used_at = part.limit // SHARE, 0, 0, now
        self.pending = self.refused = False

    @property
    def begins_at(self) -> int:
        return self.number * self.part.window_s


class Leases:
    """The leases of one process. Moments are those of the store's clock."""

    def __init__(self) -> None:
        self._leases: dict[str, _Lease] = {}
        self._wanted: list[_Lease] = []

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def wanting(self) -> bool:
        """Whether `wanted` has something to ask for."""
        return bool(self._wanted)

    def grant(self, parts: Sequence[Part], now: float) -> Verdict | None:
        """Take a claim out of leases, whole; None: the store has to be asked."""
        leases = []
        for part in parts:
            lease = self._leases.get(part.key)
            if (
                lease is None
                or lease.left < part.amount
                or now >= lease.ends_at
                or now < lease.begins_at
                or lease.limit != part.limit
            ):
                return None
            leases.append(lease)
        used = []
        for lease, part in zip(leases, parts, strict=True):
            lease.left -= part.amount
            lease.used_at = now
            used.append(lease.counted - lease.left)
            if 2 * lease.left < lease.size:
                self._want(lease)
        return Verdict(-1, tuple(used), now)

    def counted(self, parts: Sequence[Part], verdict: Verdict) -> None:
        """The store granted a claim. The second one of a window is followed by leases, if all of its limits
        are large enough to lease what such a claim needs."""
        if any(part.limit < SHARE * max(2, part.amount) for part in parts):
            return
        for part, used in zip(parts, verdict.used, strict=True):
            lease = self._leases.get(part.key)
            if lease is None or lease.number != window(verdict.now, part.window_s):
                if lease is not None or len(self._leases) < MAX_LEASES:
                    self._leases[part.key] = lease = _Lease(part, verdict.now)
                    lease.counted = used
                continue
            if lease.limit != part.limit:
                # What is left of it was counted by another limit, and goes back by `unused`.
                continue
            lease.counted = used
            self._want(lease)

    def wanted(self) -> list[Part]:
        """Claims for leases; each is answered by `answered`, or `lost`."""
        wanted, self._wanted = self._wanted, []
        for lease in wanted:
            lease.pending = lease.left < lease.size
        return [
            lease.part._replace(amount=lease.size - lease.left, limit=lease.limit - lease.limit // FREE)
            for lease in wanted
            if lease.pending
        ]

    def answered(self, part: Part, verdict: Verdict) -> None:
        """The store's answer to a claim for a lease; a refused one is not asked for again in its window."""
        lease = self._leases[part.key]
        lease.pending, lease.refused = False, verdict.over >= 0
        if lease.refused:
            return
        if lease.number != window(verdict.now, part.window_s):
            self._leases[part.key] = lease = _Lease(lease.part, verdict.now)
        lease.left += part.amount
        lease.counted = verdict.used[0]

    def lost(self) -> None:
        """The store is away: nobody knows which leases it has counted."""
        self._leases.clear()
        self._wanted.clear()

    def absorb(self, correction: Correction, now: float) -> int:
        """Take a correction into the lease of its count as far as it goes; what the store has to be told."""
        key, _, number, delta = correction
        lease = self._leases.get(key)
        if lease is None or lease.number != number or now >= lease.ends_at:
            return delta
        if delta > 0:
            taken = min(lease.left, delta)
        else:
            # What is asked for fills it.
            full = lease.pending or lease.refused
            taken = 0 if full else -min(lease.size - lease.left, -delta)
        lease.left -= taken
        return delta - taken

    def unused(self, now: float) -> list[Correction]:
        """Leases that go back; past ones are forgotten."""
        back = []
        for key, lease in list(self._leases.items()):
            if lease.pending:
                continue
            if now >= lease.ends_at:
                del self._leases[key]
            elif lease.left and now - lease.used_at >= UNUSED_S:
                back.append(Correction(key, lease.part.window_s, lease.number, -lease.left))
                lease.counted -= lease.left
                lease.left = 0
        return back

    def _want(self, lease: _Lease) -> None:
        if not (lease.pending or lease.refused):
            lease.pending = True
            self._wanted.append(lease)
