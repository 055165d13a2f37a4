"""The flow of one source: what it lists, who may write it, and its records until they stand."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from penstock.common.bus import Bus, Change, Listing, Lost, WatchEvent
from penstock.common.codec import encode_record
from penstock.common.errors import BusError, RevisionConflict
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.messages import CompleteMarker, EngineStatus
from penstock.common.model import EngineLoad, Instance, InstanceId
from penstock.common.routing_events import INSTANCE, InstanceEvent
from penstock.common.subjects import INSTANCES, STATUS
from penstock.discovery.instruments import Instruments
from penstock.discovery.leases import Bid, Lease, lease_key
from penstock.discovery.ports import Prober, Source
from penstock.discovery.probing import Probing, Slots
from penstock.discovery.reconcile import Fleet, Verdict
from penstock.discovery.registry import RegistryView, Write, plan

log = logging.getLogger(__name__)

WRITES_AT_ONCE = 64


@dataclass(frozen=True)
class ProbePolicy:
    """How instances are probed and judged."""

    interval_s: float = 5.0
    rise: int = 1
    fall: int = 2
    concurrency: int = 64


@dataclass(frozen=True)
class Timing:
    """Intervals of the registry's writer, in seconds."""

    lease_renew_s: float = 2.0
    lease_takeover_s: float = 10.0
    bucket_retry_s: float = 0.5
    write_retry_first_s: float = 0.1
    write_retry_max_s: float = 5.0


@dataclass(frozen=True)
class Surroundings:
    """What all sources of a process share. `sources` names all of them."""

    bus: Bus
    events: EventWriter
    identity: Identity
    instruments: Instruments
    view: RegistryView
    prober: Prober
    slots: Slots
    policy: ProbePolicy
    timing: Timing
    sources: tuple[str, ...]
    clock: Callable[[], float] = time.monotonic


