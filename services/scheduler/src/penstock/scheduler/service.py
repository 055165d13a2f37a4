"""The scheduler on the bus: watch, listen, decide, tell.

Requests are taken only when warm: the registry is synced, and the work in flight is known - a snapshot
of every ingress whose heartbeat is heard, or WARM_UP_S on the bus, in which each ingress has sent one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence

from penstock.common.bus import Bus
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.lifecycle import Lifecycle
from penstock.common.messages import (
    EngineStatus,
    Heartbeat,
    KvEvents,
    LoadReport,
    PlacedFeed,
    ScheduleBatch,
    ScheduleReply,
    ScheduleRequest,
    SnapshotPiece,
    SnapshotRequest,
    Stage,
)
from penstock.common.subjects import (
    DEFAULT_SHARD,
    HEARTBEAT,
    INSTANCES,
    KV,
    LOAD,
    PLACED,
    SNAPSHOT,
    STATUS,
)
from penstock.common.telemetry import Metrics
from penstock.scheduler.absences import LOGGED_IDS, Absences
from penstock.scheduler.explaining import Explaining
from penstock.scheduler.faults import PolicyFaults
from penstock.scheduler.instruments import Instruments
from penstock.scheduler.intake import Intake
from penstock.scheduler.peers import SILENCE_S
from penstock.scheduler.policies.configured import ConfiguredCatalog
from penstock.scheduler.profile_keeping import ProfileKeeper
from penstock.scheduler.pulse import Pulse
from penstock.scheduler.replica import Replica
from penstock.scheduler.settings import SchedulerSettings
from penstock.scheduler.telling import Teller
from penstock.scheduler.tracing import DecisionTraces
from penstock.scheduler.untold import Untold
from penstock.scheduler.warming import Warming

log = logging.getLogger(__name__)

WARM_UP_S = 1.5
# By then each living process has sent a heartbeat, so that silence means nobody.
HEARTBEAT_ROUND_S = 1.1
TICK_S = 0.1
# Outcomes of dead ingresses' requests told in one tick.
MAX_LOST_AT_ONCE = 500
# A replica that stood still for so long is warmed again.
REWARM_S = 5.0
# How often at most a snapshot makes up for placements that were missed.
REPAIR_EVERY_S = 60.0


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
        traces: DecisionTraces | None = None,
        warm_up_s: float = WARM_UP_S,
        clock: Callable[[], float] = time.monotonic,
        loop_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`traces` hears of each decision about a traced request; `loop_clock` tells how late the event loop
        is."""
        self._bus, self._own, self._clock, self._traces = bus, own, clock, traces
        self._warm_up_s = warm_up_s
        catalog = ConfiguredCatalog(settings.thresholds, settings.custom_policies)
        self.replica = Replica(
            own,
            catalog,
            settings.default_routing_strategy,
            settings.prefix_index_blocks,
            settings.failover_domain_label,
            settings.division,
            prefix_max_age_s=settings.prefix_index_max_age,
            prefix_kv_factor=settings.prefix_index_kv_factor,
        )
        self._teller = Teller(own, events)
        custom = settings.custom_policies
        self._explaining = Explaining(own, self.replica, settings.explain, custom)
        self._profiles = ProfileKeeper(bus, catalog, self._teller, metrics, settings.profiles_file)
        self._absences = Absences(self._teller, self.replica.table, self.replica.peers)
        self._instruments = Instruments(metrics, self.replica, clock)
        self._untold = Untold(bus, self.replica, self._explaining, self._teller, self._instruments)
        self._faults = PolicyFaults(self._teller, self._instruments.policy_faults)
        self._connected_at = clock()
        self._pulse = Pulse(TICK_S, settings.max_loop_lag_ms / 1000, loop_clock())
        self._loop_clock = loop_clock
        self._warming = Warming(bus, own, self.replica, clock)
        self._intake = Intake(bus, own.id, self._on_schedule, self._untold.tell, self._teller)
        self._instruments.follow(self._warming, self._pulse, self._intake)
        self._warm = self._stale = False
        self._repaired_at = -math.inf
        lifecycle.require("bus", lambda: "" if bus.connected else "not connected")
        lifecycle.require("requests", self._not_taken)
        self._lifecycle = lifecycle

    async def start(self) -> None:
        """Listen to everything that makes the replica warm; what goes on is handed to the lifecycle."""
        self._connection_changed(self._bus.connected)
        self._bus.on_connection(self._connection_changed)
        await self._bus.subscribe(LOAD, self._on_load)
        await self._bus.subscribe(PLACED, self._on_placed, DEFAULT_SHARD, skip=self.replica.came_back)
        await self._bus.subscribe(STATUS, self._on_status)
        await self._bus.subscribe(KV, self._on_kv_events)
        await self._bus.subscribe(HEARTBEAT, self._on_heartbeat)
        await self._bus.serve(SNAPSHOT, self._on_snapshot, DEFAULT_SHARD, self._own.id)
        await self._explaining.serve(self._bus, self._clock, lambda: self._intake.open)
        self._lifecycle.add_loop("instances", self._watch_instances())
        for name, loop in self._profiles.loops():
            self._lifecycle.add_loop(name, loop)
        self._lifecycle.add_loop("housekeeping", self._keep_house())
        self._lifecycle.add_loop("warming", self._keep_warm())
        self._lifecycle.add_loop("intake", self._keep_intake())

    async def drain(self) -> None:
        """Leave the queue group; what was delivered before is still answered."""
        await self._intake.close()
        await asyncio.sleep(0)

    # What the bus brings

    def _on_schedule(self, batch: ScheduleBatch) -> ScheduleReply | None:
        if batch.budget_ms <= 0 or self._stood_still():
            self._instruments.expired.value += 1
            return None
        marks = self._traces.marks(batch) if batch.traces and self._traces is not None else None
        replica, started = self.replica, self._clock()
        made = self._untold.begin(batch, replica.age(started))
        requests = _in_turn(batch.requests)
        for request in requests:
            decision = replica.decide(request, started)
            numbers = self._explaining.numbers(decision)
            made.placed += replica.reserve(batch, request, decision, started)
            if decision.fault is not None:
                self._faults.failed(decision.fault, started)
            ended = self._clock()
            made.decided.append((request, decision, numbers, ended - started, ended))
            if marks and self._traces is not None and (parent := marks.get(request.decision_id)):
                self._traces.decided(parent, batch, request, decision, ended - started)
            started = ended
        made.whole = True
        if self._teller.first:
            self._untold.tell()
            self._teller.settle()
        return ScheduleReply(self._own.id, made.outcomes(sorted_=requests is not batch.requests))

    def _on_snapshot(self, request: SnapshotRequest) -> SnapshotPiece:
        giver = self.replica.giver
        return giver.piece(request.cursor) if self._intake.open else giver.refusal()

    def _on_placed(self, feed: PlacedFeed) -> None:
        self.replica.follow(feed, self._clock())

    def _on_load(self, report: LoadReport) -> None:
        self.replica.report(report, self._clock())

    def _on_status(self, status: EngineStatus) -> None:
        self.replica.status(status, self._clock())

    def _on_kv_events(self, events: KvEvents) -> None:
        self.replica.kv_events(events, self._clock())

    def _on_heartbeat(self, beat: Heartbeat) -> None:
        self.replica.peers.heard(beat, self._clock())

    def _connection_changed(self, up: bool) -> None:
        now = self._clock()
        if up:
            self._connected_at = now
            self.replica.ledger.resume(now)
        else:
            self.replica.ledger.pause(now)

    # Loops

    async def _watch_instances(self) -> None:
        async for event in self._bus.watch(INSTANCES):
            changed = self.replica.registry(event)
            self._absences.registry(event)
            if changed is not None:
                self._profiles.registry(self.replica.table.instances())
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

    def _hears(self) -> bool:
        """Whether the bus has been there for long enough to hear everybody."""
        return self._bus.connected and self._clock() - self._connected_at > SILENCE_S

    async def _keep_house(self) -> None:
        while True:
            self._stood_still()
            if silent := self.replica.expire(self._clock()):
                fields = {"ingresses": len(silent), "ids": silent[:LOGGED_IDS]}
                log.warning("ingresses are silent, their work is released", extra={"fields": fields})
            self._explaining.tell_lost(self.replica.ledger.orphans(MAX_LOST_AT_ONCE), self._teller)
            self._absences.listen(self._hears())
            self._faults.expire(self._clock())
            for change in self.replica.kv_feeds.changes():
                self._teller.trust(change)
            self._instruments.refresh()
            await asyncio.sleep(TICK_S)

    async def _keep_warm(self) -> None:
        """Warm up once, and again when placements of siblings were missed."""
        while True:
            now = self._clock()
            if not self._warm and not self._awaited():
                await self._warming.run()
                self._warm = True
            elif self._warm and self.replica.missing and now - self._repaired_at >= REPAIR_EVERY_S:
                self._repaired_at = now
                await self._warming.repair()
            await asyncio.sleep(TICK_S)

    async def _keep_intake(self) -> None:
        """Take requests while warm, and while the loop keeps up."""
        while True:
            self._stood_still()
            self._pulse.turn(self._loop_clock())
            await self._intake.set(self._warm and not self._stale, lags=self._pulse.lags)
            self._stale = False
            await asyncio.sleep(TICK_S)

    def _stood_still(self) -> bool:
        """Whether what comes in may have waited in a buffer while the process did not run. Silence then
        proves nothing, and after a long time this replica knows no more than a new one."""
        stalled_s = self._pulse.stalled_s(self._loop_clock())
        if stalled_s:
            self._pulse.forgive(self._loop_clock())
            now = self._clock()
            self._stale, self._connected_at = True, now
            self.replica.stood_still(stalled_s, now)
            self._warm = self._warm and stalled_s < REWARM_S
            log.warning("the loop stood still", extra={"fields": {"seconds": round(stalled_s, 3)}})
        return self._stale

    def _not_taken(self) -> str:
        """Why no requests are taken, in words; empty once they are."""
        if self._intake.open:
            return ""
        if self._pulse.lags:
            return "the event loop lags"
        return (
            (not self._warm and self._awaited())
            or self._warming.progress
            or "the queue group is being joined"
        )

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


def _in_turn(requests: Sequence[ScheduleRequest]) -> Sequence[ScheduleRequest]:
    """What prefill has computed goes ahead: it takes room there until it is fetched."""
    for request in requests:
        if request.stage is Stage.DECODE:
            return sorted(requests, key=lambda request: request.stage is not Stage.DECODE)
    return requests
