"""Which requests an ingress has admitted and not ended, from its own events: what would be lost with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from penstock.common.event_batches import Witnessed
from penstock.common.routing_events import (
    ADMITTED,
    LOST,
    OUTCOME,
    ROUTED,
    Admission,
    AdmittedEvent,
    OutcomeEvent,
    RouteEvent,
)

# Past it the oldest are forgotten: more than an ingress process can have in hand.
MAX_OPEN = 262_144
TRACKED = {ADMITTED: AdmittedEvent, OUTCOME: OutcomeEvent, ROUTED: RouteEvent}


class OpenRequests:
    """Told every event of one ingress process, in order. Telling it the same again does no harm."""

    def __init__(self, admissions: Iterable[Admission] = ()) -> None:
        """`admissions` are those of a checkpoint."""
        self._open: dict[str, Admission] = {}
        for admission in admissions:
            self._enter(admission)

    def __len__(self) -> int:
        return len(self._open)

    def take(self, event: msgspec.Struct) -> None:
        """Note an event's data; other types than TRACKED say nothing."""
        match event:
            case AdmittedEvent():
                for admission in event.requests:
                    self._open.pop(_unasked(admission.request_id), None)
                    self._enter(admission)
            case OutcomeEvent():
                for decision in event.decisions or (_unasked(event.request_id),):
                    self._open.pop(decision, None)
            case RouteEvent():
                self._enter(Admission("", event.request_id, event.model))

    def checkpoint(self) -> list[Admission]:
        """All that are open."""
        return list(self._open.values())

    def chains(self) -> list[tuple[Admission, list[str]]]:
        """Each open request once: its last admission, and its decisions in order; none for one that was
        given a route and never asked a scheduler."""
        earlier = {admission.after for admission in self._open.values() if admission.after}
        ends = [one for one in self._open.values() if not one.decision_id or one.decision_id not in earlier]
        return [(end, self._chain(end)) for end in ends]

    def _chain(self, end: Admission) -> list[str]:
        chain: list[str] = []
        step: Admission | None = end if end.decision_id else None
        while step is not None and step.decision_id not in chain:
            chain.append(step.decision_id)
            step = self._open.get(step.after)
        return chain[::-1]

    def _enter(self, admission: Admission) -> None:
        if len(self._open) >= MAX_OPEN:
            del self._open[next(iter(self._open))]
        self._open[admission.decision_id or _unasked(admission.request_id)] = admission


def lost_outcome(
    decisions: Sequence[str],
    request_id: str,
    model: str,
    ingress: str,
    witness: str,
    cause: str,
    instance: str = "",
) -> Witnessed:
    """How a request ended whose ingress is dead: under an id made of its last decision's (without one, of
    the request's), so that what two witnesses say is one event. A real outcome beats it."""
    event = OutcomeEvent(
        request_id,
        model,
        LOST,
        0,
        "",
        ingress,
        list(decisions),
        instance,
        error=cause,
        witness=witness,
    )
    name = decisions[-1] if decisions else f"{ingress}/{request_id}"
    return Witnessed(f"{LOST}/{name}", f"/penstock/ingress/{ingress}", event)


def _unasked(request_id: str) -> str:
    """No decision id begins with it."""
    return f"/{request_id}"
