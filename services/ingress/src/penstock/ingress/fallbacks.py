"""One request at external endpoints: its route's, then the fallback chain's in order, each after a wait if
it answers 429 and the queue is on."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from penstock.ingress.attempt import Attempt
from penstock.ingress.backoff import delay_s, retry_after_s
from penstock.ingress.failures import GatewayError
from penstock.ingress.in_flight import Work
from penstock.ingress.kept import Kept
from penstock.ingress.openai import with_model
from penstock.ingress.routes import Route
from penstock.ingress.splitting import EXTERNAL

if TYPE_CHECKING:
    from penstock.ingress.exchange import Exchange
    from penstock.ingress.gateway import Gateway

TOO_MANY = 429


class Fallbacks:
    """Each member is asked once, and after a 429 again as often as the settings say."""

    def __init__(self, gateway: Gateway, exchange: Exchange, chain: tuple[Route, ...]) -> None:
        self._gateway, self._exchange, self._splitting = gateway, exchange, gateway.splitting
        self._left = list(chain)
        # The route in hand; None before the first.
        self.route: Route | None = None
        self.moves = self.resends = 0
        self._is_member = False
        self._resent = 0
        self._queued_at = self._until = 0.0

    @property
    def name(self) -> str:
        """Of the route in hand."""
        return self.route.name if self.route is not None else ""

    @property
    def any_left(self) -> bool:
        """Whether there is a further member."""
        return bool(self._left)

    @property
    def may_queue(self) -> bool:
        """Whether the member in hand may be asked again after a 429."""
        settings = self._splitting.settings
        most = settings.fallback_retry_max_count
        return self._is_member and settings.fallback_retry_queue_enabled and (most < 0 or self._resent < most)

    def begin(self, route: Route) -> bool:
        """Ask the endpoint of the request's own route; False if its breaker is open. The chain then passes
        over endpoints with the same URL."""
        external = route.external
        if external is not None:
            self._left = [r for r in self._left if r.external is not None and r.external.url != external.url]
        self.route = route
        return self._attempt(route)

    def next(self, cause: str) -> bool:
        """Ask the next member that may be asked; False if there is none. `cause`: why, for the log."""
        exchange, splitting = self._exchange, self._splitting
        while self._left:
            self.route = self._left.pop(0)
            self._is_member, self._resent = True, 0
            splitting.say_fallback(
                exchange.request_id, exchange.request.model, self.name, cause, exchange.error
            )
            if self._attempt(self.route):
                self.moves += 1
                return True
            cause = "breaker_open"
        return False

    def again(self) -> None:
        """Ask the route in hand once more, at once: it has not seen the request."""
        if self.route is not None:
            self._send(self.route)

    def _attempt(self, route: Route) -> bool:
        external = route.external
        if external is None or not self._splitting.breakers.allows(
            EXTERNAL + external.url, self._gateway.clock()
        ):
            self._exchange.error = f"{route.name}: it failed too often lately and is left alone"
            return False
        try:
            self._send(route)
        except GatewayError as exc:
            # Its model cannot be put into this body; others may take it as it is.
            self._exchange.error = f"{route.name}: {exc.message}"
            return False
        return True

    def _send(self, route: Route) -> None:
        exchange, gateway, external = self._exchange, self._gateway, route.external
        if external is None:
            return
        body = (
            with_model(exchange.head.path, exchange.body, route.rewrite) if route.rewrite else exchange.body
        )
        now, target = gateway.clock(), EXTERNAL + external.url
        self._splitting.breakers.sent(target, now)
        if exchange.trace is not None:
            exchange.trace.goes_outside(exchange)
        head = external.request_head(exchange.head, exchange.request_id, len(body))
        exchange.deadline = now + gateway.settings.request_timeout
        attempt = Attempt(gateway, exchange, None, target, Work("", "", 0), head, body)
        exchange.attempting(attempt)
        gateway.externals.acquire(external, attempt)

    # -- the 429 queue -----------------------------------------------------------------------------

    def queue_up(self, kept: Kept, now: datetime) -> bool:
        """Wait to ask the member in hand again after its 429; False if that may not be. `now`: the wall
        clock, for a Retry-After that is a date."""
        splitting, settings = self._splitting, self._splitting.settings
        if not self.may_queue:
            if self._resent:
                self._say("exhausted")
            return False
        first_s, most_s = settings.fallback_retry_init_delay_ms, settings.fallback_retry_max_delay_ms
        wait_s = delay_s(self._resent, first_s / 1000, most_s / 1000, splitting.draw())
        wait_s = max(wait_s, retry_after_s(kept.head.block, now))
        self._queued_at = self._gateway.clock()
        if not self._resent:
            self._until = self._queued_at + self._gateway.settings.request_timeout
        if self._queued_at + wait_s >= self._until:
            self._say("too_long")
            return False
        if not splitting.enter(self, wait_s):
            self._say("full")
            return False
        self._say("entered")
        self._exchange.wait_in_queue(self._until)
        return True

    def resend(self) -> None:
        """Its time has come and a worker is free (`penstock.ingress.splitting.Waiter`)."""
        self._resent += 1
        self.resends += 1
        self._say("sent", self._gateway.clock() - self._queued_at)
        self.again()

    def broken(self) -> None:
        """A fault of this program met it: it costs this request."""
        self._exchange.broken()

    def leave_queue(self, result: str = "") -> None:
        """Wait no longer, or let another one go: the call is over. `result`: for the log."""
        if self._queued_at:
            self._splitting.leave(self)
        if result:
            self._say(result)

    @property
    def resent(self) -> bool:
        """Whether the call under way is out of the queue."""
        return self._resent > 0

    def _say(self, result: str, waited_s: float = 0.0) -> None:
        exchange = self._exchange
        self._splitting.say_queued(exchange.request_id, exchange.request.model, self.name, result, waited_s)