class SourceKeeper:
    """Keeps one source's part of the registry. Probes and writes only while no other replica does."""

    def __init__(self, source: Source, shared: Surroundings) -> None:
        self.name = source.name
        self._source, self._shared = source, shared
        self._lease = Lease(
            shared.identity.id,
            shared.identity.incarnation,
            shared.timing.lease_renew_s,
            shared.timing.lease_takeover_s,
        )
        self._fleet = self._empty_fleet()
        self._listed: tuple[Instance, ...] | None = None
        self._listed_at = shared.clock()
        # Probing and keeping records: from winning the lease until another replica is seen to hold it.
        self._active = False
        # Everything stood in the registry at some moment since then, the marker included.
        self._stood = False
        self._dirty, self._lease_moved, self._relisted = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._lease_lock, self._write_lock = asyncio.Lock(), asyncio.Lock()
        self._probing = Probing(
            shared.prober, shared.slots, self._judge, self._report_load, shared.instruments
        )

    def loops(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """The eternal loops, by name."""
        yield f"source {self.name}", self._follow_source()
        yield f"lease {self.name}", self._keep_lease()
        yield f"writer {self.name}", self._write()
        yield f"probing {self.name}", self._probing.run()

    @property
    def held(self) -> bool:
        """Whether this replica is the writer."""
        return self._lease.may_write(self._shared.clock())

    @property
    def age_s(self) -> float:
        """Seconds since the source last said what it lists."""
        return self._shared.clock() - self._listed_at

    def records(self) -> list[Instance]:
        """What this replica keeps in the registry; nothing while another one does."""
        return self._fleet.records()

    def missing(self) -> str:
        """Why the source's part of the registry is not complete; empty when it is, or another's task."""
        if self._lease.theirs or self._stood:
            return ""
        if not self._active:
            return f"source {self.name}: its lease is not taken yet"
        if self._listed is None:
            return f"source {self.name}: it has listed nothing yet"
        if self._fleet.unjudged:
            return f"source {self.name}: {self._fleet.unjudged} instances wait for their first probe"
        return f"source {self.name}: its records are not written yet"

    def on_registry(self, event: WatchEvent) -> None:
        """The registry changed, was listed anew, or is out of sight; the view has it already."""
        key, now = lease_key(self.name), self._shared.clock()
        match event:
            case Listing():
                self._lease.see(event.entries.get(key), now, listed=True)
                self._relisted.set()
                self._settle()
            case Change() if event.key == key:
                self._lease.see(event.entry, now)
                self._settle()
            case Lost():
                self._lease.pause()
        self._dirty.set()

    async def release(self) -> None:
        """Give the lease back, so that a successor starts at once; the records stay."""
        async with self._write_lock, self._lease_lock:
            revision = self._lease.release()
            self._active, self._fleet = False, self._empty_fleet()
            self._settle()
            if revision and self._shared.bus.connected:
                try:
                    await self._shared.bus.delete(INSTANCES, lease_key(self.name), expected=revision)
                except BusError as exc:
                    log.warning("lease of %s not released: %s", self.name, exc)

    def _empty_fleet(self) -> Fleet:
        return Fleet(self.name, self._shared.policy.rise, self._shared.policy.fall)

    def _settle(self) -> None:
        """Bring fleet, probing and writer in line with the lease and the source.

        A vanished lease, as in a bucket created anew, takes nothing away: it is bid for again.
        """
        if self._lease.theirs and self._active:
            self._active, self._stood, self._fleet = False, False, self._empty_fleet()
            log.warning("source %s is written by %s from here on", self.name, self._lease.holder)
        elif self._lease.mine and not self._active:
            self._active = True
            self._fleet.adopt(self._shared.view.of_source(self.name))
            log.info("source %s is written by this replica", self.name)
        if self._active and self._listed is not None:
            self._tell(self._fleet.desire(self._listed))
        self._probing.keep(self._fleet.endpoints())
        self._lease_moved.set()
        self._dirty.set()

    def _tell(self, events: Iterable[InstanceEvent]) -> None:
        for event in events:
            model = event.models[0] if event.models else ""
            self._shared.events.emit(INSTANCE, model, event.instance, event)
            log.info("instance %s", event.change, extra={"fields": msgspec.to_builtins(event)})

    async def _follow_source(self) -> None:
        async for instances in self._source.states():
            self._listed, self._listed_at = instances, self._shared.clock()
            self._settle()

    def _judge(self, instance_id: InstanceId, verdict: Verdict) -> float:
        version, waiting = self._fleet.version, self._fleet.unjudged
        event = self._fleet.judge(instance_id, verdict)
        if event is not None:
            self._tell([event])
        if self._fleet.version != version or (waiting and not self._fleet.unjudged):
            self._dirty.set()
        return self._fleet.next_probe_s(instance_id, self._shared.policy.interval_s)

    def _report_load(self, instance_id: InstanceId, load: EngineLoad, age_s: float) -> None:
        self._shared.bus.publish(STATUS, EngineStatus(instance_id, load, age_s), instance_id)

    async def _keep_lease(self) -> None:
        tick_s = self._shared.timing.lease_renew_s / 4
        while True:
            async with self._lease_lock:
                bid = self._lease.bid(self._shared.clock())
                placed = bid is not None and await self._place(bid)
            if not placed:
                await wait_at_most(self._lease_moved, tick_s)

    async def _place(self, bid: Bid) -> bool:
        shared = self._shared
        sent_at, incarnation = shared.clock(), shared.view.incarnation
        try:
            revision = await shared.bus.put(INSTANCES, lease_key(self.name), bid.value, expected=bid.expected)
        except BusError as exc:
            log.debug("lease of %s: %s", self.name, exc)
            return False
        if incarnation != shared.view.incarnation:
            return False
        self._lease.won(bid, revision, sent_at)
        self._settle()
        return True

    async def _write(self) -> None:
        timing, failures = self._shared.timing, 0
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            self._relisted.clear()
            async with self._write_lock:
                results = await asyncio.gather(*map(self._write_one, self._due()))
            if not results:
                continue
            self._dirty.set()
            faults = [fault for fault in results if fault]
            failures = failures + 1 if faults else 0
            if failures:
                if failures == 1:
                    log.warning("registry: %d of %d writes failed: %s", len(faults), len(results), faults[0])
                pause_s = min(timing.write_retry_max_s, timing.write_retry_first_s * 2 ** min(failures, 16))
                await wait_at_most(self._relisted, pause_s)

    def _due(self) -> list[Write]:
        """The next writes, bounded; none unless this replica may write and knows what to write."""
        view = self._shared.view
        if not (self._active and view.live and self.held) or self._listed is None:
            return []
        wanted = {instance_key(record.id): encode_instance(record) for record in self._fleet.records()}
        marker = None
        if not self._fleet.unjudged:
            content = CompleteMarker(self.name, self._shared.sources)
            marker = complete_key(self.name), encode_record(content)
        writes = plan(view, self.name, wanted, marker)
        self._stood = self._stood or (marker is not None and not writes)
        return writes[:WRITES_AT_ONCE]

    async def _write_one(self, write: Write) -> str:
        """Why it failed; empty when it is written."""
        shared, revision = self._shared, write.expected + 1
        incarnation, count = shared.view.incarnation, shared.instruments.writes
        try:
            if write.value is None:
                await shared.bus.delete(INSTANCES, write.key, expected=write.expected)
            else:
                revision = await shared.bus.put(INSTANCES, write.key, write.value, expected=write.expected)
        except RevisionConflict as exc:
            # The watch brings what the other one wrote; the plan is made again from that.
            count.inc("conflict")
            return str(exc)
        except BusError as exc:
            count.inc("failed")
            return f"{write.key}: {exc}"
        count.inc("deleted" if write.value is None else "written")
        shared.view.wrote(incarnation, write, revision)
        return ""


async def wait_at_most(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event, which is then cleared, or the time is over."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
    event.clear()
