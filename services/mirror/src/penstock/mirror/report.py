"""What the mirror says of its work: metrics, events, log lines. Ids and figures, never a prompt or a key."""

from __future__ import annotations

import logging
from collections.abc import Callable

from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.messages import MirrorCopy
from penstock.common.routing_events import (
    COMPARISON,
    MIRRORED,
    ComparisonEvent,
    MirroredEvent,
    ResponseFigures,
)
from penstock.common.telemetry import Metrics

log = logging.getLogger(__name__)


class Report:
    """One replica's."""

    def __init__(self, identity: Identity, events: EventWriter, metrics: Metrics) -> None:
        self._identity, self._events = identity, events
        self._copies = metrics.counter(
            "penstock_mirror_copies_total", "Copies taken, by what became of them", "result", "reason"
        )
        self._answers = metrics.counter(
            "penstock_mirror_answers_total", "Responses of the shadow by status", "status"
        )
        self._seconds = metrics.histogram(
            "penstock_mirror_shadow_seconds", "Sending a copy to the end of its response"
        ).labels()
        self._comparisons = metrics.counter(
            "penstock_mirror_comparisons_total", "Requests compared with their shadows"
        )
        self.log_copies = False

    def sent(self, copy: MirrorCopy, figures: ResponseFigures) -> None:
        """The shadow answered, whatever it said."""
        self._answers.inc(str(figures.status))
        self._seconds.observe(figures.total_ms / 1000)
        self._say(copy, "sent", "", "", figures.status, figures.total_ms)

    def not_sent(self, copy: MirrorCopy, result: str, reason: str, detail: str, total_ms: float) -> None:
        """No response: `result` is failed, timed_out or dropped."""
        self._say(copy, result, reason, detail, 0, total_ms)

    def _say(
        self, copy: MirrorCopy, result: str, reason: str, detail: str, status: int, total_ms: float
    ) -> None:
        self._copies.inc(result, reason)
        event = MirroredEvent(
            copy.id, copy.request_id, copy.model, result, self._identity.writer, reason, status, total_ms
        )
        self._events.emit(MIRRORED, copy.model, copy.request_id, event)
        if self.log_copies:
            fields = {"request_id": copy.request_id, "result": result, "status": status, "ms": total_ms}
            why = {"reason": reason, "detail": detail} if reason else {}
            log.info("copy", extra={"fields": {**fields, **why}})

    def compared(self, event: ComparisonEvent) -> None:
        """Both halves are known."""
        self._comparisons.inc()
        self._events.emit(COMPARISON, event.model, event.request_id, event)

    def degraded(self, what: str, active: bool, cause: str) -> None:
        """Something is, or is no longer, worked around."""
        self._events.degraded(what, active, cause)


def expose(metrics: Metrics, values: dict[str, tuple[str, Callable[[], float]]]) -> None:
    """Gauges of the service, by the end of their name."""
    for name, (text, read) in values.items():
        metrics.gauge(f"penstock_mirror_{name}", text, read)
