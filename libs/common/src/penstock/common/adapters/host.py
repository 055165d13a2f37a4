"""What the main of every service assembles: bus, log writer, metrics, admin listener, heartbeat."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.adapters.probes import AdminListener, GetSnapshot, local
from penstock.common.adapters.routing_log import RoutingLog
from penstock.common.identity import Identity
from penstock.common.lifecycle import Lifecycle
from penstock.common.messages import Heartbeat
from penstock.common.settings import ServiceSettings, exit_with_faults, unknown_variables
from penstock.common.subjects import HEARTBEAT
from penstock.common.telemetry import Metrics, configure_logging

log = logging.getLogger(__name__)

VERSION = "0.1.0"
HEARTBEAT_EVERY_S = 1.0
FLUSH_DEADLINE_S = 3.0


def expose_process(metrics: Metrics, lifecycle: Lifecycle) -> None:
    """What every service process says of itself."""
    metrics.gauge(
        "penstock_loop_lag_seconds",
        "Delay of the event loop, last probe",
        lambda: lifecycle.loop_lag_s,
        over="max",
    )
    metrics.gauge(
        "penstock_ready", "1 while the service takes work", lambda: float(not lifecycle.missing()), over="min"
    )
    metrics.gauge("penstock_tasks", "Tasks of the event loop", lambda: len(asyncio.all_tasks()))
    metrics.tally("penstock_cpu_seconds_total", "CPU time of the service's processes", time.process_time)
    metrics.gauge(
        "penstock_resident_memory_bytes", "Memory of the service's processes", _resident_memory_bytes
    )


def _resident_memory_bytes() -> float:
    """0 where the system does not tell."""
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0.0
    return float(int(pages) * os.sysconf("SC_PAGE_SIZE"))


class Host:
    """One service process. Build it inside the loop, hand its parts to the service, then `run`."""

    def __init__(self, identity: Identity, settings: ServiceSettings) -> None:
        configure_logging(identity.service, settings.log_level)
        for name in unknown_variables([type(settings)]):
            log.warning("environment variable %s is not a setting of this service", name)
        self.identity, self.settings = identity, settings
        self.metrics = Metrics()
        self.lifecycle = Lifecycle()
        self.bus = NatsBus(settings, identity.writer, self.metrics)
        self._log = RoutingLog(self.bus, identity, self.metrics, settings)
        self.events = self._log.events
        expose_process(self.metrics, self.lifecycle)

    @property
    def ready(self) -> bool:
        """Whether the service takes work."""
        return not self.lifecycle.missing()

    def admin_listener(self, snapshot: GetSnapshot | None = None) -> AdminListener:
        """The listener of this process's settings; `snapshot` defaults to the process's own metrics."""
        return AdminListener(
            self.settings.admin_host,
            self.settings.admin_port,
            self.lifecycle.missing,
            snapshot or local(self.metrics.snapshot),
            metrics_token=self.settings.metrics_token.get_secret_value(),
        )

    async def run(self, drain: Callable[[], Awaitable[None]], admin: AdminListener | None) -> None:
        """Run until told to stop; `drain` ends the work in hand, then the log is flushed, the bus closed."""
        if admin is not None:
            await self._listen(admin)
        await self.bus.start()
        await self.bus.register(self.identity.service, self.identity.id, VERSION, {})
        for name, loop in self._log.loops():
            self.lifecycle.add_loop(name, loop)
        self.lifecycle.add_loop("heartbeat", self._heartbeat())

        async def drain_and_flush() -> None:
            await drain()
            await self._log.end(FLUSH_DEADLINE_S)

        try:
            await self.lifecycle.run(drain_and_flush)
        finally:
            await self.bus.close()
            self._log.close()
            if admin is not None:
                await admin.close()

    async def _listen(self, admin: AdminListener) -> None:
        host, port = self.settings.admin_host, self.settings.admin_port
        try:
            await admin.start()
        except OSError as exc:
            self.lifecycle.abandon()
            fault = (
                f"--admin-port {port}: cannot listen on {host}: {exc.strerror or exc}; choose another port"
            )
            exit_with_faults(f"penstock {self.identity.service}", [fault])
        log.info("admin listener on http://%s:%d", host, admin.port)

    async def _heartbeat(self) -> None:
        while True:
            beat = Heartbeat(
                self.identity.service, self.identity.id, self.identity.incarnation, self.ready, VERSION
            )
            self.bus.publish(HEARTBEAT, beat, self.identity.service)
            await asyncio.sleep(HEARTBEAT_EVERY_S)
