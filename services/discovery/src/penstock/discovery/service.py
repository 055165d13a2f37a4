"""Discovery: sources and probes on one side, the registry bucket on the other."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine, Iterable, Iterator
from typing import Any

from penstock.common.bus import Bus
from penstock.common.errors import BusError
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.subjects import INSTANCES
from penstock.common.telemetry import Metrics
from penstock.discovery.instruments import Instruments
from penstock.discovery.ports import Prober, Source
from penstock.discovery.probing import Slots
from penstock.discovery.registry import RegistryView
from penstock.discovery.source_keeper import ProbePolicy, SourceKeeper, Surroundings, Timing, wait_at_most

log = logging.getLogger(__name__)


class Discovery:
    """Watches the registry, makes its bucket when it is not there, and keeps each source's part of it."""

    def __init__(
        self,
        sources: Iterable[Source],
        prober: Prober,
        *,
        bus: Bus,
        events: EventWriter,
        metrics: Metrics,
        identity: Identity,
        policy: ProbePolicy,
        timing: Timing | None = None,
    ) -> None:
        sources = tuple(sources)
        self._bus, self._timing = bus, timing or Timing()
        self._view = RegistryView()
        self._out_of_sight, self._connected = asyncio.Event(), asyncio.Event()
        self._out_of_sight.set()
        bus.on_connection(lambda up: self._connected.set() if up else None)
        self._bucket_trouble = ""
        shared = Surroundings(
            bus=bus,
            events=events,
            identity=identity,
            instruments=Instruments(metrics),
            view=self._view,
            prober=prober,
            slots=Slots.of(policy.concurrency),
            policy=policy,
            timing=self._timing,
            sources=tuple(source.name for source in sources),
        )
        self.keepers = [SourceKeeper(source, shared) for source in sources]
        self._export(metrics)

    def loops(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """The eternal loops, by name."""
        yield "registry", self._follow_registry()
        yield "bucket", self._keep_bucket()
        for keeper in self.keepers:
            yield from keeper.loops()

    def missing(self) -> str:
        """Why the registry is not known to be complete; empty when it is."""
        if not self._bus.connected:
            return "no connection to the bus"
        if not self._view.live:
            return self._bucket_trouble or "it is not listed"
        return "; ".join(filter(None, (keeper.missing() for keeper in self.keepers)))

    async def drain(self) -> None:
        """Stop writing and give the leases back."""
        for keeper in self.keepers:
            await keeper.release()

    async def _follow_registry(self) -> None:
        async for event in self._bus.watch(INSTANCES):
            self._view.apply(event)
            if self._view.live:
                self._out_of_sight.clear()
            else:
                self._out_of_sight.set()
            for keeper in self.keepers:
                keeper.on_registry(event)

    async def _keep_bucket(self) -> None:
        """Whenever the bucket cannot be watched, it may be gone: make it unless it exists."""
        while True:
            await self._out_of_sight.wait()
            if self._bus.connected:
                await self._ensure_bucket()
            await wait_at_most(self._connected, self._timing.bucket_retry_s)

    async def _ensure_bucket(self) -> None:
        try:
            if await self._bus.ensure_bucket(INSTANCES):
                log.info("the registry bucket is created")
            self._bucket_trouble = ""
        except BusError as exc:
            if str(exc) != self._bucket_trouble:
                log.warning("registry bucket: %s", exc)
            self._bucket_trouble = str(exc)

    def _export(self, metrics: Metrics) -> None:
        def instances() -> Iterable[tuple[tuple[str, ...], float]]:
            counted = Counter(
                (str(record.state), record.source) for k in self.keepers for record in k.records()
            )
            return [(labels, float(count)) for labels, count in counted.items()]

        metrics.gauge(
            "penstock_discovery_instances", "Instances kept by this replica", instances, "state", "source"
        )
        metrics.gauge(
            "penstock_discovery_lease_held",
            "1 while this replica writes the source",
            lambda: [((keeper.name,), float(keeper.held)) for keeper in self.keepers],
            "source",
        )
        metrics.gauge(
            "penstock_discovery_source_age_seconds",
            "Time since the source last said what it lists; a static list says it once",
            lambda: [((keeper.name,), keeper.age_s) for keeper in self.keepers],
            "source",
        )
