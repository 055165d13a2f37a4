"""What is run: every combination that the settings name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from penstock.cli.replay.references import REFERENCES
from penstock.cli.replay.settings import ORACLE, ReplaySettings, asked_of, numbers


@dataclass(frozen=True)
class Setup:
    """One run. `delay_ms` is that of placements of other replicas and of load reports."""

    policy: str
    instances: int
    replicas: int = 1
    delay_ms: float = 0.0
    ingresses: int = 1
    seed: int = 0

    @property
    def all_knowing(self) -> bool:
        """Whether it reads the true caches."""
        return self.policy.partition(":")[0] == ORACLE

    @property
    def reference(self) -> bool:
        """Whether the formula is another gateway's."""
        return self.policy in REFERENCES

    @property
    def asked(self) -> str:
        """The policy as the scheduler names it."""
        return asked_of(self.policy)

    @property
    def alone(self) -> Setup:
        """The same with one replica."""
        return replace(self, replicas=1)

    @property
    def any_seed(self) -> Setup:
        """What runs that differ in chance alone have in common."""
        return replace(self, seed=0)


def setups(settings: ReplaySettings) -> Iterator[Setup]:
    """In the order of the report. All-knowing ones and references have one replica, one ingress, no delay."""
    replicas = [int(one) for one in sorted({1.0, *numbers(settings.replicas)})]
    delays, ingresses = numbers(settings.event_delay_ms), numbers(settings.ingresses)
    for instances in map(int, numbers(settings.instances)):
        for policy in settings.policies:
            plain = [Setup(policy, instances, seed=seed) for seed in settings.seeds]
            if plain[0].all_knowing or plain[0].reference:
                yield from plain
                continue
            for count, delay_ms, entries, one in product(replicas, delays, map(int, ingresses), plain):
                yield replace(one, replicas=count, delay_ms=delay_ms, ingresses=entries)


def oracle_of(setup: Setup, others: list[Setup]) -> Setup | None:
    """The all-knowing setup with the same policy and fleet, if it was run."""
    for other in others:
        alike = other.asked, other.instances, other.seed
        if other.all_knowing and alike == (setup.asked, setup.instances, setup.seed):
            return None if other == setup else other
    return None
