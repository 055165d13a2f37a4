"""What the routing log, engines' status and heartbeats say of the fleet, added up. Everything is bounded."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable, Set
from typing import Annotated, TypeVar

import msgspec

from penstock.cli.top.view import (
    BreakerView,
    DegradedView,
    InstanceView,
    ProcessView,
    TotalsView,
    View,
)
from penstock.cli.top.window import Latest, Window
from penstock.common.messages import EngineStatus, Heartbeat
from penstock.common.model import TAKES_WORK, EngineLoad
from penstock.common.routing_events import KV_EVENTS_OF, BreakerEvent, DegradedEvent, InstanceEvent

MAX_INSTANCES = 10_000
MAX_OPEN = 100_000
MAX_STATES = 1_000
# A request that is not heard of for so long has ended unseen.
OPEN_AT_MOST_S = 3600.0
# Heartbeats come every second, an engine's status every few.
SILENT_AFTER_S, STATUS_AFTER_S = 5.0, 30.0
# Placed by an ingress without a scheduler.
LOCAL = "local"
# Of penstock.ingress.outcomes.Outcome; importing the ingress costs a command line tool too much. A client
# that leaves, and a request that is refused for what it asks, are no errors of the fleet.
_ERRORS = frozenset({"failed", "timed_out", "shutdown", "lost"})

K = TypeVar("K")
V = TypeVar("V")
Amount = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Placed(msgspec.Struct, frozen=True, gc=False):
    """What counts of a `placement` event."""

    decision_id: str
    instance: str
    policy: str = ""
    prefill_instance: str = ""
    matched_blocks: Amount = 0
    blocks: Amount = 0


class Ended(msgspec.Struct, frozen=True, gc=False):
    """What counts of an `outcome` event."""

    outcome: str
    status: int
    decisions: tuple[str, ...] = ()
    instance: str = ""
    ttft_ms: float = 0.0
    prompt_tokens: Amount = 0
    completion_tokens: Amount = 0
    cached_tokens: Amount = 0


class Refused(msgspec.Struct, frozen=True, gc=False):
    """What counts of a `rejection` event."""

    reason: str


def _keep(table: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    """Enter as the latest; past `most` the one that was entered first goes."""
    table[key] = value
    table.move_to_end(key)
    if len(table) > most:
        table.popitem(last=False)


class Fleet:
    """Told of events, status and heartbeats with their times (Unix seconds); `view` says how things stand."""

    def __init__(self, window_s: int, model: str = "") -> None:
        """With `model`, of its instances only."""
        self._model = model
        self._instances: OrderedDict[str, InstanceEvent] = OrderedDict()
        self._status: OrderedDict[str, tuple[float, EngineLoad]] = OrderedDict()
        # By decision: when, where, and the share of its prompt that was expected in the KV cache there.
        self._open: OrderedDict[str, tuple[float, tuple[str, ...], float]] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._beats: OrderedDict[tuple[str, str], tuple[float, Heartbeat]] = OrderedDict()
        self._degraded: OrderedDict[tuple[str, str, str], tuple[float, DegradedEvent]] = OrderedDict()
        self._breakers: OrderedDict[tuple[str, str, str], BreakerEvent] = OrderedDict()
        self._window, self._ttft = Window(window_s), Latest(window_s)
        self._listening_since: float | None = None
        self.broken = 0

    def connection(self, up: bool, now: float) -> None:
        """Nobody is silent because we were deaf."""
        self._listening_since = now if up else None

    def instance(self, event: InstanceEvent) -> None:
        """The registry changed."""
        if event.change == "removed":
            self._instances.pop(event.instance, None)
            self._status.pop(event.instance, None)
        elif event.change != "skipped" and (not self._model or self._model in event.models):
            _keep(self._instances, event.instance, event, MAX_INSTANCES)

    def degraded(self, at: float, event: DegradedEvent) -> None:
        """Something is missing, or there again."""
        key = event.service, event.id, event.what
        if not event.active:
            self._degraded.pop(key, None)
        elif key not in self._degraded:
            _keep(self._degraded, key, (at, event), MAX_STATES)

    def breaker(self, event: BreakerEvent) -> None:
        """A circuit breaker moved."""
        key = event.ingress, event.kind, event.target
        self._breakers.pop(key, None)
        if event.state != "closed":
            _keep(self._breakers, key, event, MAX_STATES)

    def placed(self, at: float, event: Placed) -> None:
        """A request was given an instance."""
        add = self._window.add
        add(at, "decisions")
        add(at, "blocks", event.blocks)
        add(at, "matched", event.matched_blocks)
        if event.policy == LOCAL:
            add(at, LOCAL)
        add(at, ("blocks", event.instance), event.blocks)
        add(at, ("matched", event.instance), event.matched_blocks)
        # The log of an ingress may be ahead of a scheduler's.
        if event.decision_id not in self._ended:
            both = tuple(filter(None, (event.instance, event.prefill_instance)))
            # What is computed elsewhere is counted as cached by every engine in its own way.
            share = (
                event.matched_blocks / event.blocks if event.blocks and not event.prefill_instance else 0.0
            )
            _keep(self._open, event.decision_id, (at, both, min(1.0, share)), MAX_OPEN)

    def ended(self, at: float, event: Ended) -> None:
        """A request ended."""
        share = 0.0
        for decision in event.decisions:
            share = self._open.pop(decision, (0.0, (), 0.0))[2]
            _keep(self._ended, decision, None, MAX_OPEN)
        add = self._window.add
        add(at, "requests")
        add(at, ("requests", event.instance))
        add(at, "tokens", event.completion_tokens)
        if event.prompt_tokens:
            add(at, "prompt", event.prompt_tokens)
            add(at, "cached", min(event.cached_tokens, event.prompt_tokens))
            expected = round(share * event.prompt_tokens)
            for of in ("", event.instance):
                add(at, ("expected", of), expected)
                add(at, ("confirmed", of), min(event.cached_tokens, expected))
        if event.outcome in _ERRORS or event.status >= 500:
            add(at, "errors")
            add(at, ("errors", event.instance))
        if event.ttft_ms > 0:
            self._ttft.add(at, event.ttft_ms)

    def refused(self, at: float, _: Refused) -> None:
        """A scheduler refused a request."""
        self._window.add(at, "rejections")

    def status(self, now: float, status: EngineStatus) -> None:
        """An engine's own load."""
        _keep(self._status, status.instance, (now, status.load), MAX_INSTANCES)

    def heartbeat(self, now: float, beat: Heartbeat) -> None:
        """A process is alive."""
        _keep(self._beats, (beat.service, beat.id), (now, beat), MAX_STATES)

    def view(self, now: float, connected: bool) -> View:
        """How things stand; busiest instances first."""
        self._forget(now)
        sums, in_flight = self._window.totals(now), Counter[str]()
        for _, where, _ in self._open.values():
            in_flight.update(where)
        # Each scheduler has a trust of its own; one that has none is enough to look at.
        told = (what for _, _, what in self._degraded)
        distrusted = {what.removeprefix(KV_EVENTS_OF) for what in told if what.startswith(KV_EVENTS_OF)}
        known = [
            self._instance_view(one, sums, in_flight, now, distrusted) for one in self._instances.values()
        ]
        known.sort(key=lambda one: (-one.in_flight, -(one.running or 0), one.id))
        return View(
            time=now,
            connected=connected,
            window_s=self._window.seconds,
            totals=self._totals(known, sums, now),
            instances=tuple(known),
            processes=tuple(
                ProcessView(beat.service, beat.id, beat.ready, beat.version)
                for _, (_, beat) in sorted(self._beats.items())
            ),
            degraded=tuple(
                DegradedView(one.service, one.id, one.what, one.cause, round(max(0.0, now - at), 1))
                for at, one in self._degraded.values()
            ),
            breakers=tuple(
                BreakerView(one.kind, one.target, one.state, one.ingress) for one in self._breakers.values()
            ),
            broken=self.broken,
        )

    def _forget(self, now: float) -> None:
        """What is too old, and what was said by processes that are no more."""
        while self._open and next(iter(self._open.values()))[0] < now - OPEN_AT_MOST_S:
            self._open.popitem(last=False)
        if self._listening_since is None or now - self._listening_since < SILENT_AFTER_S:
            return
        for key in [key for key, (at, _) in self._beats.items() if at < now - SILENT_AFTER_S]:
            del self._beats[key]
        for state in [key for key in self._degraded if key[:2] not in self._beats]:
            del self._degraded[state]
        alive = {name for service, name in self._beats if service == "ingress"}
        for breaker in [key for key in self._breakers if key[0] not in alive]:
            del self._breakers[breaker]

    def _instance_view(
        self,
        event: InstanceEvent,
        sums: Counter[Hashable],
        in_flight: Counter[str],
        now: float,
        distrusted: Set[str],
    ) -> InstanceView:
        name = event.instance
        at, load = self._status.get(name, (0.0, EngineLoad()))
        load = load if at > now - STATUS_AFTER_S else EngineLoad()
        return InstanceView(
            id=name,
            endpoint=event.endpoint,
            models=event.models,
            role=event.role,
            state=event.state,
            reason=event.reason,
            source=event.source,
            running=load.running,
            waiting=load.waiting,
            kv_usage_ratio=load.kv_usage_ratio,
            in_flight=in_flight[name],
            requests_per_s=self._rate(sums, ("requests", name)),
            errors_per_s=self._rate(sums, ("errors", name)),
            hit_ratio=_ratio(sums[("matched", name)], sums[("blocks", name)]),
            precision_ratio=_precision(sums, name),
            kv_events_distrusted=name in distrusted,
        )

    def _totals(self, known: list[InstanceView], sums: Counter[Hashable], now: float) -> TotalsView:
        p50, p99 = self._ttft.quantiles(now, 0.5, 0.99)
        return TotalsView(
            instances=len(known),
            taking_requests=sum(one.state in TAKES_WORK for one in known),
            in_flight=len(self._open),
            decisions_per_s=self._rate(sums, "decisions"),
            local_ratio=_ratio(sums[LOCAL], sums["decisions"]),
            rejections_per_s=self._rate(sums, "rejections"),
            requests_per_s=self._rate(sums, "requests"),
            errors_per_s=self._rate(sums, "errors"),
            tokens_per_s=self._rate(sums, "tokens"),
            match_ratio=_ratio(sums["matched"], sums["blocks"]),
            hit_ratio=_ratio(sums["cached"], sums["prompt"]),
            ttft_p50_ms=p50,
            ttft_p99_ms=p99,
            precision_ratio=_precision(sums, ""),
        )

    def _rate(self, sums: Counter[Hashable], key: Hashable) -> float:
        return round(sums[key] / self._window.seconds, 2)


def _ratio(part: float, whole: float) -> float | None:
    return round(min(1.0, part / whole), 4) if whole else None


def _precision(sums: Counter[Hashable], of: str) -> float | None:
    """None also where nothing was confirmed: engines that do not report cached tokens look like that."""
    confirmed = sums[("confirmed", of)]
    return _ratio(confirmed, sums[("expected", of)]) if confirmed else None
