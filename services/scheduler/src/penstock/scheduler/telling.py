"""What a scheduler tells the routing log: every decision, and what it works around."""

from __future__ import annotations

import logging

import msgspec

from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.live_config import PROFILE
from penstock.common.messages import Placement, Rejection, ScheduleBatch, ScheduleRequest
from penstock.common.open_requests import lost_outcome
from penstock.common.routing_events import (
    CONFIG_CHANGE,
    KV_EVENTS_OF,
    OUTCOME,
    PLACEMENT,
    REJECTION,
    WRITER_CHANGE,
    CandidateTerms,
    ConfigEvent,
    Inputs,
    PlacementEvent,
    RejectionEvent,
    ViewAge,
    WriterChange,
    WriterEvent,
)
from penstock.scheduler.chain import HASH_BYTES
from penstock.scheduler.decisions import Decision, Reasons
from penstock.scheduler.entries import Orphan
from penstock.scheduler.kv_feeds import TrustChange
from penstock.scheduler.precision import WINDOW

log = logging.getLogger(__name__)

INGRESS = "ingress"


class Teller:
    """Writes the events of one replica; degradations also as log lines."""

    def __init__(self, own: Identity, events: EventWriter) -> None:
        self._own, self._events = own, events

    @property
    def first(self) -> bool:
        """Whether decisions have to be told before anybody acts on them."""
        return self._events.spools

    def decision(
        self,
        batch: ScheduleBatch,
        request: ScheduleRequest,
        decision: Decision,
        view: ViewAge,
        inputs: Inputs | None = None,
    ) -> None:
        """A placement or a rejection; `inputs` if they are to be in the log."""
        outcome, basis, fault = decision.outcome, decision.basis, decision.fault
        # In the order of their fields: by name they cost three times as much.
        why = Reasons(
            decision.policy,
            decision.terms,
            decision.excluded,
            decision.seed,
            basis.profile.weights if basis is not None else {},
            view,
            str(fault) if fault is not None else "",
            inputs,
        )
        if isinstance(outcome, Placement):
            placement = placement_event(self._own.id, batch.ingress, request, outcome, why)
            if decision.prefill is not None:
                its = decision.prefill.basis
                weights = its.profile.weights if its is not None else {}
                placement = with_prefill(placement, decision.prefill.terms, weights)
            self._events.emit(PLACEMENT, request.model, request.request_id, placement)
        else:
            rejection = rejection_event(self._own.id, batch.ingress, request, outcome, why)
            self._events.emit(REJECTION, request.model, request.request_id, rejection)

    def settle(self) -> None:
        """Have decisions on disk before anybody acts on them, where there is a spool."""
        self._events.settle()

    def lost(self, orphan: Orphan, request_id: str, model: str) -> None:
        """An ingress is gone with this request in hand; what is not known of the request is empty."""
        outcome = lost_outcome(
            [orphan.decision_id],
            request_id,
            model,
            orphan.ingress,
            self._own.id,
            orphan.cause,
            orphan.instance,
        )
        self._events.emit(OUTCOME, model, request_id or orphan.decision_id, outcome)

    def gone(self, ingress: str, incarnation: str, cause: str) -> None:
        """An ingress is gone that had not said that it leaves."""
        writer = f"{INGRESS}/{ingress}"
        event = WriterEvent(writer, incarnation, WriterChange.SILENT, self._own.id, cause=cause)
        self._events.emit(WRITER_CHANGE, "", writer, event)

    def trust(self, change: TrustChange) -> None:
        """The KV-cache events of an instance are not used from here on, or are again."""
        share = f"{change.precision:.2f} of the expected tokens were cached over the last {WINDOW} answers"
        what = KV_EVENTS_OF + change.instance
        cause = share if not change.trusted else ""
        text = "used again, on trial" if change.trusted else "not trusted, placements alone count"
        self.degraded(what, not change.trusted, cause, f"KV-cache events of {change.instance} are {text}")

    def profile(self, model: str, change: str, version: int, origin: str) -> None:
        """The config profiles of a model were created, updated or deleted, here alone."""
        event = ConfigEvent(PROFILE, model, change, version, self._own.id, origin)
        self._events.emit(CONFIG_CHANGE, "", f"{PROFILE}/{model}", event)
        log.info("configuration %s", change, extra={"fields": {"kind": PROFILE, "name": model}})

    def degraded(self, what: str, active: bool, cause: str, text: str, level: int = logging.WARNING) -> None:
        """`what` is missing and worked around from here on (`active`), or no longer; the log says `text`."""
        log.log(level, text, extra={"fields": {"cause": cause}})
        self._events.degraded(what, active, cause)


def placement_event(
    replica: str, ingress: str, request: ScheduleRequest, outcome: Placement, why: Reasons
) -> PlacementEvent:
    """The event of a placement."""
    return PlacementEvent(
        outcome.decision_id,
        request.request_id,
        request.model,
        outcome.instance,
        outcome.policy,
        replica,
        ingress,
        outcome.prefill_instance,
        request.prompt_tokens,
        outcome.matched_blocks,
        len(request.block_hashes) // HASH_BYTES,
        why.terms,
        why.excluded,
        why.seed,
        why.weights,
        why.view,
        why.fault,
        why.inputs,
        outcome.profile,
    )


def with_prefill(
    placement: PlacementEvent, terms: list[CandidateTerms], weights: dict[str, float]
) -> PlacementEvent:
    """The event of a pair that was placed together, with the choice of prefill's instance."""
    return msgspec.structs.replace(placement, prefill_candidates=terms, prefill_weights=weights)


def rejection_event(
    replica: str, ingress: str, request: ScheduleRequest, outcome: Rejection, why: Reasons
) -> RejectionEvent:
    """The event of a rejection."""
    return RejectionEvent(
        decision_id=outcome.decision_id,
        request_id=request.request_id,
        model=request.model,
        reason=outcome.reason.value,
        replica=replica,
        ingress=ingress,
        message=outcome.message,
        excluded=why.excluded,
        policy=why.policy,
        seed=why.seed,
        view=why.view,
        inputs=why.inputs,
    )
