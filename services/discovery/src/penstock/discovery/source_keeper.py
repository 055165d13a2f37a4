"""The flow of one source: what it lists, who may write it, and its records until they stand."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any

from penstock.common.bus import Change, Listing, Lost, WatchEvent
from penstock.common.codec import encode_record
from penstock.common.errors import BusError
from penstock.common.instances import complete_key, instance_key
from penstock.common.messages import CompleteMarker, EngineStatus
from penstock.common.model import Endpoint, Instance, InstanceId
from penstock.common.routing_events import DEGRADED, DegradedEvent
from penstock.common.subjects import INSTANCES, STATUS
from penstock.discovery.claims import Claims
from penstock.discovery.flaps import Flaps
from penstock.discovery.kv_bridging import Bridging
from penstock.discovery.leases import Bid, Lease, lease_key
from penstock.discovery.ports import Reading, Source
from penstock.discovery.probing import Probing
from penstock.discovery.reconcile import Fleet, Verdict
from penstock.discovery.registry import Write, plan
from penstock.discovery.screening import printable
from penstock.discovery.source_reader import SourceReader
from penstock.discovery.surroundings import Surroundings

log = logging.getLogger(__name__)

WRITES_AT_ONCE = 64


class SourceKeeper:
    """Keeps one source's part of the registry. Probes and writes only while no other replica does."""

    def __init__(self, source: Source, shared: Surroundings) -> None:
        self.name = source.name
        self._shared = shared
        self._lease = Lease(
            shared.identity.id,
            shared.identity.incarnation,
            shared.timing.lease_renew_s,
            shared.timing.lease_takeover_s,
        )
        self._flaps = Flaps(shared.policy.flap_window_s)
        self._fleet = self._empty_fleet()
        self._claims = Claims()
        self.reader = SourceReader(source, shared, self._on_state)
        # Keepers of the other sources: what this one lists may be theirs to leave or to take.
        self.neighbours: Sequence[SourceKeeper] = ()
        # Probing and keeping records: from winning the lease until another replica is seen to hold it.
        self._active = False
        self._active_since = shared.clock()
        # Everything stood in the registry at some moment since then, the marker included.
        self._stood = False
        self._leaving: Mapping[InstanceId, Instance] = {}
        # Instances some of whose figures are none.
        self._absurd: set[InstanceId] = set()
        self._dirty, self._lease_moved, self._relisted = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._lease_lock, self._write_lock = asyncio.Lock(), asyncio.Lock()
        self._bridging = Bridging(
            shared.kv_publishers, shared.bus, shared.kv_policy, lambda: self.held, shared.instruments
        )
        self._probing = Probing(shared.prober, shared.slots, self._judge, self._report, shared.instruments)

    def loops(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """The eternal loops, by name."""
        yield f"source {self.name}", self.reader.follow()
        yield f"lease {self.name}", self._keep_lease()
        yield f"writer {self.name}", self._write()
        yield f"probing {self.name}", self._probing.run()
        yield f"kv-events {self.name}", self._bridging.run()

    @property
    def held(self) -> bool:
        """Whether this replica is the writer."""
        return self._lease.may_write(self._shared.clock())

    @property
    def kv_feeds(self) -> int:
        """Publishers of KV-cache events that this replica follows."""
        return len(self._bridging)

    def records(self) -> list[Instance]:
        """What this replica keeps in the registry; nothing while another one does."""
        return self._fleet.records()

    def missing(self) -> str:
        """Why the source's part of the registry is not complete; empty when it is, or another's task."""
        if self._lease.theirs or self._stood:
            return ""
        if not self._active:
            return f"source {self.name}: its lease is not taken yet"
        if self.reader.known is None:
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
                self.settle()
            case Change() if event.key == key:
                self._lease.see(event.entry, now)
                self.settle()
            case Lost():
                self._lease.pause()
        self._dirty.set()

    async def release(self) -> None:
        """Give the lease back, so that a successor starts at once; the records stay."""
        async with self._write_lock, self._lease_lock:
            revision = self._lease.release()
            self._active, self._fleet = False, self._empty_fleet()
            self.settle()
            if revision and self._shared.bus.connected:
                try:
                    await self._shared.bus.delete(INSTANCES, lease_key(self.name), expected=revision)
                except BusError as exc:
                    log.warning("lease of %s not released: %s", self.name, exc)

    def _empty_fleet(self) -> Fleet:
        policy, orders = self._shared.policy, self._shared.orders
        return Fleet(self.name, policy.rise, policy.fall, self._flaps, orders.amend)

    def obey(self) -> None:
        """What administrators ordered has changed."""
        self._shared.tell(self._fleet.amended())
        self._dirty.set()

    def settle(self) -> None:
        """Bring fleet, probing and writer in line with the lease, the source and the other sources.

        A vanished lease, as in a bucket created anew, takes nothing away: it is bid for again.
        """
        now = self._shared.clock()
        if self._lease.theirs and self._active:
            self._active, self._stood, self._fleet = False, False, self._empty_fleet()
            log.warning("source %s is written by %s from here on", self.name, self._lease.holder)
        elif self._lease.mine and not self._active:
            self._active, self._active_since = True, now
            self._fleet.adopt(self._shared.view.of_source(self.name))
            log.info("source %s is written by this replica", self.name)
        if self._active:
            self._desire(now)
        self._probing.keep(self._fleet.endpoints())
        self._absurd &= self._fleet.endpoints().keys()
        self._bridging.keep(self._fleet.records())
        self._lease_moved.set()
        self._dirty.set()

    def _desire(self, now: float) -> None:
        shared, held = self._shared, self._fleet.bases()
        if self.reader.known is None:
            if now - self._active_since >= shared.timing.silent_start_s:
                stale = "its source has listed nothing since this replica of discovery started"
                shared.tell(self._fleet.desire(held.values(), now, stale=stale))
            return
        wanted = shared.listings.won(self.name)
        elsewhere = {i for i in held.keys() - wanted.keys() if shared.listings.speaker(i)}
        # Another source speaks for these: kept until it has written them, so that none is missing.
        self._leaving = {i: held[i] for i in elsewhere if shared.view.writer_of(instance_key(i)) == self.name}
        found = (shared.view.known(instance_id) for instance_id in wanted.keys() - held.keys())
        self._fleet.adopt([record for record in found if record is not None])
        desired = (*wanted.values(), *self._leaving.values())
        shared.tell(self._fleet.desire(desired, now, stale=self.reader.stale, elsewhere=elsewhere))
        self.reader.tell_skipped()

    def _on_state(self) -> None:
        for keeper in (self, *self.neighbours):
            keeper.settle()

    def _judge(self, instance_id: InstanceId, endpoint: Endpoint, verdict: Verdict) -> float:
        version, waiting = self._fleet.version, self._fleet.unjudged
        event = self._fleet.judge(instance_id, verdict, self._shared.clock(), endpoint)
        if event is not None:
            self._shared.tell([event])
        if self._fleet.version != version or (waiting and not self._fleet.unjudged):
            self._bridging.keep(self._fleet.records())
            self._dirty.set()
        return self._fleet.next_probe_s(instance_id, self._shared.policy.interval_s)

    def _report(self, instance_id: InstanceId, endpoint: Endpoint, reading: Reading, age_s: float) -> None:
        event = self._fleet.recognise(instance_id, reading.engine, endpoint)
        if event is not None:
            self._shared.tell([event])
            self._dirty.set()
        self._tell_absurd(instance_id, reading.absurd)
        if reading.load is not None:
            self._shared.bus.publish(STATUS, EngineStatus(instance_id, reading.load, age_s), instance_id)

    def _tell_absurd(self, instance_id: InstanceId, figures: Sequence[str]) -> None:
        """Count each, say it when it begins and when it ends."""
        shared, name = self._shared, printable(instance_id)
        for figure in figures:
            shared.instruments.absurd_figures.inc(figure)
        if bool(figures) == (instance_id in self._absurd):
            return
        self._absurd ^= {instance_id}
        cause = f"no number of requests or share: {', '.join(figures)}" if figures else ""
        log.warning("load of %s %s", name, f"is not used: {cause}" if figures else "makes sense again")
        event = DegradedEvent(
            shared.identity.service, shared.identity.id, f"load of {name}", bool(figures), cause
        )
        shared.events.emit(DEGRADED, "", shared.identity.service, event)

    async def _keep_lease(self) -> None:
        tick_s = self._shared.timing.lease_renew_s / 4
        while True:
            async with self._lease_lock:
                bid = self._lease.bid(self._shared.clock(), reads=self.reader.reads)
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
        self.settle()
        return True

    async def _write(self) -> None:
        timing, failures = self._shared.timing, 0
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            self._relisted.clear()
            async with self._write_lock:
                writes = self._due()
                results = await self._shared.writer.carry_out(writes)
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
        """The next writes, bounded; none unless this replica may write. Before the source listed anything
        they only bring records up to date, and remove none."""
        view, now = self._shared.view, self._shared.clock()
        if not (self._active and view.live and self.held):
            return []
        if any(view.writer_of(instance_key(i)) != self.name for i in self._leaving):
            self._desire(now)
        records = self._fleet.encoded()
        taken = [key for key in records if view.writer_of(key) not in ("", self.name)]
        for key in taken:
            if not self._claims.may_take(key, now):
                del records[key]
        marker = None
        if not self._fleet.unjudged and self.reader.known is not None:
            content = CompleteMarker(self.name, self._shared.listings.order)
            marker = complete_key(self.name), encode_record(content)
        writes = plan(view, self.name, records, marker)
        if self.reader.known is None:
            writes = [write for write in writes if write.value is not None]
        del writes[WRITES_AT_ONCE:]
        self._stood = self._stood or (marker is not None and not writes)
        for key in {write.key for write in writes}.intersection(taken):
            self._claims.took(key, now)
        return writes


async def wait_at_most(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event, which is then cleared, or the time is over."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
    event.clear()
