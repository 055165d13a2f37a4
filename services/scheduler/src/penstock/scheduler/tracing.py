"""What a scheduler says in traces: one span for each decision about a traced request."""

from __future__ import annotations

from collections.abc import Callable

from penstock.common.identity import Identity
from penstock.common.messages import Placement, ScheduleBatch, ScheduleRequest
from penstock.common.tracing import Context, Ids, Span, Spans, Value, unpack
from penstock.scheduler.decisions import Decision

Marks = dict[str, Context]


class DecisionTraces:
    """Makes them; `spans` keeps them until they are sent."""

    def __init__(self, own: Identity, spans: Spans, wall_ns: Callable[[], int]) -> None:
        """`wall_ns`: Unix time in ns."""
        self._own, self._spans, self._wall_ns, self._ids = own, spans, wall_ns, Ids()

    def marks(self, batch: ScheduleBatch) -> Marks:
        """The parents of the spans to make, by decision id."""
        packed = ((mark.decision_id, unpack(mark.context)) for mark in batch.traces)
        return {decision_id: context for decision_id, context in packed if context is not None}

    def decided(
        self,
        parent: Context,
        batch: ScheduleBatch,
        request: ScheduleRequest,
        decision: Decision,
        took_s: float,
    ) -> None:
        """One decision that ended just now."""
        end_ns, outcome = self._wall_ns(), decision.outcome
        attributes: dict[str, Value] = {
            "penstock.decision_id": request.decision_id,
            "penstock.replica": self._own.id,
            "penstock.ingress": batch.ingress,
            "penstock.policy": decision.policy,
            "gen_ai.request.model": request.model,
            "penstock.blocks": len(decision.hashes),
            "penstock.batch_requests": len(batch.requests),
        }
        error = ""
        if isinstance(outcome, Placement):
            attributes |= {
                "penstock.instance": outcome.instance,
                "penstock.prefill_instance": outcome.prefill_instance,
                "penstock.matched_blocks": outcome.matched_blocks,
            }
        else:
            error = attributes["error.type"] = outcome.reason.value
        start_ns = end_ns - int(took_s * 1e9)
        span_id = self._ids.span()
        self._spans.add(
            Span(
                "decide",
                "server",
                parent.trace_id,
                span_id,
                parent.span_id,
                start_ns,
                end_ns,
                attributes,
                error=error,
            )
        )
