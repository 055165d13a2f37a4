"""Routing events on one line each; nothing in them can break or steer the reader."""

import msgspec
import pytest

from penstock.cli import event_lines
from penstock.cli.event_lines import BrokenEvent
from penstock.common.routing_events import (
    Admission,
    AdmittedEvent,
    ComparisonEvent,
    ConfigEvent,
    DegradedEvent,
    GapEvent,
    InstanceEvent,
    MirroredEvent,
    OutcomeEvent,
    PlacementEvent,
    RejectionEvent,
    ResponseFigures,
    WriterChange,
    WriterEvent,
)

BATCH, SINGLE = "application/cloudevents-batch+json", "application/cloudevents+json"


def event(kind: str, data: object, subject: str = "req-1") -> bytes:
    return msgspec.json.encode(
        {
            "specversion": "1.0",
            "id": "scheduler/a/1",
            "source": "/penstock/scheduler/a",
            "type": f"penstock.{kind}.v1",
            "subject": subject,
            "time": "2030-01-02T03:04:05.678Z",
            "data": data,
        }
    )


def facts(raw: bytes) -> str:
    """The line without its clock, which depends on the machine's zone."""
    return event_lines.as_text(event_lines.parse(raw), colour=False).split(" ", 1)[1]


@pytest.mark.parametrize(
    ("kind", "data", "line"),
    [
        (
            "admitted",
            AdmittedEvent("i", [Admission("a.1", "r1", "m"), Admission("a.2", "r2", "m")]),
            "admitted  req-1 a.1 of r1 a.2 of r2",
        ),
        (
            "gap",
            GapEvent("ingress/i", "run1", 3, 9, 7, "the buffer was full"),
            "gap       req-1 run run1, events 3-9 7 missing the buffer was full",
        ),
        (
            "writer",
            WriterEvent("ingress/i", "run1", WriterChange.ADOPTED, "j", 9, "it was killed"),
            "writer    req-1 adopted run run1 at event 9 by=j it was killed",
        ),
        (
            "outcome",
            OutcomeEvent("req-1", "m", "lost", 0, "", "i", ["a.1"], "sim-1", error="silent", witness="s1"),
            "outcome   req-1 lost 0 from sim-1 witness=s1 0.0 ms silent",
        ),
        (
            "placement",
            PlacementEvent("d1", "req-1", "m", "sim-1", "prefix-cache", "r1", blocks=4, matched_blocks=3),
            "placement req-1 -> sim-1 policy=prefix-cache matched=3/4 by=r1",
        ),
        (
            "placement",
            PlacementEvent("d1", "req-1", "m", "dec-1", "random", "r1", prefill_instance="pre-1"),
            "placement req-1 -> pre-1 + dec-1 policy=random by=r1",
        ),
        (
            "rejection",
            RejectionEvent("d1", "req-1", "m", "saturated", "r1", message="all full"),
            "rejection req-1 saturated all full model=m by=r1",
        ),
        (
            "outcome",
            OutcomeEvent(
                "req-1",
                "m",
                "completed",
                200,
                "/v1/chat/completions",
                "ingress-1",
                instance="sim-1",
                attempts=2,
                scheduling_ms=0.456,
                ttft_ms=12.34,
                e2e_ms=99.99,
                prompt_tokens=10,
                completion_tokens=5,
            ),
            "outcome   req-1 completed 200 from sim-1 100.0 ms ttft=12.3 scheduling=0.46 attempts=2"
            " tokens=10+5",
        ),
        (
            "config",
            ConfigEvent("drain", "req-1", "created", 3, "admin", "admin"),
            "config    req-1 created version=3 by=admin origin=admin",
        ),
        (
            "instance",
            InstanceEvent("sim-1", "added", "127.0.0.1:9", "endpoints", models=("a", "b"), state="ready"),
            "instance  req-1 added 127.0.0.1:9 source=endpoints ready models=a,b",
        ),
        (
            "degraded",
            DegradedEvent("ingress", "i1", "scheduler", True, "no answer"),
            "degraded  req-1 ingress/i1 scheduler began no answer",
        ),
        (
            "mirrored",
            MirroredEvent("c", "req-1", "m", "sent", "m1", status=200, total_ms=12.34),
            "mirrored  req-1 sent 200 12.3 ms",
        ),
        (
            "comparison",
            ComparisonEvent(
                "c",
                "req-1",
                "m",
                ResponseFigures(200, 1.0, 20.0, 900, 7, "stop"),
                ResponseFigures(502, total_ms=3.0, bytes_out=1),
            ),
            "comparison req-1 primary 200 20.0 ms ttft=1.0 7 tokens stop, shadow 502 3.0 ms ttft=0.0 1 bytes",
        ),
    ],
    ids=[
        "admitted",
        "gap",
        "writer",
        "lost",
        "placement",
        "disaggregated",
        "rejection",
        "outcome",
        "config",
        "instance",
        "degraded",
        "mirrored",
        "comparison",
    ],
)
def test_each_type_shows_what_matters(kind: str, data: object, line: str) -> None:
    assert facts(event(kind, data)) == line


