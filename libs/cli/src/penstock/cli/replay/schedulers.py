"""Replicas of the scheduler between simulated ingresses and simulated engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from penstock.cli.replay.ingress import INCARNATION, REPORT_EVERY_S, SimIngress
from penstock.cli.replay.setups import Setup
from penstock.cli.replay.timeline import Timeline
from penstock.common.bus import Entry, Listing, Position
from penstock.common.codec import encode_record
from penstock.common.identity import Identity
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.messages import (
    CompleteMarker,
    EngineStatus,
    Heartbeat,
    LoadReport,
    PlacedFeed,
    Placement,
    ScheduleBatch,
    ScheduleRequest,
)
from penstock.common.model import Endpoint, EngineLoad, Instance, Role
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.profile import Division
from penstock.scheduler.replica import Replica
from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest, TokenEvent

MODEL = "trace"
SCHEDULER = "scheduler"
# As the services have them: the ingress's budget, heartbeats, housekeeping, the rounds of the prober.
BUDGET_MS, BEAT_EVERY_S, KEEP_EVERY_S, PROBE_EVERY_S = 50.0, 1.0, 0.25, 5.0


class ReplayFailed(Exception):
    """A request was refused where nothing should be."""


class Schedulers:
    """The decision function of a simulated cluster, made of the real thing.

    A request enters by an ingress drawn at random; those of one instant and one ingress go to one replica,
    drawn too. A replica sees its own placements at once, those of others and load reports after the delay.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        catalog: Catalog,
        setup: Setup,
        packed: Callable[[str], bytes],
        *,
        index_blocks: int,
        kv_factor: float,
        seed: int,
        division: Division = Division(),  # noqa: B008  # frozen
    ) -> None:
        """`packed` gives the block hashes of a request id as they stand on the bus; instances have the roles
        of their engines."""
        self._engines, self._packed, self._seed = engines, packed, seed
        self._delay_s = setup.delay_ms / 1000
        self._names = [f"sim-{number:03}" for number in range(len(engines))]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._own = [Identity(SCHEDULER, f"s{number}", INCARNATION) for number in range(setup.replicas)]
        self.replicas = [
            Replica(own, catalog, setup.asked, index_blocks, division=division, prefix_kv_factor=kv_factor)
            for own in self._own
        ]
        self._timeline = Timeline()
        self._ingresses = [
            SimIngress(f"i{number}", self._timeline, self._report, number * REPORT_EVERY_S / setup.ingresses)
            for number in range(setup.ingresses)
        ]
        # Draws apart, so that every policy meets the same requests at the same ingress.
        self._to_ingress, self._to_replica = Random(f"{seed} ingress"), Random(f"{seed} replica")
        self._asked: dict[SimIngress, tuple[float, Replica, ScheduleBatch]] = {}
        self._open: dict[str, SimIngress] = {}
        self._decisions = 0
        # Prompt tokens that placements took for cached.
        self.expected_tokens = 0
        self._start()

    def use_index(self, index: PrefixIndex) -> None:
        """Let every replica ask `index` what instances hold."""
        for replica in self.replicas:
            replica.index = index

    def pass_to(self, now: float) -> None:
        """Let everything arrive that is under way until `now`."""
        self._timeline.pass_to(now)

    def decide(self, request: EngineRequest, now: float, engines: Sequence[Engine]) -> int:
        """Index of the engine that a replica chose. Raises ReplayFailed if it chose none."""
        self._timeline.pass_to(now)
        ingress = self._to_ingress.choice(self._ingresses)
        placement = self._place(ingress, self._wanted(request), now)
        ingress.sent(request.request_id, placement, request.prompt_tokens, now)
        self._open[request.request_id] = ingress
        self.expected_tokens += placement.matched_tokens
        return self._numbers[placement.instance]

    def observe(self, event: TokenEvent, engine: int, now: float) -> None:
        """A token goes to the ingress whose request it is."""
        if event.finished or event.generated <= 1:
            self._timeline.pass_to(now)
        ingress = self._open.pop(event.request_id) if event.finished else self._open[event.request_id]
        ingress.take(event, self._names[engine], now)

    def _wanted(self, request: EngineRequest) -> ScheduleRequest:
        self._decisions += 1
        return ScheduleRequest(
            decision_id=f"{self._seed}.{self._decisions}",
            request_id=request.request_id,
            model=MODEL,
            prompt_tokens=request.prompt_tokens,
            block_hashes=self._packed(request.request_id),
        )

    def _place(self, ingress: SimIngress, wanted: ScheduleRequest, now: float) -> Placement:
        """Ask a replica, have it count its answer, and let its siblings know."""
        replica, batch = self._asked_by(ingress, wanted, now)
        decision = replica.decide(wanted, now)
        placement = decision.outcome
        if not isinstance(placement, Placement):
            raise ReplayFailed(f"request {wanted.request_id} was refused: {placement.message}")
        if decision.fault is not None:
            raise ReplayFailed(f"request {wanted.request_id}: {decision.fault}")
        placed = replica.reserve(batch, wanted, decision, now)
        for feed in replica.feed(batch, placed):
            self._tell_all(feed, now)
        return placement

    def _asked_by(
        self, ingress: SimIngress, wanted: ScheduleRequest, now: float
    ) -> tuple[Replica, ScheduleBatch]:
        """Who is asked in which message: one message stands for all requests of an instant."""
        asked = self._asked.get(ingress)
        if asked is None or asked[0] != now:
            batch = ScheduleBatch(ingress.name, INCARNATION, BUDGET_MS, (wanted,))
            asked = self._asked[ingress] = now, self._to_replica.choice(self.replicas), batch
        return asked[1:]

    def _start(self) -> None:
        listing = _listing(self._names, self._engines)
        for replica in self.replicas:
            replica.registry(listing)
        self._timeline.every(BEAT_EVERY_S, self._beat)
        self._timeline.every(KEEP_EVERY_S, self._keep_house)
        self._timeline.every(PROBE_EVERY_S, self._probe)

    def _tell_all(self, feed: PlacedFeed, now: float) -> None:
        """The writer too: what comes back to it has reached the others."""
        for replica in self.replicas:
            self._timeline.at(now + self._delay_s, lambda at, to=replica: to.follow(feed, at))  # type: ignore[misc]

    def _report(self, report: LoadReport, now: float) -> None:
        for replica in self.replicas:
            self._timeline.at(now + self._delay_s, lambda at, to=replica: to.report(report, at))  # type: ignore[misc]

    def _beat(self, now: float) -> None:
        for replica in self.replicas:
            for own in self._own:
                replica.peers.heard(Heartbeat(SCHEDULER, own.id, INCARNATION, ready=True), now)

    def _keep_house(self, now: float) -> None:
        for replica in self.replicas:
            replica.expire(now)

    def _probe(self, now: float) -> None:
        for name, engine in zip(self._names, self._engines, strict=True):
            spec = engine.spec
            usage = engine.running, engine.waiting, engine.kv_usage_ratio
            load = EngineLoad(*usage, spec.kv_blocks, spec.block_size)
            for replica in self.replicas:
                replica.status(EngineStatus(name, load), now)


def _listing(names: Sequence[str], engines: Sequence[Engine]) -> Listing:
    """The registry as a replica first sees it."""
    entries = {complete_key("replay"): Entry(encode_record(CompleteMarker("replay", ("replay",))), 1)}
    for revision, (name, engine) in enumerate(zip(names, engines, strict=True), 2):
        role = Role(engine.spec.role)
        instance = Instance(id=name, endpoint=Endpoint("sim", 8000), models=(MODEL,), role=role)
        entries[instance_key(name)] = Entry(encode_instance(instance), revision)
    return Listing(Position("replay", len(entries)), entries)
