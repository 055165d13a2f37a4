"""Discovery: sources and probes on one side, the registry bucket on the other."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

from penstock.common.bus import Bus
from penstock.common.config_keeping import follow_config
from penstock.common.errors import BusError
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.instances import complete_key
from penstock.common.live_config import DRAIN, MAPPING, Changed, LiveConfig, expose_config
from penstock.common.orders import Orders
from penstock.common.subjects import INSTANCES
from penstock.common.telemetry import Metrics
from penstock.discovery.allowed import AllowedHosts
from penstock.discovery.instruments import Instruments
from penstock.discovery.kv_policy import KvPolicy
from penstock.discovery.leases import lease_key
from penstock.discovery.merging import Listings
from penstock.discovery.orphans import Orphans
from penstock.discovery.ports import KvPublishers, Prober, Source
from penstock.discovery.probing import Slots
from penstock.discovery.reconcile import event_of
from penstock.discovery.refreshing import Refreshing
from penstock.discovery.registry import RegistryView, Write, plan
from penstock.discovery.registry_writer import RegistryWriter
from penstock.discovery.source_keeper import WRITES_AT_ONCE, SourceKeeper, wait_at_most
from penstock.discovery.surroundings import ProbePolicy, Surroundings, Timing

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
        allowed: AllowedHosts | None = None,
        kv_publishers: KvPublishers | None = None,
        kv_policy: KvPolicy | None = None,
    ) -> None:
        """`sources` in their order of precedence, the static list first wherever it stands."""
        sources = tuple(sources)
        self._bus, self._timing = bus, timing or Timing()
        self._view = RegistryView()
        self._out_of_sight, self._connected = asyncio.Event(), asyncio.Event()
        self._out_of_sight.set()
        bus.on_connection(lambda up: self._connected.set() if up else None)
        self._bucket_trouble = ""
        instruments = Instruments(metrics)
        self._writer = RegistryWriter(bus, self._view, instruments)
        self._listings = Listings(source.name for source in sources)
        self._orphans = Orphans(self._listings.order, self._timing.forget_source_s)
        self._shared = shared = Surroundings(
            bus=bus,
            events=events,
            identity=identity,
            instruments=instruments,
            view=self._view,
            writer=self._writer,
            listings=self._listings,
            prober=prober,
            slots=Slots.of(policy.concurrency),
            policy=policy,
            timing=self._timing,
            allowed=allowed or AllowedHosts(),
            orders=Orders(),
            kv_publishers=kv_publishers,
            kv_policy=kv_policy or KvPolicy(),
        )
        self.config = LiveConfig(keeps=True)
        self._configured = asyncio.Event()
        self.keepers = [SourceKeeper(source, shared) for source in sources]
        for keeper in self.keepers:
            keeper.neighbours = [other for other in self.keepers if other is not keeper]
        readers = [keeper.reader for keeper in self.keepers]
        self._refreshing = Refreshing(bus, identity.id, readers, self.refresh, self._listings.all)
        expose_config(self.config, metrics)
        self._export(metrics)

    def loops(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """The eternal loops, by name."""
        yield "config", follow_config(self._bus, self.config, self._on_config)
        yield "registry", self._follow_registry()
        yield "discover", self._refreshing.run()
        yield "bucket", self._keep_bucket()
        yield "orphans", self._forget_sources()
        for keeper in self.keepers:
            yield from keeper.loops()

    def missing(self) -> str:
        """Why the registry is not known to be complete; empty when it is."""
        if not self._bus.connected:
            return "no connection to the bus"
        if not self.config.synced:
            return "the live configuration is not listed"
        if not self._view.live:
            return self._bucket_trouble or "it is not listed"
        return "; ".join(filter(None, (keeper.missing() for keeper in self.keepers)))

    async def refresh(self) -> None:
        """Have every source list again now."""
        await asyncio.gather(*(keeper.reader.refresh() for keeper in self.keepers))

    async def drain(self) -> None:
        """Stop writing and give the leases back."""
        for keeper in self.keepers:
            await keeper.release()

    async def close(self) -> None:
        """Close the sources; the loops have ended."""
        await asyncio.gather(*(keeper.reader.close() for keeper in self.keepers))

    def _on_config(self, changed: Changed) -> None:
        self._configured.set()
        if not self._view.live or any(kind in (DRAIN, MAPPING) for kind, _ in changed):
            self._shared.orders.take(self.config)
            for keeper in self.keepers:
                keeper.obey()

    async def _follow_registry(self) -> None:
        # What administrators drain must not take work for the moment in which that is not known.
        await self._configured.wait()
        async for event in self._bus.watch(INSTANCES):
            self._view.apply(event)
            self._orphans.see(event, self._shared.clock())
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

    async def _forget_sources(self) -> None:
        """Remove the records of sources that no replica runs any more."""
        while True:
            await asyncio.sleep(self._timing.orphan_check_s)
            if not any(keeper.held for keeper in self.keepers):
                continue
            for source in self._orphans.due(self._view, self._shared.clock()):
                await self._forget(source)

    async def _forget(self, source: str) -> None:
        gone = [record for key, record in self._view.records.items() if self._view.writer_of(key) == source]
        reason = f"no replica of discovery ran source {source} for {self._timing.forget_source_s:g} s"
        writes = plan(self._view, source, {}, None)
        writes += [
            Write(key, None, self._view.entries[key].revision)
            for key in (complete_key(source), lease_key(source))
            if key in self._view.entries
        ]
        log.warning("%d records of source %s are removed: %s", len(gone), source, reason)
        for first in range(0, len(writes), WRITES_AT_ONCE):
            await self._writer.carry_out(writes[first : first + WRITES_AT_ONCE])
        left = {record.id for record in self._view.of_source(source)}
        self._shared.tell(event_of(record, "removed", reason) for record in gone if record.id not in left)

    def _export(self, metrics: Metrics) -> None:
        def instances() -> Iterable[tuple[tuple[str, ...], float]]:
            counted = Counter(
                (str(record.state), record.source) for k in self.keepers for record in k.records()
            )
            return [(labels, float(count)) for labels, count in counted.items()]

        metrics.gauge(
            "penstock_discovery_instances", "Instances kept by this replica", instances, "state", "source"
        )

        def each(read: Callable[[SourceKeeper], float]) -> Callable[[], list[tuple[tuple[str, ...], float]]]:
            return lambda: [((keeper.name,), float(read(keeper))) for keeper in self.keepers]

        for name, text, read in (
            ("lease_held", "1 while this replica writes the source", lambda k: k.held),
            (
                "source_age_seconds",
                "Time since the source last said what it lists; a static list says it once",
                lambda k: k.reader.age_s,
            ),
            ("source_stale", "1 while the source cannot be read", lambda k: bool(k.reader.stale)),
            ("source_listed", "Instances that the source lists", lambda k: self._listings.count(k.name)),
            (
                "source_overruled",
                "Instances that the source lists and one before it in precedence lists too",
                lambda k: self._listings.count(k.name) - len(self._listings.won(k.name)),
            ),
            ("kv_feeds", "Instances whose KV-cache events are followed", lambda k: k.kv_feeds),
            ("source_skipped", "Records that are passed over, at most 101", lambda k: k.reader.skipped),
        ):
            metrics.gauge(f"penstock_discovery_{name}", text, each(read), "source")
