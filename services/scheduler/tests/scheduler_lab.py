"""The scheduler on virtual time: real replicas, the engine model, an ingress's reports, and their delays."""

from __future__ import annotations

import heapq
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count

import msgspec

from penstock.common.bus import Entry, Listing, Position
from penstock.common.codec import encode_record
from penstock.common.identity import Identity
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.messages import (
    CompleteMarker,
    EngineStatus,
    Heartbeat,
    InFlight,
    InstanceSpeed,
    LoadReport,
    Placement,
    ScheduleBatch,
    ScheduleRequest,
)
from penstock.common.model import Endpoint, EngineLoad, Instance
from penstock.ingress.speeds import Speeds
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.replica import Replica
from penstock.sim.cluster import Arrival, Cluster, Outcome
from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest, EngineSpec, TokenEvent

MODEL = "m"
REPORT_S, SPEEDS_S, STATUS_S = 0.025, 1.0, 5.0
REPORT_DELAY_S = 0.002


@dataclass(slots=True)
class _Open:
    work: InFlight
    sent_at: float
    first_token_at: float = 0.0


class Lab:
    """Some replicas in front of some engines, asked in turn. `feed_s` is how long a placement takes to the
    other replicas; load reports go out every 25 ms, speeds every second, engine status every 5 s."""

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        policy: str,
        *,
        replicas: int = 1,
        feed_s: float = 0.005,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.engines = [Engine(spec) for spec in specs]
        self.names = [f"e{number:03}" for number in range(len(specs))]
        weights = weights or [1.0] * len(specs)
        own = [Identity("scheduler", f"s{number}", "1") for number in range(replicas)]
        self.replicas = [Replica(one, Catalog(Thresholds()), policy, 1_000_000) for one in own]
        listing = _listing(
            Instance(id=name, endpoint=Endpoint("h", 1), models=(MODEL,), weight=weight)
            for name, weight in zip(self.names, weights, strict=True)
        )
        for replica in self.replicas:
            replica.registry(listing)
        self._own, self._feed_s = own, feed_s
        self._mail: list[tuple[float, int, Callable[[], object]]] = []
        self._ids = count()
        self._sequence = self._turn = 0
        self._last_at, self._batch = -1.0, ScheduleBatch("i", "1", 50.0, ())
        self._speeds = Speeds()
        self._open: dict[str, _Open] = {}
        self._changed: dict[str, InFlight] = {}
        self._finished: list[str] = []
        self._report_at = self._speeds_at = self._status_at = 0.0

    def run(self, arrivals: Sequence[Arrival]) -> list[Outcome]:
        """Outcomes in the order in which requests end."""
        return Cluster(self.engines, self.decide, self._observe).run(arrivals)

    def decide(self, request: EngineRequest, now: float, engines: Sequence[Engine]) -> int:
        """Index of the engine that a replica chose."""
        self._pass(now)
        # Requests of one instant share a message.
        if now != self._last_at:
            self._turn += 1
            self._last_at = now
            self._batch = ScheduleBatch("i", "1", 50.0, ())
        replica = self.replicas[self._turn % len(self.replicas)]
        hashes = [block << 4 for block in request.block_hashes]
        wanted = ScheduleRequest(
            f"d{next(self._ids)}",
            request.request_id,
            MODEL,
            prompt_tokens=request.prompt_tokens,
            block_hashes=struct.pack(f"<{len(hashes)}Q", *hashes),
        )
        decision = replica.decide(wanted, now)
        placement = decision.outcome
        assert isinstance(placement, Placement)
        placed = replica.reserve(self._batch, wanted, decision, now)
        for feed in replica.feed(self._batch, placed):
            for one in self.replicas:
                self._send(now + self._feed_s, partial(one.follow, feed, now + self._feed_s))
        work = InFlight(
            wanted.decision_id, placement.instance, request.prompt_tokens, 0, placement.matched_tokens
        )
        self._open[request.request_id] = _Open(work, now)
        self._changed[work.decision_id] = work
        return self.names.index(placement.instance)

    def _observe(self, event: TokenEvent, engine: int, now: float) -> None:
        self._pass(now)
        one = self._open[event.request_id]
        work = one.work
        if not one.first_token_at:
            one.first_token_at = now
            uncached = work.prompt_tokens - work.cached_tokens
            self._speeds.first_token(work.instance, one.sent_at, now, uncached)
            self._changed[work.decision_id] = msgspec.structs.replace(work, output_tokens=1)
        if event.finished:
            del self._open[event.request_id]
            self._changed.pop(work.decision_id, None)
            self._finished.append(work.decision_id)
            self._speeds.answered(work.instance, work.prompt_tokens, event.generated, one.first_token_at, now)

    def _send(self, at: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._mail, (at, next(self._ids), what))

    def _pass(self, now: float) -> None:
        while self._mail and self._mail[0][0] <= now:
            heapq.heappop(self._mail)[2]()
        if now >= self._report_at:
            self._report_at = now + REPORT_S
            self._report(now, tuple(self._changed.values()), tuple(self._finished))
            self._changed, self._finished = {}, []
        if now >= self._speeds_at:
            self._speeds_at = now + SPEEDS_S
            self.beat(now)
            for speeds in self._speeds.report():
                self._report(now, (), (), speeds)
        if now >= self._status_at:
            self._status_at = now + STATUS_S
            self._tell_status(now)

    def _report(
        self,
        now: float,
        in_flight: tuple[InFlight, ...],
        finished: tuple[str, ...],
        speeds: tuple[InstanceSpeed, ...] = (),
    ) -> None:
        self._sequence += 1
        report = LoadReport("i", "1", self._sequence, in_flight, finished, 0, 0, False, speeds)
        for replica in self.replicas:
            self._send(now + REPORT_DELAY_S, partial(replica.report, report, now + REPORT_DELAY_S))

    def beat(self, now: float) -> None:
        """Every replica hears of all."""
        for replica in self.replicas:
            replica.expire(now)
            for own in self._own:
                replica.peers.heard(Heartbeat("scheduler", own.id, "1", True), now)

    def _tell_status(self, now: float) -> None:
        for name, engine in zip(self.names, self.engines, strict=True):
            spec = engine.spec
            load = EngineLoad(
                engine.running, engine.waiting, engine.kv_usage_ratio, spec.kv_blocks, spec.block_size
            )
            for replica in self.replicas:
                replica.status(EngineStatus(name, load), now)


def burst(
    lab: Lab, requests: int, within_s: float, at_s: float, blocks: Sequence[int] = (), first: int = 0
) -> Counter[int]:
    """Requests per engine of a burst of new prompts, numbered from `first`."""
    return Counter(
        lab.decide(
            EngineRequest(f"b{number}", 500, 100, tuple(blocks) or (10**6 + number,)),
            at_s + within_s * (number - first) / requests,
            lab.engines,
        )
        for number in range(first, first + requests)
    )


def _listing(instances: Iterable[Instance]) -> Listing:
    entries = {complete_key("lab"): Entry(encode_record(CompleteMarker("lab", ("lab",))), 1)}
    for revision, instance in enumerate(instances, 2):
        entries[instance_key(instance.id)] = Entry(encode_instance(instance), revision)
    return Listing(Position("lab", len(entries)), entries)