def test_an_unknown_type_shows_the_head_of_its_data() -> None:
    line = facts(event("shadow", {"a": "x" * 1000}))
    assert line.startswith('shadow    req-1 {"a":"xxx')
    assert len(line) < 300


@pytest.mark.parametrize(
    ("content_type", "payload", "count"),
    [
        (SINGLE, event("shadow", 1), 1),
        (BATCH, b"[" + event("shadow", 1) + b"," + event("shadow", 2) + b"]", 2),
        (f"{BATCH}; charset=utf-8", b"[]", 0),
        (BATCH.upper(), b"[]", 0),
    ],
)
def test_single_events_and_batches_are_told_apart_by_header(
    content_type: str, payload: bytes, count: int
) -> None:
    assert len(event_lines.split({"Content-Type": content_type}, payload)) == count


@pytest.mark.parametrize(
    ("headers", "payload"),
    [
        ({"content-type": BATCH}, b"{}"),
        ({"content-type": BATCH}, b"\xff"),
        ({"content-type": SINGLE}, b"{} {}"),
        ({"content-type": BATCH}, b"[" * 100_000),
        ({"content-type": "text/plain"}, event("shadow", 1)),
        ({}, event("shadow", 1)),
    ],
)
def test_a_message_that_is_not_what_it_says_is_broken(headers: dict[str, str], payload: bytes) -> None:
    with pytest.raises(BrokenEvent):
        event_lines.split(headers, payload)


@pytest.mark.parametrize(
    "raw",
    [
        b"1",
        b"{}",
        b'{"id":1,"type":"t","time":"x"}',
        event("placement", {"instance": 7}),
        event("outcome", "text"),
        event("degraded", None),
    ],
)
def test_an_event_that_is_not_of_its_type_is_broken(raw: bytes) -> None:
    with pytest.raises(BrokenEvent):
        facts(raw)


def test_an_event_cannot_steer_the_terminal() -> None:
    hostile = RejectionEvent("d", "r", "m\u202e", "\x1b[2J", "\x07", message="a\nb")
    line = facts(event("rejection", hostile, subject="\x1b]0;title\x07"))
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line)


def test_json_lines_hold_the_whole_event_on_one_line() -> None:
    spread = msgspec.json.format(event("shadow", {"a": [1, 2], "b": "x\ny"}), indent=4)
    line = event_lines.as_json_line(spread)
    assert "\n" not in line
    assert msgspec.json.decode(line) == msgspec.json.decode(spread)


def test_a_time_that_is_none_is_shown_as_it_is() -> None:
    raw = event("shadow", 1).replace(b"2030-01-02T03:04:05.678Z", b"later")
    assert event_lines.as_text(event_lines.parse(raw), colour=False).startswith("later ")
