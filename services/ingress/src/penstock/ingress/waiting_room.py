"""Requests that wait until an instance has room: who is asked for again, when, and who is sent away.

A slot that becomes free here wakes one request. Slots that become free elsewhere are not announced: of each
line one request asks every PROBE_EVERY_S, and as long as that succeeds the next one asks at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Protocol

from penstock.common.messages import ScheduleRequest, Stage
from penstock.common.model import Instance, InstanceId
from penstock.common.telemetry import Metrics
from penstock.ingress.failures import GatewayError
from penstock.ingress.gateway import Gateway
from penstock.ingress.waiting import Line, Lines, Ticket
from penstock.ingress.wishes import MAX_PRIORITY

if TYPE_CHECKING:
    from penstock.ingress.exchange import Exchange

log = logging.getLogger(__name__)

# How late capacity is noticed that became free at another ingress, in seconds: as rarely does each line ask
# without a reason. No shorter than the service's sweep.
PROBE_EVERY_S: Final = 0.1
# Models with a gauge of their own; the requests of further ones are summed up.
SHOWN_MODELS: Final = 100
OTHER: Final = "other"
TOO_MANY, TOO_LATE = 429, 503


class Counts(Protocol):
    """Numbers of all workers of an ingress."""

    def own(self, count: int) -> None:
        """Set this process's number."""

    def total(self) -> int:
        """The sum over all processes."""


