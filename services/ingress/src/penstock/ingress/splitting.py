"""What all exchanges of a process share of traffic splitting: routes, breakers, budget, the 429 queue."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Protocol

from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.live_config import ROUTE, Changed, LiveConfig
from penstock.common.routing_events import (
    BREAKER,
    FALLBACK,
    QUEUED,
    RETRY,
    ROUTED,
    BreakerEvent,
    FallbackEvent,
    QueuedEvent,
    RetryEvent,
    RouteEvent,
)
from penstock.common.telemetry import Metrics
from penstock.ingress.ejection import Breakers, Circuit, Limits
from penstock.ingress.retry_budget import RetryBudget
from penstock.ingress.retry_queue import RetryQueue
from penstock.ingress.route_config import RouteDocument, RouteFaults, document, warnings
from penstock.ingress.route_settings import RouteSettings
from penstock.ingress.routes import ProxyFor, Routes, build

log = logging.getLogger(__name__)

# Before the name of an external endpoint among the breakers; no instance is called so.
EXTERNAL = "endpoint "


def is_external(target: str) -> bool:
    """Whether a target of the breakers is an external endpoint, and no instance."""
    return target.startswith(EXTERNAL)


class Waiter(Protocol):
    """What waits in the 429 queue."""

    def resend(self) -> None:
        """Its time has come."""

    def broken(self) -> None:
        """A fault of this program met it."""


class Splitting:
    """Decides with the nouns, tells the log and the metrics."""

    def __init__(
        self,
        settings: RouteSettings,
        identity: Identity,
        events: EventWriter,
        metrics: Metrics,
        clock: Callable[[], float],
        proxy_for: ProxyFor,
    ) -> None:
        self.settings, self.clock, self.draw = settings, clock, random.random
        self._identity, self._events, self._proxy_for = identity, events, proxy_for
        self.routes: Routes | None = None
        self.origin = ""
        self.budget = RetryBudget(settings.retry_budget_percent, settings.retry_budget_min_per_second)
        self.breakers = Breakers(
            Limits(
                settings.breaker_failures,
                settings.breaker_error_percent,
                settings.breaker_min_requests,
                settings.breaker_open_time,
                settings.ejection_max_percent,
            ),
            self._breaker_changed,
        )
        self.queue: RetryQueue[Waiter] = RetryQueue(
            settings.fallback_retry_queue_size, settings.fallback_retry_worker_size
        )
        self._wake: asyncio.TimerHandle | None = None
        self._count(metrics)
        self.use_settings()

    def _count(self, metrics: Metrics) -> None:
        self._routed = metrics.counter(
            "penstock_ingress_routed_total",
            "Requests by the route they were given and why",
            "route",
            "reason",
        )
        self._retried = metrics.counter(
            "penstock_ingress_retries_total", "Retries at instances by what became of them", "result"
        )
        self._fallbacks = metrics.counter(
            "penstock_ingress_fallbacks_total", "Moves along the fallback chain", "route", "cause"
        )
        self._queued = metrics.counter(
            "penstock_ingress_retry_queue_total", "What became of 429 answers of fallbacks", "result"
        )
        self._queue_wait = metrics.histogram(
            "penstock_ingress_retry_queue_seconds", "Wait in the 429 queue for one further call"
        ).labels()
        self._changes = metrics.counter(
            "penstock_ingress_breaker_changes_total", "Changes of circuit breakers", "kind", "state"
        )
        self._configurations = metrics.counter(
            "penstock_ingress_route_configurations_total", "Live route configurations by result", "result"
        )
        metrics.gauge(
            "penstock_ingress_retry_queue_waiting",
            "Requests in the 429 queue",
            lambda: float(len(self.queue)),
        )
        metrics.gauge(
            "penstock_ingress_retry_queue_working",
            "Requests out of the 429 queue that are under way",
            lambda: float(self.queue.working),
        )
        metrics.gauge(
            "penstock_ingress_breakers_not_closed", "Targets left alone, or probed", self._tripped, "kind"
        )

    def _tripped(self) -> list[tuple[tuple[str, ...], float]]:
        external = sum(is_external(target) for target in self.breakers.tripped)
        inside = len(self.breakers.tripped) - external
        return [(("instance",), float(inside)), (("endpoint",), float(external))]

    # -- configuration -----------------------------------------------------------------------------

    def _use(self, given: RouteDocument | None, origin: str) -> None:
        self.routes, self.origin = build(given, self._proxy_for) if given else None, origin
        known = (
            {EXTERNAL + r.external.url for r in self.routes.entries if r.external} if self.routes else set()
        )
        self.breakers.forget(lambda target: is_external(target) and target not in known)
        for warning in warnings(given.routes if given else ()):
            log.warning("%s", warning)

    def use_settings(self) -> None:
        """The routes of flags and files."""
        given = self.settings.routes()
        self._use(given, "settings" if given else "")

    def follow(self, config: LiveConfig) -> Callable[[Changed], None]:
        """What to call with changes of the live configuration: its routes win until they are deleted."""

        def changed(changes: Changed) -> None:
            if any(kind == ROUTE for kind, _ in changes):
                self._apply(config)

        return changed

    def _apply(self, config: LiveConfig) -> None:
        live = config.get(ROUTE)
        if live is None:
            self.use_settings()
            log.info("routes", extra={"fields": {"origin": self.origin or "none"}})
            return
        try:
            routes = document(live.value)
        except RouteFaults as exc:
            # Somebody else than the admin API wrote it; what was in force stays.
            self._configurations.inc("refused")
            fields = {"version": live.version, "faults": exc.faults[:10]}
            log.error("live routes are not valid, the last good ones stay", extra={"fields": fields})
            return
        self._configurations.inc("applied")
        self._use(routes, f"live version {live.version}")
        fields = {"origin": self.origin, "routes": len(routes.routes)}
        log.info("routes", extra={"fields": fields})

    # -- the 429 queue -----------------------------------------------------------------------------

    def enter(self, waiter: Waiter, wait_s: float) -> bool:
        """Have `waiter` sent again after `wait_s`; False if the queue is full."""
        entered = self.queue.enter(waiter, self.clock() + wait_s)
        if entered:
            self._arm()
        return entered

    def leave(self, waiter: Waiter) -> None:
        """It waits no longer, or its call is over: somebody else may go."""
        self.queue.leave(waiter)
        self._arm(at_once=bool(len(self.queue)))

    def _arm(self, *, at_once: bool = False) -> None:
        due = self.queue.next_due()
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        if at_once or due is not None:
            wait_s = 0.0 if at_once or due is None else max(0.0, due - self.clock())
            self._wake = asyncio.get_running_loop().call_later(wait_s, self._pump)

    def _pump(self) -> None:
        self._wake = None
        for waiter in self.queue.take(self.clock()):
            try:
                waiter.resend()
            except Exception:
                log.exception("sending a request again failed")
                waiter.broken()
        self._arm()

    # -- the log -----------------------------------------------------------------------------------

    def say_routed(self, request_id: str, model: str, route: str, reason: str) -> None:
        """A request was given a route."""
        self._routed.inc(route, reason)
        event = RouteEvent(request_id, model, route, reason, self._identity.id)
        self._events.emit(ROUTED, model, request_id, event)

    def say_retry(self, event: RetryEvent) -> None:
        """A request goes to another instance, or is not allowed to by the budget."""
        self._retried.inc(event.result)
        self._events.emit(RETRY, event.model, event.request_id, event)

    def say_fallback(self, request_id: str, model: str, route: str, cause: str, text: str) -> None:
        """A request goes on to a fallback, or passes it over."""
        self._fallbacks.inc(route, cause)
        event = FallbackEvent(request_id, model, route, cause, self._identity.id, text)
        self._events.emit(FALLBACK, model, request_id, event)

    def say_queued(self, request_id: str, model: str, route: str, result: str, waited_s: float) -> None:
        """A request came out of the 429 queue, or did not get in."""
        self._queued.inc(result)
        if result == "sent":
            self._queue_wait.observe(waited_s)
        waited_ms = round(waited_s * 1000, 3)
        event = QueuedEvent(request_id, model, route, result, self._identity.id, waited_ms)
        self._events.emit(QUEUED, model, request_id, event)

    def _breaker_changed(self, target: str, state: Circuit) -> None:
        kind = "endpoint" if is_external(target) else "instance"
        name = target.removeprefix(EXTERNAL)
        self._changes.inc(kind, state.value)
        log.warning("circuit breaker", extra={"fields": {"kind": kind, "target": name, "state": state.value}})
        event = BreakerEvent(kind, name, state.value, self._identity.id)
        self._events.emit(BREAKER, "", name, event)
