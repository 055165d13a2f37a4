"""What should stand in the registry: what a source lists, joined with what the probes found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from penstock.common.model import Endpoint, Instance, InstanceId, InstanceState
from penstock.common.routing_events import InstanceEvent

RETRY_FIRST_S = 0.5


@dataclass(frozen=True)
class Verdict:
    """What one probe found. `fault` is empty for a healthy instance, else one word of a closed set;
    `reason` says it to a person, in the same words for the same fault."""

    fault: str = ""
    reason: str = ""
    models: tuple[str, ...] = ()
    lora_adapters: tuple[str, ...] = ()
    owner: str = ""


@dataclass
class _Health:
    """One instance: `base` as its source describes it, the rest from its probes.

    `healthy` is None until something is known: such an instance has no record, because writing a guess
    would take a healthy instance from everyone who knows it from before.
    """

    base: Instance
    healthy: bool | None = None
    reason: str = ""
    last: Verdict = field(default_factory=Verdict)
    good: int = 0
    bad: int = 0

    def record(self, source: str) -> Instance | None:
        if self.healthy is None:
            return None
        return msgspec.structs.replace(
            self.base,
            source=source,
            models=self.last.models,
            lora_adapters=self.last.lora_adapters,
            owner=self.base.owner or self.last.owner,
            state=self.base.state if self.healthy else InstanceState.UNHEALTHY,
            reason=self.reason,
        )


class Fleet:
    """The instances of one source. `version` moves whenever a record changes."""

    def __init__(self, source: str, rise: int, fall: int) -> None:
        """`rise` good probes in a row end an unhealthy state, `fall` failed ones a healthy one. The
        first verdict on an instance nothing is known of decides alone."""
        self._source, self._rise, self._fall = source, rise, fall
        self._held: dict[InstanceId, _Health] = {}
        self._unjudged: set[InstanceId] = set()
        self.version = 0

    @property
    def unjudged(self) -> int:
        """Instances that wait for their first verdict; the round is complete at 0."""
        return len(self._unjudged)

    def endpoints(self) -> dict[InstanceId, Endpoint]:
        """What to probe."""
        return {instance_id: health.base.endpoint for instance_id, health in self._held.items()}

    def records(self) -> list[Instance]:
        """What should stand in the registry."""
        records = (health.record(self._source) for health in self._held.values())
        return [record for record in records if record is not None]

    def adopt(self, records: Iterable[Instance]) -> None:
        """Start from what the registry holds of this source, so that a restart changes no state."""
        for record in records:
            self._unjudged.add(record.id)
            self._held[record.id] = _Health(
                record,
                healthy=record.state is not InstanceState.UNHEALTHY,
                reason=record.reason,
                last=Verdict("", "", record.models, record.lora_adapters, record.owner),
            )

    def desire(self, instances: Iterable[Instance]) -> list[InstanceEvent]:
        """The source lists exactly these. An instance whose endpoint changed is another instance."""
        wanted = {instance.id: instance for instance in instances}
        events = []
        for instance_id, health in list(self._held.items()):
            base = wanted.get(instance_id)
            if base is None or base.endpoint != health.base.endpoint:
                events.append(self._remove(instance_id))
        for instance_id, base in wanted.items():
            health = self._held.get(instance_id) or self._admit(base)
            before = health.record(self._source)
            health.base = base
            events.append(self._compare(before, health))
        return [event for event in events if event is not None]

    def judge(self, instance_id: InstanceId, verdict: Verdict) -> InstanceEvent | None:
        """Take the verdict of a probe; unknown instances are passed over."""
        health = self._held.get(instance_id)
        if health is None:
            return None
        before = health.record(self._source)
        self._unjudged.discard(instance_id)
        if verdict.fault:
            health.good, health.bad = 0, health.bad + 1
        else:
            health.good, health.bad = health.good + 1, 0
            health.last = verdict
        health.healthy = self._healthy(health)
        if health.healthy:
            health.reason = ""
        else:
            health.reason = verdict.reason or f"{health.good} of {self._rise} good probes"
        return self._compare(before, health)

    def next_probe_s(self, instance_id: InstanceId, interval_s: float) -> float:
        """Seconds until the next probe: sooner after a failure, doubling up to the interval."""
        health = self._held.get(instance_id)
        if health is None or (health.healthy and not health.bad):
            return interval_s
        return float(min(interval_s, RETRY_FIRST_S * 2 ** min(max(health.bad - 1, 0), 16)))

    def _healthy(self, health: _Health) -> bool:
        if health.healthy is None:
            return health.bad == 0
        return health.bad < self._fall if health.healthy else health.good >= self._rise

    def _admit(self, base: Instance) -> _Health:
        self._unjudged.add(base.id)
        health = self._held[base.id] = _Health(base)
        return health

    def _remove(self, instance_id: InstanceId) -> InstanceEvent | None:
        self._unjudged.discard(instance_id)
        record = self._held.pop(instance_id).record(self._source)
        if record is None:
            return None
        self.version += 1
        return _event(record, "removed", "its source does not list it")

    def _compare(self, before: Instance | None, health: _Health) -> InstanceEvent | None:
        after = health.record(self._source)
        if after is None or after == before:
            return None
        self.version += 1
        change = _change(before, after)
        return _event(after, change, after.reason) if change else None


def _change(before: Instance | None, after: Instance) -> str:
    """The word for it; empty if only the reason differs."""
    if before is None:
        return "added"
    if after.state is not before.state:
        ready_again = before.state is InstanceState.UNHEALTHY and after.state is InstanceState.READY
        return "recovered" if ready_again else str(after.state)
    return "updated" if msgspec.structs.replace(after, reason=before.reason) != before else ""


def _event(record: Instance, change: str, reason: str) -> InstanceEvent:
    return InstanceEvent(
        instance=record.id,
        change=change,
        endpoint=str(record.endpoint),
        source=record.source,
        models=record.models,
        state=str(record.state),
        reason=reason,
    )
