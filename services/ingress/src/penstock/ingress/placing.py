"""Where requests get their instance: from a scheduler over the bus, or, in need, from this ingress.

All requests of one loop tick share a message. An attempt waits `--schedule-timeout`, a second one with
the same decision ids may follow, then the request is placed locally (`penstock.ingress.local_placing`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from penstock.common.bus import Bus
from penstock.common.errors import BusError, BusTimeout, MessageTooLarge
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.instances import InstanceTable
from penstock.common.messages import (
    MAX_BATCH,
    Placement,
    ScheduleBatch,
    ScheduleReply,
    TraceMark,
)
from penstock.common.routing_events import (
    ADMITTED,
    Admission,
    AdmittedEvent,
)
from penstock.common.subjects import DEFAULT_SHARD, SCHEDULE, SCHEDULE_BY
from penstock.common.telemetry import FAST_SECONDS_BUCKETS, Metrics
from penstock.ingress.askers import Asker
from penstock.ingress.breaker import BusBreaker
from penstock.ingress.in_flight import InFlightAccount
from penstock.ingress.local_pairs import LOCAL
from penstock.ingress.local_placing import LocalPlacer
from penstock.ingress.replicas import ANY, Replicas

if TYPE_CHECKING:
    from penstock.common.messages import Rejection

log = logging.getLogger(__name__)

# Attempts that may go unanswered before the request is placed here.
MAX_ATTEMPTS: Final = 2
# With as many requests at each scheduler, further ones share the message that follows its next answer: a
# message costs ingress, bus and scheduler more than a request in it does. One that does not answer in this
# part of an attempt keeps them no longer.
ENOUGH_ASKED: Final = 8
GATHERING: Final = 0.1


class _Batch:
    """Requests of one schedule message and its attempts so far; `left`: the replica asked was not there."""

    __slots__ = ("asked_at", "askers", "left", "replica", "silences")

    def __init__(self, askers: list[Asker]) -> None:
        self.askers = askers
        self.asked_at, self.replica, self.silences, self.left = 0.0, ANY, 0, False


class Placer:
    """Gathers the askers of a tick and finds each an instance."""

    def __init__(
        self,
        bus: Bus,
        table: InstanceTable,
        account: InFlightAccount,
        events: EventWriter,
        identity: Identity,
        metrics: Metrics,
        attempt_s: float,
        max_requests: int = 0,
    ) -> None:
        """`max_requests`: of this process on one instance that has no such label; 0: any number."""
        self._bus, self._table, self._account, self._events = bus, table, account, events
        self._identity, self._attempt_s = identity, attempt_s
        self._pending: list[Asker] = []
        # Requests whose attempt has no answer yet, and what ends the wait of those that are to follow.
        self._asked = 0
        self._gathering: asyncio.TimerHandle | None = None
        self._breaker = BusBreaker()
        self.replicas = Replicas()
        # Which of the askers are traced, while any may be.
        self.marks: Callable[[Sequence[Asker]], tuple[TraceMark, ...]] | None = None
        self._degraded = self._avoiding = False
        attempts = metrics.counter(
            "penstock_ingress_schedule_attempts_total", "Schedule messages by what became of them", "result"
        )
        self._answered, self._timed_out, self._unavailable = (
            attempts.labels(result) for result in ("answered", "timeout", "unavailable")
        )
        placements = metrics.counter("penstock_ingress_placements_total", "Placements by who made them", "by")
        self._by_scheduler = placements.labels("scheduler")
        self._local = LocalPlacer(table, account, events, identity, placements.labels(LOCAL), max_requests)
        self.profiles = self._local.profiles
        self._round_trip = metrics.histogram(
            "penstock_ingress_schedule_seconds",
            "Round trip of an answered schedule message",
            bounds=FAST_SECONDS_BUCKETS,
        ).labels()
        metrics.gauge(
            "penstock_ingress_schedulers",
            "Scheduler replicas heard of",
            lambda: len(self.replicas),
            over="max",
        )
        metrics.gauge(
            "penstock_ingress_placing_locally",
            "1 while schedulers cannot be reached",
            lambda: float(self._degraded),
            over="max",
        )

    def submit(self, asker: Asker) -> None:
        """Place `asker`; its answer comes in a later tick."""
        self._pending.append(asker)
        count = len(self._pending)
        if count == 1:
            loop = asyncio.get_running_loop()
            if self._enough_asked():
                self._gathering = loop.call_later(self._attempt_s * GATHERING, self._flush)
            else:
                loop.call_soon(self._flush)
        elif count == MAX_BATCH:
            self._end_gathering()

    def _enough_asked(self) -> bool:
        return self._asked >= ENOUGH_ASKED * max(1, len(self.replicas))

    def _end_gathering(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._gathering = None
        pending, self._pending = self._pending, []
        for start in range(0, len(pending), MAX_BATCH):
            askers = [asker for asker in pending[start : start + MAX_BATCH] if asker.waiting]
            if not askers:
                continue
            self.admit(askers)
            connected = self._bus.connected
            if connected and self._breaker.may_ask(time.monotonic()):
                self._guarded(_Batch(askers), self._ask)
            else:
                cause = "schedulers do not answer" if connected else "no bus"
                self._locally(askers, cause, certain=not connected)

    def admit(self, askers: Sequence[Asker]) -> None:
        """Where there is a spool: have on disk whom a decision is asked for, before it is."""
        if self._events.spools:
            requests = [
                Admission(
                    asker.request.decision_id,
                    asker.request.request_id,
                    asker.request.model,
                    asker.decisions[-2] if len(asker.decisions) > 1 else "",
                )
                for asker in askers
            ]
            self._events.emit(ADMITTED, "", self._identity.id, AdmittedEvent(self._identity.id, requests))
            self._events.settle()

    def _guarded(self, batch: _Batch, step: Callable[[_Batch], None]) -> None:
        """A fault of ours ends the requests of the batch instead of leaving them waiting."""
        try:
            step(batch)
        except Exception:
            log.exception("placing requests failed")
            for asker in batch.askers:
                if asker.waiting:
                    self._break(asker)

    def _break(self, asker: Asker) -> None:
        """A fault of ours costs the request that met it, none of those that came with it."""
        try:
            asker.broken()
        except Exception:
            log.exception("ending a request failed")

    def _ask(self, batch: _Batch) -> None:
        """One attempt. No task: at a dozen requests in a batch, one costs each of them 2 us."""
        batch.asked_at = time.monotonic()
        batch.replica = ANY if batch.left else self.replicas.pick(batch.asked_at)
        service, tokens = (SCHEDULE, ()) if batch.replica == ANY else (SCHEDULE_BY, (batch.replica,))
        message = ScheduleBatch(
            self._identity.id,
            self._identity.incarnation,
            self._attempt_s * 1000,
            tuple(asker.request for asker in batch.askers),
            self.marks(batch.askers) if self.marks is not None else (),
        )

        count = len(batch.askers)

        def settled(result: ScheduleReply | BusError) -> None:
            self._asked -= count
            self._guarded(batch, lambda batch: self._settle(batch, result))
            if not self._enough_asked():
                self._end_gathering()

        self._asked += count
        try:
            self._bus.call(
                service, message, DEFAULT_SHARD, *tokens, deadline_s=self._attempt_s, settled=settled
            )
        except Exception as exc:
            self._asked -= count
            if not isinstance(exc, MessageTooLarge):
                raise
            self._split(batch, exc)

    def _split(self, batch: _Batch, cause: MessageTooLarge) -> None:
        """Many clients with long headers in one tick; one request alone is far below the bound."""
        half = len(batch.askers) // 2
        if not half:
            self._locally(batch.askers, str(cause), certain=False)
            return
        for askers in (batch.askers[:half], batch.askers[half:]):
            self._guarded(_Batch(askers), self._ask)

    def _settle(self, batch: _Batch, result: ScheduleReply | BusError) -> None:
        """What became of an attempt: delivered, tried again, or placed here."""
        now = time.monotonic()
        if isinstance(result, ScheduleReply):
            self._answered.value += 1
            self._round_trip.observe(now - batch.asked_at)
            self._breaker.answered()
            self._degrade(False)
            if self._avoiding and not self.replicas.suspects(now):
                self._avoid(False)
            self._deliver(batch.askers, result)
        elif isinstance(result, BusTimeout):
            self._timed_out.value += 1
            self.replicas.silent(batch.replica, now)
            if batch.replica != ANY:
                self._avoid(True, str(result))
            batch.silences += 1
            if self._breaker.failed(now) or self._breaker.open or batch.silences >= MAX_ATTEMPTS:
                self._locally(batch.askers, str(result), certain=False)
            else:
                self._ask(batch)
        else:
            self._unavailable.value += 1
            if batch.replica != ANY:
                # It left between two heartbeats, or never was: whoever is in the queue group is there.
                self.replicas.gone(batch.replica)
                batch.left = True
                self._ask(batch)
                return
            self._breaker.failed(now)
            self._locally(batch.askers, str(result), certain=True)

    def _deliver(self, askers: list[Asker], reply: ScheduleReply) -> None:
        outcomes: Sequence[Placement | Rejection | None] = reply.outcomes
        asked = [asker.request.decision_id for asker in askers]
        if [outcome.decision_id for outcome in reply.outcomes] != asked:
            by_id = {outcome.decision_id: outcome for outcome in reply.outcomes}
            outcomes = [by_id.get(decision_id) for decision_id in asked]
        unserved: list[Asker] = []
        for asker, outcome in zip(askers, outcomes, strict=True):
            try:
                if not asker.waiting:
                    # Its client left in the meantime: what the scheduler reserved is given back.
                    self._local.release(asker.request)
                # In this order: to ask of an object of another class costs 0.1 us.
                elif isinstance(outcome, Placement):
                    instance = self._table.get(outcome.instance)
                    if instance is None or (
                        outcome.prefill_instance and self._table.get(outcome.prefill_instance) is None
                    ):
                        # An instance this ingress never heard of: its own table decides.
                        unserved.append(asker)
                    else:
                        self._by_scheduler.value += 1
                        asker.placed(outcome, instance)
                elif outcome is None:
                    unserved.append(asker)
                else:
                    asker.rejected(outcome)
            except Exception:
                log.exception("placing a request failed")
                self._break(asker)
        if unserved:
            self._locally(unserved, "", certain=False)

    def _locally(self, askers: list[Asker], cause: str, *, certain: bool) -> None:
        """`certain`: there is no bus or no scheduler. An unanswered message alone may be a hiccup."""
        if certain or self._breaker.open:
            self._degrade(True, cause)
        for asker in askers:
            try:
                self._local.place(asker)
            except Exception:
                log.exception("placing a request failed")
                self._break(asker)
        self._events.settle()

    def _degrade(self, active: bool, cause: str = "") -> None:
        """Say once that schedulers are worked around, and once that they are back."""
        if active == self._degraded:
            return
        self._degraded = active
        text = "placing locally" if active else "placing through the schedulers again"
        self._say("placing locally", text, active, cause)

    def _avoid(self, active: bool, cause: str = "") -> None:
        """Say that a replica is left alone for not answering, and that none is any more: it answers, or it
        has fallen silent and is no replica to ask."""
        if active == self._avoiding:
            return
        self._avoiding = active
        text = "a scheduler does not answer, it is avoided" if active else "no scheduler is avoided any more"
        self._say("avoiding a scheduler", text, active, cause)

    def _say(self, what: str, text: str, active: bool, cause: str) -> None:
        log.warning(text, extra={"fields": {"cause": cause}})
        self._events.degraded(what, active, cause)
