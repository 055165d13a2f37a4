"""The scheduler on the bus: watch, listen, decide, tell.

Requests are taken only when warm: the registry is synced, and the work in flight is known - a snapshot
of every ingress whose heartbeat is heard, or WARM_UP_S on the bus, in which each ingress has sent one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from penstock.common.bus import Bus, Lost, Subscription, WatchEvent
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.lifecycle import Lifecycle
from penstock.common.messages import (
    EngineStatus,
    Heartbeat,
    LoadReport,
    Placed,
    PlacedFeed,
    Placement,
    Rejection,
    ScheduleBatch,
    ScheduleReply,
    ScheduleRequest,
)
from penstock.common.routing_events import (
    DEGRADED,
    PLACEMENT,
    REJECTION,
    DegradedEvent,
    PlacementEvent,
    RejectionEvent,
)
from penstock.common.subjects import (
    DEFAULT_SHARD,
    HEARTBEAT,
    INSTANCES,
    LOAD,
    PLACED,
    SCHEDULE,
    SCHEDULE_BY,
    STATUS,
)
from penstock.common.telemetry import Metrics
from penstock.scheduler.instruments import Instruments
from penstock.scheduler.peers import SILENCE_S
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.custom import PolicyFault
from penstock.scheduler.replica import Replica
from penstock.scheduler.scheduler import Decision
from penstock.scheduler.settings import SchedulerSettings

log = logging.getLogger(__name__)

WARM_UP_S = 1.5
# By then each living process has sent a heartbeat, so that silence means nobody.
HEARTBEAT_ROUND_S = 1.1
TICK_S = 0.1
LOGGED_IDS = 20


class SchedulerService:
    """Build it, `start` it, run its loops by `lifecycle`, `drain` it."""

    def __init__(
        self,
        bus: Bus,
        own: Identity,
        events: EventWriter,
        metrics: Metrics,
        lifecycle: Lifecycle,
        settings: SchedulerSettings,
        *,
        warm_up_s: float = WARM_UP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bus, self._own, self._events, self._clock = bus, own, events, clock
        self._warm_up_s = warm_up_s
        self.replica = Replica(
            own,
            Catalog(settings.thresholds, settings.custom_policies),
            settings.default_routing_strategy,
            settings.prefix_index_blocks,
            settings.failover_domain_label,
        )
        self._faults_told: set[tuple[str, str]] = set()
        self._instruments = Instruments(metrics, self.replica, clock)
        self._connected_at = clock()
        # By the queue group and by this replica's id; empty until they are taken.
        self._requests: tuple[Subscription, ...] = ()
        self._stopping = self._registry_lost = False
        self._discovery_heard = self._discovery_silent = self._scheduler_lost = False
        lifecycle.require("bus", lambda: "" if bus.connected else "not connected")
        lifecycle.require("requests", self._not_taken)
        self._lifecycle = lifecycle

    async def start(self) -> None:
        """Listen to everything that makes the replica warm; what goes on is handed to the lifecycle."""
        self._connection_changed(self._bus.connected)
        self._bus.on_connection(self._connection_changed)
        await self._bus.subscribe(LOAD, self._on_load)
        await self._bus.subscribe(PLACED, self._on_placed, DEFAULT_SHARD)
        await self._bus.subscribe(STATUS, self._on_status)
        await self._bus.subscribe(HEARTBEAT, self._on_heartbeat)
        self._lifecycle.add_loop("instances", self._watch_instances())
        self._lifecycle.add_loop("housekeeping", self._keep_house())

    async def drain(self) -> None:
        """Leave the queue group; what was delivered before is still answered."""
        self._stopping = True
        for requests in self._requests:
            await requests.close()
        await asyncio.sleep(0)

    # What the bus brings

    def _on_schedule(self, batch: ScheduleBatch) -> ScheduleReply | None:
        if batch.budget_ms <= 0:
            self._instruments.expired.value += 1
            return None
        placed: list[Placed] = []
        outcomes: list[Placement | Rejection] = []
        for request in batch.requests:
            started = self._clock()
            decision = self.replica.decide(request, started)
            if (one := self.replica.reserve(batch, request, decision, started)) is not None:
                placed.append(one)
            outcomes.append(decision.outcome)
            self._tell(batch, request, decision)
            if decision.fault is not None:
                self._policy_failed(decision.fault)
            self._instruments.decided(decision, self._clock() - started)
        for feed in self.replica.feed(batch, placed):
            self._bus.publish(PLACED, feed, DEFAULT_SHARD)
        return ScheduleReply(self._own.id, tuple(outcomes))

    def _on_placed(self, feed: PlacedFeed) -> None:
        self.replica.follow(feed, self._clock())

    def _on_load(self, report: LoadReport) -> None:
        self.replica.report(report, self._clock())

    def _on_status(self, status: EngineStatus) -> None:
        self.replica.status(status, self._clock())

    def _on_heartbeat(self, beat: Heartbeat) -> None:
        self.replica.peers.heard(beat, self._clock())

    def _connection_changed(self, up: bool) -> None:
        now = self._clock()
        if up:
            self._connected_at = now
            self.replica.ledger.resume(now)
        else:
            self.replica.ledger.pause(now)

    # What it tells

    def _tell(self, batch: ScheduleBatch, request: ScheduleRequest, decision: Decision) -> None:
        outcome = decision.outcome
        if isinstance(outcome, Placement):
            # In the order of its fields: by name they cost three times as much.
            placement = PlacementEvent(
                outcome.decision_id,
                request.request_id,
                request.model,
                outcome.instance,
                outcome.policy,
                self._own.id,
                batch.ingress,
                outcome.prefill_instance,
                request.prompt_tokens,
                outcome.matched_blocks,
                len(decision.hashes),
                decision.terms,
                decision.excluded,
                decision.seed,
            )
            self._events.emit(PLACEMENT, request.model, request.request_id, placement)
            return
        rejection = RejectionEvent(
            decision_id=outcome.decision_id,
            request_id=request.request_id,
            model=request.model,
            reason=outcome.reason.value,
            replica=self._own.id,
            ingress=batch.ingress,
            message=outcome.message,
            excluded=decision.excluded,
        )
        self._events.emit(REJECTION, request.model, request.request_id, rejection)

    def _policy_failed(self, fault: PolicyFault) -> None:
        """Counted each time, told once per policy and kind: it may fail thousands of times a second."""
        self._instruments.policy_faults.inc(fault.policy, fault.kind)
        if (fault.policy, fault.kind) not in self._faults_told:
            self._faults_told.add((fault.policy, fault.kind))
            log.error(
                "a policy failed, least-request decides in its place", extra={"fields": {"fault": str(fault)}}
            )
            self._degraded(f"policy {fault.policy}", True, f"{fault.kind}: {fault.detail}")

    # Loops

    async def _watch_instances(self) -> None:
        async for event in self._bus.watch(INSTANCES):
            changed = self.replica.registry(event)
            if self.replica.table.lost is not self._registry_lost:
                self._registry_trusted(event)
            if changed is not None:
                self._instances_changed(*changed)

    def _instances_changed(self, added: list[str], gone: list[str]) -> None:
        fields = {
            "instances": len(self.replica.table),
            "added": len(added),
            "gone": len(gone),
            "added_ids": added[:LOGGED_IDS],
            "gone_ids": gone[:LOGGED_IDS],
        }
        log.info("instances changed", extra={"fields": fields})

    def _registry_trusted(self, event: WatchEvent) -> None:
        """The registry is lost, or back."""
        cause = event.cause if isinstance(event, Lost) else ""
        lost = self._registry_lost = self.replica.table.lost
        log.log(
            logging.WARNING if lost else logging.INFO,
            "registry lost, its last known state is used" if lost else "registry is back",
            extra={"fields": {"cause": cause, "instances": len(self.replica.table)}},
        )
        self._degraded("registry", lost, cause)

    def _listen_for_discovery(self) -> None:
        """Nobody keeps the registry while discovery is silent. Heard through a bus that is there only."""
        heard = self.replica.peers.discoveries > 0
        self._discovery_heard |= heard
        silent = self._discovery_heard and not heard
        if silent is self._discovery_silent or (silent and not self._hears()):
            return
        self._discovery_silent = silent
        log.warning("discovery is silent, instances are not checked" if silent else "discovery is back")
        self._degraded("discovery", silent, f"no heartbeat for {SILENCE_S:g} s" if silent else "")

    def _listen_for_schedulers(self) -> None:
        """Requests go to fewer replicas once one fell silent that had not said that it leaves."""
        gone = self.replica.peers.lost_schedulers
        if bool(gone) is self._scheduler_lost or (gone and not self._hears()):
            return
        self._scheduler_lost = bool(gone)
        cause = f"no heartbeat for {SILENCE_S:g} s of {', '.join(sorted(gone)[:LOGGED_IDS])}" if gone else ""
        text = "a scheduler is silent" if gone else "a scheduler has joined"
        log.warning(text, extra={"fields": {"cause": cause}})
        self._degraded("a scheduler", bool(gone), cause)

    def _hears(self) -> bool:
        """Whether the bus has been there for long enough to hear everybody."""
        return self._bus.connected and self._clock() - self._connected_at > SILENCE_S

    def _degraded(self, what: str, active: bool, cause: str) -> None:
        event = DegradedEvent(self._own.service, self._own.id, what, active, cause)
        self._events.emit(DEGRADED, "", self._own.service, event)

    async def _keep_house(self) -> None:
        while True:
            if silent := self.replica.expire(self._clock()):
                fields = {"ingresses": len(silent), "ids": silent[:LOGGED_IDS]}
                log.warning("ingresses are silent, their work is released", extra={"fields": fields})
            self._listen_for_discovery()
            self._listen_for_schedulers()
            self._instruments.refresh()
            if not self._requests and not self._stopping and not self._awaited():
                await self._take_requests()
            await asyncio.sleep(TICK_S)

    async def _take_requests(self) -> None:
        requests = (
            await self._bus.serve(SCHEDULE_BY, self._on_schedule, DEFAULT_SHARD, self._own.id),
            await self._bus.serve(SCHEDULE, self._on_schedule, DEFAULT_SHARD),
        )
        if self._stopping:
            for subscription in requests:
                await subscription.close()
            return
        self._requests = requests
        log.info("taking requests", extra={"fields": {"instances": len(self.replica.table)}})

    def _not_taken(self) -> str:
        """Why no requests are taken, in words; empty once they are."""
        return "" if self._requests else self._awaited() or "the queue group is being joined"

    def _awaited(self) -> str:
        """What a cold replica waits for before it takes requests."""
        if not self.replica.table.synced:
            return "the registry is not synced"
        if not self._bus.connected:
            return "the bus is not connected"
        connected_s = self._clock() - self._connected_at
        heard = self.replica.peers.ingresses
        unknown = [ingress for ingress in heard if not self.replica.ledger.has_snapshot_of(ingress)]
        covered = heard and not unknown and connected_s >= HEARTBEAT_ROUND_S
        if covered or connected_s >= self._warm_up_s:
            return ""
        return f"load snapshots of {len(unknown)} of {len(heard)} ingresses heard are awaited"
