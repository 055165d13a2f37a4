"""Speeds: how fast instances are, from the sums that ingresses report."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from penstock.common.messages import InstanceSpeed
from penstock.common.model import InstanceId
from penstock.scheduler.loads import Loads
from penstock.scheduler.pool import Floats

# Ingresses times instances; past it what was heard so far is forgotten, and the next sums are the base.
MAX_HEARD = 262_144
# Of sums heard for the first time their ratio counts, as if it came from so few tokens.
FIRST_TOKENS = 10_000


class Speeds:
    """Adds what is new in the ingresses' sums to the loads."""

    def __init__(
        self,
        loads: Loads,
        slot_of: Callable[[InstanceId], int | None],
        judge: Callable[[InstanceSpeed, InstanceSpeed], None] = lambda now, before: None,
    ) -> None:
        """`judge` is told the sums of an instance and those that the same ingress sent before."""
        self._loads, self._slot_of, self._judge = loads, slot_of, judge
        self._heard: dict[str, tuple[str, dict[InstanceId, InstanceSpeed]]] = {}
        self._count = 0

    def take(self, ingress: str, incarnation: str, speeds: Iterable[InstanceSpeed]) -> None:
        """Sums of an ingress; those of instances that the registry does not hold are not kept."""
        known, heard = self._heard.get(ingress, ("", {}))
        if known != incarnation:
            self._count -= len(heard)
            heard = {}
            self._heard[ingress] = incarnation, heard
        for speed in speeds:
            slot = self._slot_of(speed.instance)
            if slot is not None:
                before = heard.get(speed.instance)
                self._count += before is None
                heard[speed.instance] = speed
                self._add(slot, speed, before)
        if self._count > MAX_HEARD:
            self._heard, self._count = {}, 0

    def forget(self, ingresses: Iterable[str] = (), instances: Iterable[InstanceId] = ()) -> None:
        """Ingresses that fell silent, instances that left."""
        for ingress in ingresses:
            _, heard = self._heard.pop(ingress, ("", {}))
            self._count -= len(heard)
        for instance in instances:
            for _, heard in self._heard.values():
                self._count -= heard.pop(instance, None) is not None

    def _add(self, slot: int, now: InstanceSpeed, before: InstanceSpeed | None) -> None:
        loads = self._loads
        first = before is None
        old = before or InstanceSpeed(now.instance)
        _add_ratio(
            loads.prefill_ms,
            loads.prefill_tokens,
            slot,
            now.prefill_ms - old.prefill_ms,
            now.uncached_tokens - old.uncached_tokens,
            first=first,
        )
        _add_ratio(
            loads.decode_ms,
            loads.decode_tokens,
            slot,
            now.decode_ms - old.decode_ms,
            now.decode_tokens - old.decode_tokens,
            first=first,
        )
        answers, tokens = now.requests - old.requests, now.output_tokens - old.output_tokens
        _add_ratio(loads.answer_tokens, loads.answers, slot, tokens, answers, first=first)
        # What an ingress did before this replica heard of it says nothing about the last minute.
        if before is not None:
            self._judge(now, before)
            loads.served[slot] += max(0, 2 * (now.prompt_tokens - old.prompt_tokens)) + max(0, tokens)


def _add_ratio(sums: Floats, counts: Floats, slot: int, more: int, count: int, *, first: bool) -> None:
    """Sums that fall are another incarnation's, or nonsense: no increase is taken from them."""
    if more < 0 or count <= 0:
        return
    share = min(1.0, FIRST_TOKENS / count) if first else 1.0
    sums[slot] += more * share
    counts[slot] += count * share
