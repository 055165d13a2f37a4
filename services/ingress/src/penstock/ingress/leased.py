"""What a request holds of leases. Apart from them: machine code has no classes of msgspec."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from penstock.ingress.limits import MINUTE_S, Correction
from penstock.ingress.plans import Plan


class Leased(msgspec.Struct, gc=False):
    """A claim granted by leases; fulfils `penstock.ingress.limits.Held`.

    `minute` numbers its window; `correct` tells the store.
    """

    correct: Callable[[Sequence[Correction]], None]
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
            self.correct([Correction(lease.part.key, MINUTE_S, self.minute, delta)])