class WaitingRoom:
    """One process's lines. Each request in it holds a `ticket`, and leaves through `leave`."""

    def __init__(self, gateway: Gateway, counts: Counts, metrics: Metrics) -> None:
        self._gateway, self._counts = gateway, counts
        self._lines: Lines[Exchange] = Lines()
        self._woken: list[Ticket[Exchange]] = []
        # Those of them that ask without knowing of a free slot: if one gets an instance, the next one asks.
        self._probing: set[Ticket[Exchange]] = set()
        # Where a slot became free while one of these asked: who gets it is decided once that one is answered.
        self._early: dict[Ticket[Exchange], InstanceId] = {}
        self._next_probe = 0.0
        # Sends what changed in flight: a slot that a scheduler has not heard of is not free to it.
        self.tell_schedulers: Callable[[], None] = lambda: None
        self._seconds = metrics.histogram(
            "penstock_ingress_waiting_seconds", "Time that placed requests had to wait for capacity"
        ).labels()
        self._ended = metrics.counter(
            "penstock_ingress_waiting_total",
            "Requests that found no capacity, by what became of them",
            "result",
        )
        metrics.gauge("penstock_ingress_waiting", "Requests that wait for capacity", self._by_model, "model")

    @property
    def busy(self) -> bool:
        """Whether anybody waits."""
        return self._lines.count > 0

    def queued(self, exchange: Exchange) -> bool:
        """Whether it has to wait, because others do who could take the same instances."""
        if self._lines.find(_key(exchange.request)) is None:
            return False
        self._join(exchange)
        return True

    def hold(self, exchange: Exchange) -> None:
        """Every instance is at its limit: wait, in the old place if there is one, or be sent away."""
        ticket = exchange.ticket
        if ticket is None:
            self._join(exchange)
        else:
            self._probing.discard(ticket)
            ticket.line.back(ticket)
            freed = self._early.pop(ticket, None)
            if freed is not None:
                self._freed(freed)

    def leave(self, exchange: Exchange, *, placed: bool = False) -> None:
        """It waits no more: it has an instance, or has ended. More than once is once."""
        ticket, exchange.ticket = exchange.ticket, None
        if ticket is None:
            return
        now = self._gateway.clock()
        waited_s = now - ticket.since
        exchange.waited_ms += int(waited_s * 1e6) / 1000
        asking, probing = ticket.asking, ticket in self._probing
        self._probing.discard(ticket)
        freed = self._early.pop(ticket, None)
        self._lines.leave(ticket, now if placed else None)
        self._counted()
        if placed:
            self._seconds.observe(waited_s)
            self._ended.inc("placed")
        elif not asking:
            # A scheduler may have reserved something in an answer that came too late.
            self._gateway.account.finish(exchange.request.decision_id)
        # Room for one may be room for more; and where it is not room that was missing, nobody has to wait.
        if probing or (asking and not placed):
            self._wake(ticket.line.first(), probe=True)
        if freed is not None:
            self._freed(freed)

    def fleet_changed(self) -> None:
        """An instance came, left or recovered."""
        for line in self._lines:
            self._wake(line.first(), probe=True)

    def sweep(self, now: float) -> None:
        """Send away whose time is over; ask whether there is room."""
        if not self._lines.count:
            return
        for ticket in self._lines.overdue(now):
            self._ended.inc("timeout")
            waited_s = now - ticket.since
            self._refuse(ticket, TOO_LATE, f"no instance had room for it within {waited_s:.1f} s")
        if now >= self._next_probe:
            self._next_probe = now + PROBE_EVERY_S
            for line in self._lines:
                self._wake(line.first(), probe=True)

    def _freed(self, instance_id: InstanceId) -> None:
        """A slot is free here: one request may have it."""
        instance = self._gateway.table.get(instance_id)
        if instance is None:
            return
        for ticket in self._probing:
            if _may_use(instance, ticket.line):
                # It was first, and may have asked too early: nobody behind it is woken in its stead.
                self._early[ticket] = instance_id
                return
        self._wake(self._lines.first(lambda line: _may_use(instance, line)))

    def _wake(self, ticket: Ticket[Exchange] | None, *, probe: bool = False) -> None:
        """Ask for it in a later turn of the loop: where a slot becomes free, its own affairs come first."""
        if ticket is None:
            return
        ticket.line.ask(ticket)
        if probe:
            self._probing.add(ticket)
        self._woken.append(ticket)
        if len(self._woken) == 1:
            asyncio.get_running_loop().call_soon(self._ask)

    def _ask(self) -> None:
        woken, self._woken = self._woken, []
        try:
            self.tell_schedulers()
        finally:
            for ticket in woken:
                if ticket.holder.ticket is ticket:
                    self._gateway.placer.submit(ticket.holder)

    def _join(self, exchange: Exchange) -> None:
        """Stand in line, or be sent away because it is full."""
        request, settings = exchange.request, self._gateway.settings
        line = self._lines.open(_key(request), request.model, request.owner)
        if self._counts.total() >= settings.waiting_limit:
            last = self._lines.to_displace(line, _rank(request), request.user)
            text = f"{settings.waiting_limit} requests wait for capacity already"
            if last is None:
                self._ended.inc("full")
                exchange.refused(_overloaded(TOO_MANY, text, line.retry_after_s()))
                return
            self._ended.inc("displaced")
            self._refuse(last, TOO_MANY, text)
        now = self._gateway.clock()
        exchange.ticket = self._lines.join(
            line,
            exchange,
            priority=_rank(request),
            user=request.user,
            since=now,
            until=min(now + settings.waiting_timeout, exchange.deadline),
        )
        self._counted()

    def _refuse(self, ticket: Ticket[Exchange], status: int, text: str) -> None:
        """A fault of ours costs the request that met it, not the loop."""
        try:
            ticket.holder.refused(_overloaded(status, text, ticket.line.retry_after_s()))
        except Exception:
            log.exception("ending a request failed")
            ticket.holder.broken()

    def _counted(self) -> None:
        self._counts.own(self._lines.count)
        self._gateway.account.on_free = self._freed if self._lines.count else None

    def _by_model(self) -> Iterable[tuple[tuple[str, ...], float]]:
        sums: dict[str, int] = {}
        for line in self._lines:
            model = line.model if line.model in sums or len(sums) < SHOWN_MODELS else OTHER
            sums[model] = sums.get(model, 0) + len(line)
        return [((model,), float(count)) for model, count in sums.items()] or [(("",), 0.0)]


def _may_use(instance: Instance, line: Line[Exchange]) -> bool:
    return instance.serves(line.model) and line.owner in ("", instance.owned_by(line.model))


def _key(request: ScheduleRequest) -> tuple[object, ...]:
    """Requests with the same one have the same candidates."""
    # A prompt that is computed must not wait behind those to compute.
    stage = request.mode, request.stage, request.prefill_group
    return request.model, request.owner, request.profile, stage, request.excluded


def _rank(request: ScheduleRequest) -> int:
    """Its priority; what prefill has computed goes before every prompt that is to compute, since it takes
    room at prefill until it is fetched."""
    return request.priority + (2 * MAX_PRIORITY + 1 if request.stage is Stage.DECODE else 0)


def _overloaded(status: int, text: str, retry_after_s: float) -> GatewayError:
    return GatewayError("overloaded", text, status=status, retry_after_s=retry_after_s)
