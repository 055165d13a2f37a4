"""A scheduler's span for a traced request."""

import time

import pytest

from penstock.common.adapters.memory_bus import MemoryBroker
from penstock.common.identity import Identity
from penstock.common.messages import ScheduleBatch, ScheduleRequest, TraceMark
from penstock.common.telemetry import Metrics
from penstock.common.tracing import Context, Spans
from penstock.scheduler.tracing import DecisionTraces

from .scheduler_service_lab import replica

PARENT = Context(b"t" * 16, 7)


def batch(*marks: TraceMark) -> ScheduleBatch:
    requests = tuple(ScheduleRequest(f"d{n}", f"r{n}", "m") for n in range(3))
    return ScheduleBatch("i", "1", 50.0, requests, marks)


@pytest.mark.parametrize("context", [PARENT.pack(), bytes(24)])
async def test_a_decision_about_a_traced_request_is_a_child_of_the_ingress_span(context: bytes) -> None:
    spans = Spans(Metrics())
    async with replica(MemoryBroker()) as running:
        service = running.service
        service._traces = DecisionTraces(Identity("scheduler", "s1", "1"), spans, time.time_ns)
        # One that is not of this batch is passed over.
        reply = service._on_schedule(batch(TraceMark("d1", context), TraceMark("d9", PARENT.pack())))
        assert reply is not None
        assert [outcome.decision_id for outcome in reply.outcomes] == ["d0", "d1", "d2"]
    ended = spans.take(10)
    if not any(context):
        assert ended == []
        return
    (span,) = ended
    assert (span.name, span.kind, span.trace_id, span.parent_id) == ("decide", "server", b"t" * 16, 7)
    assert span.attributes["penstock.decision_id"] == "d1"
    assert span.attributes["error.type"] == span.error == "unknown_model"
    assert span.end_ns >= span.start_ns
