"""Explaining: which decisions are kept with their full inputs, and what is answered about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec

from penstock.common.bus import Bus
from penstock.common.identity import Identity
from penstock.common.messages import (
    MAX_EXPLANATION_BYTES,
    ExplainReply,
    ExplainRequest,
    Placement,
    ScheduleBatch,
    ScheduleRequest,
)
from penstock.common.routing_events import CandidateTerms, Explained, Inputs, ViewAge
from penstock.common.subjects import DEFAULT_SHARD, EXPLAIN, EXPLAIN_NOW
from penstock.scheduler.decisions import Decision, Reasons, Recording
from penstock.scheduler.entries import Orphan
from penstock.scheduler.policies.custom import Policy, PolicyFault
from penstock.scheduler.recording import (
    BadInputs,
    Numbers,
    NumbersOf,
    PageWriter,
    Ring,
    decide_again,
    inputs_of,
    recording_of,
    verdict_of,
)
from penstock.scheduler.replica import Replica
from penstock.scheduler.telling import Teller, placement_event, rejection_event, with_prefill

OFF: Final = "off"
SAMPLED: Final = "sampled"
FULL: Final = "full"
# One decision in so many goes into the log with its inputs, by its seed: the same ones whoever asks.
SAMPLE_EVERY: Final = 100
# Rejections and fallbacks that do so in a second; under a flood of them the others go without.
TOLD_PER_S: Final = 50
# Events above it would not fit their stream with what surrounds them.
MAX_INPUTS_BYTES: Final = 192 * 1024
# Candidates of a decision, and decisions of a request, that an answer shows.
MAX_CANDIDATES, MAX_DECISIONS = 1000, 16


class Explaining:
    """`mode` is OFF, SAMPLED or FULL; OFF keeps nothing. `now` is a monotonic clock in seconds."""

    def __init__(self, own: Identity, replica: Replica, mode: str, custom: Mapping[str, Policy]) -> None:
        self._own, self._replica, self._custom = own, replica, custom
        self._keeps, self._full = mode != OFF, mode == FULL
        self.ring = Ring()
        self._page, self._numbers = PageWriter(), NumbersOf(replica.view.loads)
        self._second, self._told = 0, 0

    def numbers(self, decision: Decision) -> Numbers | None:
        """What a decision was made on, before it is reserved; None if nothing is kept."""
        return self._numbers.decision(decision) if self._keeps else None

    def keep(
        self,
        batch: ScheduleBatch,
        request: ScheduleRequest,
        decision: Decision,
        numbers: Numbers,
        view: ViewAge,
        now: float,
    ) -> Inputs | None:
        """Keep a decision of `now`; its inputs if its event is to hold them."""
        self._page.add(request, decision, numbers)
        if decision.seed % SAMPLE_EVERY and not self._full and not self._is_told(decision, now):
            return None
        return fitting(inputs_of(recording_of(request, decision, numbers, batch.ingress, view)))

    def end(self, batch: ScheduleBatch, view: ViewAge) -> None:
        """All of a message is kept."""
        page = self._page.page(batch.ingress, view)
        if page is not None:
            self.ring.keep(page)

    def tell_lost(self, orphans: Sequence[Orphan], teller: Teller) -> None:
        """What ingresses that are gone leave, with what this replica knows of the requests."""
        if not orphans:
            return
        known = self.ring.requests()
        for orphan in orphans:
            if not orphan.decision_id:
                teller.gone(orphan.ingress, orphan.incarnation, orphan.cause)
                continue
            request = known.get(orphan.decision_id)
            instance = self._replica.table.get(orphan.instance)
            model = instance.models[0] if instance is not None and instance.models else ""
            if request is None:
                teller.lost(orphan, "", model)
            else:
                teller.lost(orphan, request.request_id, request.model)

    def _is_told(self, decision: Decision, now: float) -> bool:
        """Whether it is a rejection or a fallback, and one of the first of this second."""
        if decision.fault is None and isinstance(decision.outcome, Placement):
            return False
        if int(now) != self._second:
            self._second, self._told = int(now), 0
        self._told += 1
        return self._told <= TOLD_PER_S

    async def serve(self, bus: Bus, clock: Callable[[], float], taking: Callable[[], bool]) -> None:
        """Answer what is asked of the ring and, while requests are `taking`, what would be decided now."""
        await bus.serve(EXPLAIN, self._on_explain, DEFAULT_SHARD)

        def on_now(request: ScheduleRequest) -> ExplainReply | None:
            return self._on_now(request, clock()) if taking() else None

        await bus.serve(EXPLAIN_NOW, on_now, DEFAULT_SHARD)

    def _on_explain(self, request: ExplainRequest) -> ExplainReply | None:
        """None if this replica did not decide it, or no longer knows: the others may."""
        found = self.ring.of(request.name)[-MAX_DECISIONS:]
        return self._reply([self.explained(one) for one in found]) if found else None

    def _on_now(self, request: ScheduleRequest, now: float) -> ExplainReply:
        """Decided like any other, and neither reserved nor told."""
        decision = self._replica.decide(request, now)
        numbers = self._numbers.decision(decision)
        return self._reply(
            [self.explained(recording_of(request, decision, numbers, "", self._replica.age(now)))]
        )

    def explained(self, recording: Recording) -> Explained:
        """Every candidate, and whether the same comes out again."""
        inputs, prefill = inputs_of(recording), recording.prefill
        verdict, terms = self._verdict(inputs, recording)
        facts = recording.facts
        why = Reasons(
            facts.policy,
            terms,
            facts.excluded,
            facts.seed,
            weights_of(recording),
            recording.view,
            facts.fault,
            fitting(inputs),
        )
        told_by, request, outcome = (self._own.id, recording.ingress), facts.request, facts.outcome
        if not isinstance(outcome, Placement):
            return Explained(verdict, None, rejection_event(*told_by, request, outcome, why))
        placement = placement_event(*told_by, request, outcome, why)
        if prefill is not None and inputs is not None:
            its_verdict, its_terms = self._verdict(inputs.prefill, prefill)
            placement = with_prefill(placement, its_terms, weights_of(prefill))
            verdict = verdict if its_verdict == verdict else f"{verdict}; prefill: {its_verdict}"
        return Explained(verdict, placement)

    def _verdict(self, inputs: Inputs | None, recording: Recording) -> tuple[str, list[CandidateTerms]]:
        """Whether a choice comes out again, and all its candidates."""
        if inputs is None:
            return "refused before any instance was looked at", []
        verdict, again = self._again(inputs, recording)
        return verdict, again.terms if again is not None else []

    def _again(self, inputs: Inputs, recording: Recording) -> tuple[str, Decision | None]:
        try:
            again = decide_again(inputs, self._custom, recording.facts.request, MAX_CANDIDATES)
        except (BadInputs, PolicyFault) as exc:
            return f"failed: {exc}"[:512], None
        return verdict_of(again, recording.facts.outcome, recording.facts.score), again

    def _reply(self, explained: list[Explained]) -> ExplainReply:
        """As many as fit, the last ones; a single one fits (MAX_CANDIDATES, MAX_INPUTS_BYTES)."""
        bodies = [msgspec.json.encode(one) for one in explained]
        while len(bodies) > 1 and sum(map(len, bodies)) > MAX_EXPLANATION_BYTES:
            bodies.pop(0)
        return ExplainReply(self._own.id, tuple(bodies))


def weights_of(recording: Recording) -> dict[str, float]:
    """The scorers' weights by name."""
    return recording.made_by[0].weights if recording.made_by is not None else {}


def fitting(inputs: Inputs | None) -> Inputs | None:
    """None if they are too large to be told."""
    if inputs is None:
        return None
    size = _size(inputs) + (_size(inputs.prefill) if inputs.prefill is not None else 0)
    return inputs if size <= MAX_INPUTS_BYTES else None


def _size(inputs: Inputs) -> int:
    arrays = sum(map(len, inputs.numbers.values())) + len(inputs.request.block_hashes)
    names = sum(map(len, inputs.instances)) + sum(len(mask) for _, mask in inputs.steps)
    # JSON holds bytes as base64; a record takes some 300 bytes.
    return arrays * 4 // 3 + names * 4 // 3 + 600 * len(inputs.records)
