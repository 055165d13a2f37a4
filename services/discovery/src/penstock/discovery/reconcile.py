"""What should stand in the registry: what a source lists, joined with what the probes found."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

import msgspec

from penstock.common.instances import encode_instance, instance_key
from penstock.common.model import Endpoint, Instance, InstanceId, InstanceState
from penstock.common.orders import DRAINED_BY
from penstock.common.routing_events import InstanceEvent
from penstock.common.subjects import INSTANCES
from penstock.discovery.flaps import Flaps

RETRY_FIRST_S = 0.5
# `penstock.io/drain: "true"` on a record: no new work, running requests finish.
DRAIN_LABEL = "penstock.io/drain"
# Whose the instance is, on a record that does not say it otherwise.
OWNER_LABEL = "penstock.io/owned-by"
NOT_LISTED = "its source does not list it"
_MAX_ADAPTERS = 4096


Amend = Callable[[Instance], Instance]


@dataclass(frozen=True)
class Verdict:
    """What one probe found. `fault` is empty for a healthy instance, else one word of a closed set;
    `reason` says it to a person, in the same words for the same fault. A healthy instance without
    models is one that does not say which it serves."""

    fault: str = ""
    reason: str = ""
    models: tuple[str, ...] = ()
    lora_adapters: tuple[str, ...] = ()
    owner: str = ""
    engine: str = ""


@dataclass
class _Health:
    """One instance: `base` as its source describes it, the rest from its probes.

    `record` is what should stand in the registry, `key` and `value` the same in its bytes. It is None until
    something is known: writing a guess would take a healthy instance from everyone who knows it from before.
    While `moved`, the instance has an address that was not probed yet and keeps the record of the old one.
    """

    base: Instance
    healthy: bool | None = None
    moved: bool = False
    adopted: bool = False
    metrics_engine: str = ""
    reason: str = ""
    last: Verdict = field(default_factory=Verdict)
    good: int = 0
    bad: int = 0
    record: Instance | None = None
    value: bytes = b""


class Fleet:
    """The instances of one source. `version` moves whenever a record changes. Times are seconds of one
    clock; one that jumps only changes how long flaps are remembered."""

    def __init__(
        self,
        source: str,
        rise: int,
        fall: int,
        flaps: Flaps | None = None,
        amend: Amend = lambda record: record,
    ) -> None:
        """`rise` good probes in a row end an unhealthy state (more for one that flaps), `fall` failed ones a
        healthy one. The first verdict on an instance nothing is known of decides alone. `amend` carries out
        what administrators ordered."""
        self._amend = amend
        self._source, self._rise, self._fall = source, rise, fall
        self._flaps = flaps or Flaps(0)
        self._held: dict[InstanceId, _Health] = {}
        self._unjudged: set[InstanceId] = set()
        self._stale = ""
        self.version = 0

    @property
    def unjudged(self) -> int:
        """Instances that wait for their first verdict; the round is complete at 0."""
        return len(self._unjudged)

    def bases(self) -> dict[InstanceId, Instance]:
        """The instances as their source described them last."""
        return {instance_id: health.base for instance_id, health in self._held.items()}

    def endpoints(self) -> dict[InstanceId, Endpoint]:
        """What to probe."""
        return {instance_id: health.base.endpoint for instance_id, health in self._held.items()}

    def records(self) -> list[Instance]:
        """What should stand in the registry."""
        return [health.record for health in self._held.values() if health.record is not None]

    def encoded(self) -> dict[str, bytes]:
        """The same, as key and value of the bucket."""
        return {
            instance_key(i): health.value for i, health in self._held.items() if health.record is not None
        }

    def adopt(self, records: Iterable[Instance]) -> None:
        """Start from what the registry holds of these: a restart or another source changes no state."""
        for record in records:
            self._unjudged.add(record.id)
            found = Verdict("", "", record.models, record.lora_adapters, record.owner)
            self._held[record.id] = _Health(
                msgspec.structs.replace(record, state=_lasting(record), reason="", owners={}),
                healthy=record.state is not InstanceState.UNHEALTHY,
                reason=record.reason,
                last=found,
                adopted=True,
                metrics_engine=record.engine,
                record=record,
                value=encode_instance(record),
            )

    def desire(
        self,
        instances: Iterable[Instance],
        now: float = 0.0,
        *,
        stale: str = "",
        elsewhere: Container[InstanceId] = (),
    ) -> list[InstanceEvent]:
        """The source lists exactly these, and cannot be read since for the reason `stale`, if any. What left
        for one of `elsewhere` belongs to another source from here on, without a word."""
        wanted = {instance.id: instance for instance in instances}
        events: list[InstanceEvent | None] = []
        for instance_id in self._held.keys() - wanted.keys():
            events.append(self._remove(instance_id, now, quietly=instance_id in elsewhere))
        same = stale == self._stale
        self._stale = stale
        for instance_id, base in wanted.items():
            health = self._held.get(instance_id)
            if health is None:
                self._admit(base)
            elif not same or health.adopted or health.base != base:
                events.append(self._redescribe(health, base))
        return [event for event in events if event is not None]

    def amended(self) -> list[InstanceEvent]:
        """The orders of administrators have changed."""
        events = [self._update(health) for health in self._held.values()]
        return [event for event in events if event is not None]

    def judge(
        self, instance_id: InstanceId, verdict: Verdict, now: float = 0.0, endpoint: Endpoint | None = None
    ) -> InstanceEvent | None:
        """Take the verdict of a probe of `endpoint`; unknown instances and old addresses are passed over."""
        health = self._held.get(instance_id)
        if health is None or endpoint not in (None, health.base.endpoint):
            return None
        self._unjudged.discard(instance_id)
        if health.healthy and not health.bad and not health.moved and verdict == health.last:
            # What nearly every probe finds: nothing to work out again.
            health.good += 1
            return None
        if verdict.fault:
            health.good, health.bad = 0, health.bad + 1
        else:
            health.good, health.bad = health.good + 1, 0
            health.last = verdict
        rise = self._flaps.rise(instance_id, self._rise, now)
        was, health.healthy = health.healthy, self._healthy(health, rise)
        health.moved = False
        if was and not health.healthy:
            self._flaps.fell(instance_id, now)
        health.reason = "" if health.healthy else verdict.reason or self._proving(health, rise, now)
        return self._update(health)

    def recognise(self, instance_id: InstanceId, engine: str, endpoint: Endpoint) -> InstanceEvent | None:
        """The metrics at `endpoint` say which engine this is; what its record or its model list says counts
        first."""
        health = self._held.get(instance_id)
        if health is None or not engine or endpoint != health.base.endpoint:
            return None
        health.metrics_engine = engine
        return self._update(health)

    def next_probe_s(self, instance_id: InstanceId, interval_s: float) -> float:
        """Seconds until the next probe: sooner after a failure, doubling up to the interval."""
        health = self._held.get(instance_id)
        if health is None or (health.healthy and not health.bad):
            return interval_s
        return float(min(interval_s, RETRY_FIRST_S * 2 ** min(max(health.bad - 1, 0), 16)))

    def _healthy(self, health: _Health, rise: int) -> bool:
        if health.healthy is None or health.moved:
            # One that fell twice and more within the window is no stranger, even if it went and came back.
            return health.bad == 0 and (rise <= self._rise or health.good >= rise)
        return health.bad < self._fall if health.healthy else health.good >= rise

    def _proving(self, health: _Health, rise: int, now: float) -> str:
        falls = self._flaps.recent(health.base.id, now)
        because = f", having failed {falls} times of late" if rise > self._rise else ""
        return f"{health.good} of {rise} good probes{because}"

    def _admit(self, base: Instance) -> None:
        self._unjudged.add(base.id)
        self._held[base.id] = _Health(base)

    def _redescribe(self, health: _Health, base: Instance) -> InstanceEvent | None:
        if base.endpoint != health.base.endpoint:
            # The verdicts so far were on somebody else, the next one decides alone.
            health.moved, health.good, health.bad = True, 0, 0
            self._unjudged.add(base.id)
        health.base, health.adopted = base, False
        return self._update(health)

    def _remove(self, instance_id: InstanceId, now: float, *, quietly: bool) -> InstanceEvent | None:
        self._unjudged.discard(instance_id)
        record = self._held.pop(instance_id).record
        if record is None:
            return None
        self.version += 1
        if quietly:
            return None
        if record.takes_work:
            self._flaps.fell(instance_id, now)
        return event_of(record, "removed", NOT_LISTED)

    def _update(self, health: _Health) -> InstanceEvent | None:
        """Bring the record in line with what is known."""
        if health.healthy is None or health.moved:
            return None
        before, after = health.record, self._record(health)
        if after == before:
            return None
        health.record, health.value = after, encode_instance(after)
        if len(health.value) > INSTANCES.max_value_bytes:
            health.record = after = _cut(after, len(health.value))
            health.value = encode_instance(after)
        self.version += 1
        change = _change(before, after)
        return event_of(after, change, after.reason) if change else None

    def _record(self, health: _Health) -> Instance:
        base, last = health.base, health.last
        models = _served(base, last)
        adapters = sorted({*base.lora_adapters, *last.lora_adapters} - {*models})
        state, reason = self._state(health, models)
        engine = base.engine or last.engine or health.metrics_engine
        record = msgspec.structs.replace(
            base,
            source=self._source,
            models=models or base.models,
            lora_adapters=tuple(adapters[:_MAX_ADAPTERS]),
            owner=base.owner or base.labels.get(OWNER_LABEL, "") or last.owner or engine,
            engine=engine,
            state=state,
            reason=reason,
        )
        return self._amend(record)

    def _state(self, health: _Health, models: tuple[str, ...]) -> tuple[InstanceState, str]:
        base = health.base
        if drains(base):
            return InstanceState.DRAINING, base.reason or "its source marks it so"
        if not health.healthy:
            return InstanceState.UNHEALTHY, health.reason
        if base.state is InstanceState.UNHEALTHY:
            return InstanceState.UNHEALTHY, base.reason or "its source says so"
        if not models:
            return InstanceState.UNHEALTHY, _serves_nothing(base, health.last)
        if self._stale:
            return InstanceState.STALE, self._stale
        return InstanceState.READY, ""


def drains(base: Instance) -> bool:
    """Whether a source marks the instance as draining, by state or label."""
    return base.state is InstanceState.DRAINING or base.labels.get(DRAIN_LABEL, "").lower() == "true"


def event_of(record: Instance, change: str, reason: str) -> InstanceEvent:
    """What is told of a change."""
    return InstanceEvent(
        instance=record.id,
        change=change,
        endpoint=str(record.endpoint),
        source=record.source,
        models=record.models,
        state=str(record.state),
        reason=reason,
        role=str(record.role),
    )


def _lasting(record: Instance) -> InstanceState:
    """The part of a record's state that came from its source, as far as can be told."""
    if record.reason.startswith(DRAINED_BY):
        return InstanceState.READY
    return InstanceState.DRAINING if record.state is InstanceState.DRAINING else InstanceState.READY


