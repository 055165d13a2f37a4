"""What a scheduler tells the routing log: every decision, and what it works around."""

from __future__ import annotations

import logging

from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.messages import Placement, ScheduleBatch, ScheduleRequest
from penstock.common.routing_events import (
    DEGRADED,
    PLACEMENT,
    REJECTION,
    DegradedEvent,
    PlacementEvent,
    RejectionEvent,
)
from penstock.scheduler.scheduler import Decision

log = logging.getLogger(__name__)


class Teller:
    """Writes the events of one replica; degradations also as log lines."""

    def __init__(self, own: Identity, events: EventWriter) -> None:
        self._own, self._events = own, events

    def decision(self, batch: ScheduleBatch, request: ScheduleRequest, decision: Decision) -> None:
        """A placement or a rejection."""
        outcome = decision.outcome
        if isinstance(outcome, Placement):
            # In the order of its fields: by name they cost three times as much.
            placement = PlacementEvent(
                outcome.decision_id,
                request.request_id,
                request.model,
                outcome.instance,
                outcome.policy,
                self._own.id,
                batch.ingress,
                outcome.prefill_instance,
                request.prompt_tokens,
                outcome.matched_blocks,
                len(decision.hashes),
                decision.terms,
                decision.excluded,
                decision.seed,
            )
            self._events.emit(PLACEMENT, request.model, request.request_id, placement)
            return
        rejection = RejectionEvent(
            decision_id=outcome.decision_id,
            request_id=request.request_id,
            model=request.model,
            reason=outcome.reason.value,
            replica=self._own.id,
            ingress=batch.ingress,
            message=outcome.message,
            excluded=decision.excluded,
        )
        self._events.emit(REJECTION, request.model, request.request_id, rejection)

    def degraded(self, what: str, active: bool, cause: str, text: str, level: int = logging.WARNING) -> None:
        """`what` is missing and worked around from here on (`active`), or no longer; the log says `text`."""
        log.log(level, text, extra={"fields": {"cause": cause}})
        event = DegradedEvent(self._own.service, self._own.id, what, active, cause)
        self._events.emit(DEGRADED, "", self._own.service, event)
