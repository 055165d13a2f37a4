"""The loops of one ingress process: know the fleet, report load, end what is overdue, drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from penstock.common.bus import Bus, Listing, Lost
from penstock.common.config_keeping import follow_config
from penstock.common.errors import MessageTooLarge
from penstock.common.instances import InstanceTable, expose
from penstock.common.lifecycle import Lifecycle
from penstock.common.live_config import MIRROR, Changed, LiveConfig
from penstock.common.machine_code import compiled
from penstock.common.messages import LoadReport
from penstock.common.mirroring import NAME, BadMirrorConfig, of_document
from penstock.common.subjects import HEARTBEAT, INSTANCES, LOAD
from penstock.common.telemetry import Metrics
from penstock.ingress.capture import Capture
from penstock.ingress.exchange import Exchange
from penstock.ingress.gateway import Gateway
from penstock.ingress.in_flight import InFlightAccount
from penstock.ingress.key_keeping import KeyKeeper
from penstock.ingress.limiter import Limiter
from penstock.ingress.profile_keeping import ProfileKeeper

log = logging.getLogger(__name__)

SCHEDULER = "scheduler"
# Schedulers see a finished request this late; a message each time something changed would cost as much
# as relaying.
REPORT_EVERY_S = 0.025
SNAPSHOT_EVERY_S = 1.0
SWEEP_EVERY_S = 0.1
DRAIN_CHECK_S = 0.05


class Sweepable(Protocol):
    """Something with connections that have deadlines."""

    def sweep(self, now: float) -> None:
        """End what is overdue at `now`."""


class IngressService:
    """One worker's loops around its Gateway."""

    def __init__(self, gateway: Gateway, bus: Bus, lifecycle: Lifecycle, metrics: Metrics) -> None:
        self._gateway, self._bus = gateway, bus
        table = gateway.table
        lifecycle.require(
            "registry", lambda: "" if table.synced else "no complete listing of the instances yet"
        )
        expose(table, metrics)
        metrics.tally(
            "penstock_ingress_access_log_dropped_total",
            "Log lines dropped",
            lambda: gateway.access_log.dropped,
        )
        metrics.gauge(
            "penstock_ingress_machine_code", "Workers whose data path is compiled", lambda: float(compiled())
        )
        self._reports_too_large = metrics.counter(
            "penstock_ingress_reports_too_large_total", "Load reports over their subject's bound"
        )
        bus.on_connection(self._on_connection)
        gateway.waiting.tell_schedulers = lambda: self.publish(gateway.account.changes())

    def _on_connection(self, up: bool) -> None:
        # Schedulers that came back with the bus know nothing of what runs here.
        self._gateway.account.snapshot_due = True

    async def watch(self, profiles: ProfileKeeper | None = None) -> None:
        """Keep the instance table, and hear which schedulers are there; `profiles` reads what the instances
        bring along."""
        replicas = self._gateway.placer.replicas
        await self._bus.subscribe(
            HEARTBEAT, lambda beat: replicas.heard(beat, self._gateway.clock()), SCHEDULER
        )
        table = self._gateway.table
        async for event in self._bus.watch(INSTANCES):
            was_lost, was_known = table.lost, table.synced
            changed = table.apply(event)
            if changed:
                self._gateway.waiting.fleet_changed()
            cause = event.cause if isinstance(event, Lost) else ""
            if changed:
                self._gateway.forget_gone()
                if profiles is not None:
                    profiles.registry(table.instances())
            if changed or isinstance(event, Lost | Listing):
                self._log_table(table, cause)
            if was_known and table.lost is not was_lost:
                self._gateway.degraded("registry", table.lost, cause)

    async def follow_config(
        self,
        live: LiveConfig,
        capture: Capture,
        limiter: Limiter | None = None,
        keys: KeyKeeper | None = None,
        profiles: ProfileKeeper | None = None,
    ) -> None:
        """Keep up with the live configuration."""
        if limiter is not None:
            self._gateway.limits = limiter.if_active
        routes_changed = self._gateway.splitting.follow(live)

        def apply(changed: Changed) -> None:
            routes_changed(changed)
            if limiter is not None:
                limiter.follow(live, changed)
                self._gateway.limits = limiter.if_active
            if keys is not None:
                keys.changed(changed)
            if profiles is not None:
                profiles.changed(changed)
            try:
                capture.config = of_document(live.get(MIRROR, NAME))
            except BadMirrorConfig as exc:
                log.error("the live mirror configuration is not valid, the last good one stays: %s", exc)
            self._gateway.capture = capture if capture.config.active else None

        await follow_config(self._bus, live, apply)

    def _log_table(self, table: InstanceTable, lost: str) -> None:
        taking = sum(instance.takes_work for instance in table.instances())
        fields = {"instances": len(table), "taking_work": taking, "synced": table.synced, "lost": lost}
        log.info("instance table", extra={"fields": fields})

    async def report(self) -> None:
        """Tell the schedulers what is in flight."""
        account, loop = self._gateway.account, asyncio.get_running_loop()
        next_snapshot = 0.0
        while True:
            if account.snapshot_due or loop.time() >= next_snapshot:
                next_snapshot = loop.time() + SNAPSHOT_EVERY_S
                self.publish(account.snapshot())
                self.publish(account.speeds(self._gateway.speeds.report()))
            else:
                self.publish(account.changes())
            await asyncio.sleep(REPORT_EVERY_S)

    def publish(self, reports: Iterable[LoadReport]) -> None:
        """Send reports; one that is lost leaves a gap in the sequence, which the next snapshot heals. What
        they say has ended has its outcome on disk, where there is a spool."""
        self._gateway.events.settle()
        for report in reports:
            try:
                self._bus.publish(LOAD, report, report.ingress)
            except MessageTooLarge as exc:
                self._reports_too_large.inc()
                log.error("%s", exc)

    async def sweep(self, connections: Iterable[Sweepable], clock: Callable[[], float]) -> None:
        """End overdue exchanges and connections, write the access log."""
        held = list(connections)
        while True:
            await asyncio.sleep(SWEEP_EVERY_S)
            now = clock()
            self._gateway.waiting.sweep(now)
            self._gateway.dividing.sweep(now)
            for exchange in [e for e in self._gateway.exchanges if e.deadline < now]:
                _expire(exchange)
            for owner in held:
                owner.sweep(now)
            self._gateway.access_log.flush()

    async def drain(self, timeout_s: float) -> None:
        """Let exchanges finish, end those that do not, and say that this ingress leaves."""
        gateway, loop = self._gateway, asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        # Exchanges end in many places; looking at them while draining is simpler than hearing of each end.
        while gateway.exchanges and loop.time() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(DRAIN_CHECK_S)
        for exchange in list(gateway.exchanges):
            exchange.shut_down()
        self.publish(final_reports(gateway.account))
        gateway.access_log.flush()


def _expire(exchange: Exchange) -> None:
    """A fault of ours costs the request that met it, not the worker."""
    try:
        exchange.expire()
    except Exception:
        log.exception("ending a request failed")
        exchange.broken()


def final_reports(account: InFlightAccount) -> list[LoadReport]:
    """The last word of an ingress."""
    return list(account.snapshot(leaving=True))