def _served(base: Instance, last: Verdict) -> tuple[str, ...]:
    """A record that names models restricts the instance to these; it stands for an engine that lists none."""
    if not base.models or not last.models:
        return base.models or last.models
    listed = {*last.models, *last.lora_adapters}
    return tuple(model for model in base.models if model in listed)


def _serves_nothing(base: Instance, last: Verdict) -> str:
    if not base.models:
        return "neither its record nor /v1/models names a model"
    return f"it serves {_some(last.models)}, its record names {_some(base.models)}"


def _some(names: tuple[str, ...]) -> str:
    shown = ", ".join(name[:100] for name in names[:2])
    return f"{shown} and {len(names) - 2} more" if len(names) > 2 else shown


def _cut(record: Instance, size: int) -> Instance:
    reason = f"its record would be {size} bytes, over {INSTANCES.max_value_bytes}: it names too many models"
    return msgspec.structs.replace(
        record, models=(), lora_adapters=(), state=InstanceState.UNHEALTHY, reason=reason
    )


def _change(before: Instance | None, after: Instance) -> str:
    """The word for it; empty if only the reason differs."""
    if before is None:
        return "added"
    if after.state is not before.state:
        return "recovered" if after.state is InstanceState.READY else str(after.state)
    return "updated" if msgspec.structs.replace(after, reason=before.reason) != before else ""
