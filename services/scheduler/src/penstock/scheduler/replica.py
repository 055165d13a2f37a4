"""Replica: what one scheduler knows and decides - view, index and ledger, kept in step."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.common.bus import WatchEvent
from penstock.common.identity import Identity
from penstock.common.instances import InstanceTable
from penstock.common.messages import (
    EngineStatus,
    KvEvents,
    LoadReport,
    Mode,
    Placed,
    PlacedFeed,
    Placement,
    ScheduleBatch,
    ScheduleRequest,
    Stage,
)
from penstock.common.routing_events import ViewAge
from penstock.scheduler.ages import Ages
from penstock.scheduler.chain import HASH_BYTES, chain_of
from penstock.scheduler.decisions import Decision
from penstock.scheduler.dividing import PREFILL_SUFFIX, schedule_divided
from penstock.scheduler.draws import seed_of
from penstock.scheduler.echo import Echo
from penstock.scheduler.feed import Backlog, FeedReader, FeedWriter
from penstock.scheduler.kv_bound import KvBound
from penstock.scheduler.kv_feeds import KvFeeds
from penstock.scheduler.ledger import InFlightLedger
from penstock.scheduler.peers import Peers
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.profile import Division
from penstock.scheduler.restarts import Restarts
from penstock.scheduler.scheduler import schedule
from penstock.scheduler.snapshot import Giver, Taker
from penstock.scheduler.speeds import Speeds
from penstock.scheduler.view import ClusterView

MIN_CONFIRM_S = 1.0
MAX_CONFIRM_S = 60.0
# Of a placement: (decision id, instance, slot, leading blocks it holds, prompt tokens to compute).
_Part = tuple[str, str, int, int, int]


class Replica:
    """Every argument `now` is the same monotonic clock, in seconds."""

    def __init__(
        self,
        own: Identity,
        catalog: Catalog,
        default: str,
        max_prefix_blocks: int,
        failover_domain_label: str = "",
        division: Division = Division(),  # noqa: B008  # frozen
        *,
        prefix_max_age_s: float = 0.0,
        prefix_kv_factor: float = 0.0,
    ) -> None:
        """Prefix blocks not used for `prefix_max_age_s` are forgotten; 0: never for their age. For
        `prefix_kv_factor` see KvBound."""
        self._catalog, self._default, self._division = catalog, default, division
        self.table = InstanceTable()
        self.view = ClusterView(seed_of(own.id), failover_domain_label)
        self._echo = Echo(self.view.loads)
        self.index = PrefixIndex(max_prefix_blocks)
        self._prefix_max_age_s = prefix_max_age_s
        self._kv_bound = KvBound(max_prefix_blocks, prefix_kv_factor)
        self.kv_feeds = KvFeeds(self.index, self.view.slot)
        self._restarts = Restarts()
        self._speeds = Speeds(self.view.loads, self.view.slot, self.kv_feeds.judge)
        self.ledger = InFlightLedger()
        self.peers = Peers(own)
        self._writer, self._reader = FeedWriter(own), FeedReader(own)
        self._ranked_for: tuple[str, ...] = ()
        self._backlog, self._holds = Backlog(), False
        self._age = Ages()
        # Placements of siblings that never arrived: in all, and since a snapshot last made up for them.
        self.feed_missed = self.missing = 0
        self.giver = Giver(own, self.view, self.index, self._writer, self._reader)
        self.taker = Taker(self.view, self.index, self._reader)

    def decide(self, request: ScheduleRequest, now: float) -> Decision:
        """One decision on the numbers of `now`; nothing else is changed by it. Reserve a placement before
        the next."""
        if self._ranked_for != self.peers.schedulers:
            self._rank()
        self._echo.expire(now)
        self.view.advance(now)
        view, index, catalog, replicas = self.view, self.index, self._catalog, self.peers.replicas
        if request.mode is Mode.NEUTRAL:
            return schedule(request, view, index, catalog, default=self._default, replicas=replicas)
        return schedule_divided(
            request, view, index, catalog, self._division, default=self._default, replicas=replicas
        )

    def age(self, now: float) -> ViewAge:
        """How old the knowledge behind a decision of `now` is."""
        return self._age.of(self.ledger, self.view.loads, self.behind, now)

    def reserve(
        self, batch: ScheduleBatch, request: ScheduleRequest, decision: Decision, now: float
    ) -> list[Placed]:
        """Count a decision made here, and say what the siblings have to know of it: nothing of a rejection,
        of a pair what either instance has to do."""
        outcome = decision.outcome
        if not isinstance(outcome, Placement):
            return []
        uncached = request.prompt_tokens - outcome.matched_tokens
        own: _Part = (request.decision_id, outcome.instance, decision.slot, outcome.matched_blocks, uncached)
        parts: tuple[_Part, ...] = (own,)
        if decision.prefill is not None:
            prefill = request.decision_id + PREFILL_SUFFIX, outcome.prefill_instance, decision.prefill.slot
            parts = (*prefill, outcome.matched_blocks, uncached), (*own[:3], 0, 0)
        elif request.stage is Stage.DECODE:
            parts = ((*own[:3], 0, 0),)
        placed, within_s = [], confirm_within_s(batch)
        basis = decision.basis
        drawn = outcome.matched_blocks > 0 and basis is not None and basis.profile.by_prefix
        for decision_id, instance, slot, matched, to_compute in parts:
            known = self.index.insert(decision.hashes, slot, matched)
            one = Placed(
                decision_id,
                batch.ingress,
                batch.incarnation,
                instance,
                request.prompt_tokens,
                known,
                request.block_hashes[known * HASH_BYTES :],
                to_compute,
            )
            self.ledger.place(one, within_s, now)
            self._echo.placed_here(batch, slot, to_compute, now, by_prefix=drawn)
            placed.append(one)
        self._kv_bound.placed(request.prompt_tokens, len(decision.hashes))
        self.view.take(self.ledger.changes())
        pool = self.view.pool(request.model)
        if pool is not None:
            pool.turn += 1
        return placed

    def feed(self, batch: ScheduleBatch, placed: list[Placed]) -> Iterator[PlacedFeed]:
        """The messages that tell the siblings."""
        return self._writer.messages(placed, confirm_within_s(batch))

    def came_back(self, message: bytes) -> bool:
        """Whether a message of the feed is this replica's own, which says that its placements came back."""
        placements = self._reader.own_placements(message)
        if placements < 0:
            return False
        self._echo.came_back(placements)
        return True

    def follow(self, feed: PlacedFeed, now: float) -> None:
        """Count what a sibling placed; one's own placements, coming back, are skipped."""
        if self._reader.is_own(feed):
            self._echo.came_back(len(feed.placed))
        elif self._holds:
            self._hold(feed, now)
        else:
            self._follow(feed, now)

    def _hold(self, message: PlacedFeed | KvEvents, now: float) -> None:
        for one in self._backlog.put(message):
            self._apply(one, now)

    def _apply(self, message: PlacedFeed | KvEvents, now: float) -> None:
        if isinstance(message, PlacedFeed):
            self._follow(message, now)
        else:
            self.kv_feeds.take(message)

    def _follow(self, feed: PlacedFeed, now: float) -> None:
        self._age.fed(now)
        self._echo.heard(len(feed.placed))
        missed = self._reader.missed(feed)
        self.feed_missed += missed
        self.missing += missed
        # Time that passed before must not be taken off the prefill that arrives here.
        self.view.advance(now)
        window = min(feed.confirm_within_s, MAX_CONFIRM_S)
        for placed in feed.placed:
            self.ledger.place(placed, window, now)
            slot = self.view.slot(placed.instance)
            if slot is None:
                continue
            if len(placed.tail) % HASH_BYTES == 0:
                self.index.insert(chain_of(placed.tail), slot)
        self.view.take(self.ledger.changes())

    def marker(self) -> PlacedFeed:
        """A message of the feed that says nothing, and is this replica's own."""
        return self._writer.marker()

    def is_own(self, feed: PlacedFeed) -> bool:
        """Whether this replica wrote it."""
        return self._reader.is_own(feed)

    def relearn(self, feed: PlacedFeed) -> int:
        """Take into the prefix index what was placed before this process began; the number of placements.
        What of it is still in flight, the ingresses tell."""
        for placed in feed.placed:
            slot = self.view.slot(placed.instance)
            if slot is not None and len(placed.tail) % HASH_BYTES == 0:
                self.index.insert(chain_of(placed.tail), slot)
        return len(feed.placed)

    @property
    def behind(self) -> int:
        """Placements of siblings that are not part of what this replica knows: held back, or missed."""
        return self._backlog.placements + self.missing

    def hold(self) -> None:
        """A snapshot comes in: what siblings place and engines say from here on waits for it, since it may be
        older than that."""
        self._holds, self.missing = True, 0

    def catch_up(self, now: float, placements: int) -> bool:
        """Apply so many of the placements held back; False once none are left, and no more are held."""
        for message in self._backlog.take(placements):
            self._apply(message, now)
        self._holds = len(self._backlog) > 0
        return self._holds

    def stood_still(self, seconds: float, now: float) -> None:
        """The process did not run until now: nobody's silence in that time means anything."""
        if not self.ledger.paused:
            self.ledger.pause(now - seconds)
            self.ledger.resume(now)
        self.peers.grace(now)

    def report(self, report: LoadReport, now: float) -> None:
        """Take an ingress's word."""
        self.view.advance(now)
        if self.ledger.report(report, now) and report.speeds:
            self._speeds.take(report.ingress, report.incarnation, report.speeds)
        self.view.take(self.ledger.changes())

    def status(self, status: EngineStatus, now: float) -> bool:
        """Take an engine's own numbers; False if there was nothing to take."""
        return self.view.take_status(status.instance, status.load, now - status.age_s)

    def kv_events(self, events: KvEvents, now: float) -> None:
        """Take what an engine says of its KV cache."""
        if self._holds:
            self._hold(events, now)
        else:
            self.kv_feeds.take(events)

    def registry(self, event: WatchEvent) -> tuple[list[str], list[str]] | None:
        """Follow the registry: (ids added, ids gone), None if no instance changed."""
        self._age.registry(event)
        if not self.table.apply(event):
            return None
        added, gone = self.view.refresh(self.table, self._forget)
        self._speeds.forget(instances=gone)
        self.kv_feeds.forget(gone)
        for instance in self._restarts.see(self.table.instances()):
            slot = self.view.slot(instance)
            if slot is not None and not self.kv_feeds.follows(instance):
                self.index.forget(1 << slot)
        self.view.take(self.ledger.full_load(instance) for instance in added)
        self._rank()
        return added, gone

    def expire(self, now: float) -> list[str]:
        """Drop what its time is up for; the ingresses released for silence."""
        self.peers.expire(now)
        if self._prefix_max_age_s:
            self.index.expire(now, self._prefix_max_age_s)
        self.index.resize(self._kv_bound.blocks(self.view.kv_tokens()))
        silent = self.ledger.expire(now)
        self._speeds.forget(ingresses=silent)
        self.view.take(self.ledger.changes())
        return silent

    def _rank(self) -> None:
        self._ranked_for = schedulers = self.peers.schedulers
        self._echo.rank(self.view.slots_in_order(), schedulers.index(self.peers.own), len(schedulers))

    def _forget(self, slots: int) -> None:
        self.index.forget(slots)
        while slots:
            lowest = slots & -slots
            self._echo.forget(lowest.bit_length() - 1)
            slots ^= lowest


def confirm_within_s(batch: ScheduleBatch) -> float:
    """Twice the ingress's deadline, by when its report covers a placement that it used."""
    return min(max(MIN_CONFIRM_S, 2.0 * batch.budget_ms / 1000.0), MAX_CONFIRM_S)
