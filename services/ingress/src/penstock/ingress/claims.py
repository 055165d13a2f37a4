"""A request's claim at a store of limits, and its placement, which is asked for at the same time.

An instance is found while the store counts, so that nobody waits for one after the other. Nothing is sent
to it before the claim is granted, and what is refused or missing there is told only then: who is over a limit
hears of that first. A refusal gives the placement back.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from penstock.common.messages import Placement, Rejection
from penstock.common.model import Instance
from penstock.ingress.failures import GatewayError
from penstock.ingress.large_bodies import Facts
from penstock.ingress.limits import Counts, Verdict
from penstock.ingress.outcomes import Outcome
from penstock.ingress.plans import Asked, Plan
from penstock.ingress.request_body import InferenceRequest

if TYPE_CHECKING:
    from penstock.ingress.exchange import Exchange
    from penstock.ingress.limiter import Limiter

log = logging.getLogger(__name__)


class Claim(Asked):
    """Held by its request from the beginning; `pending` until the store has answered."""

    __slots__ = ("_exchange", "_found", "_inference", "_instance", "_limiter", "_went")

    def __init__(
        self,
        limiter: Limiter,
        exchange: Exchange,
        inference: InferenceRequest | Facts,
        plan: Plan,
        tokens: int,
        counts: Counts,
    ) -> None:
        """`counts` are the store's."""
        super().__init__(plan, tokens, counts)
        self.pending = True
        self._limiter, self._inference = limiter, inference
        # It knows this claim: the cycle ends with the store's answer.
        self._exchange: Exchange | None = exchange
        self._went = False
        # What asking for a placement came to, and the instance, which is in the account meanwhile.
        self._found: Placement | Rejection | GatewayError | None = None
        self._instance: Instance | None = None

    def go_beside(self, exchange: Exchange) -> None:
        """Have its request placed meanwhile."""
        self._went = True
        try:
            exchange.go(self._inference)
        except GatewayError as exc:
            self._found = exc

    def find(self, found: Placement | Rejection, instance: Instance | None) -> None:
        """As of `Held`."""
        self._found, self._instance = found, instance
        if self._exchange is not None:
            self._exchange.found(found, instance)

    def leave(self) -> None:
        """As of `Held`."""
        if self._exchange is not None:
            self._withdraw(self._exchange)

    def _withdraw(self, exchange: Exchange) -> None:
        if self._instance is not None:
            self._instance = None
            exchange.withdraw()

    def answered(self, verdict: Verdict | None) -> None:
        """The store's verdict, None if it is away. A fault of ours costs the request that met it, not the
        others."""
        exchange, self._exchange, self.pending = self._exchange, None, False
        if exchange is None:
            return
        if not exchange.waiting:
            # It ended meanwhile: what was held for it goes back.
            if verdict is not None and verdict.over < 0:
                self.now = verdict.now
                self.settle(0)
            return
        try:
            self._limiter.decided(self, exchange, self._inference, verdict)
            self._go_on(exchange)
        except GatewayError as exc:
            self._withdraw(exchange)
            exchange.fail(exc, Outcome.REJECTED)
        except Exception:
            log.exception("claiming a limit failed")
            self._withdraw(exchange)
            exchange.broken()

    def _go_on(self, exchange: Exchange) -> None:
        found, instance = self._found, self._instance
        self._found = self._instance = None
        if not self._went:
            exchange.go(self._inference)
        elif isinstance(found, GatewayError):
            raise found
        elif isinstance(found, Rejection):
            exchange.rejected(found)
        elif found is not None and instance is not None:
            exchange.placed(found, instance)
