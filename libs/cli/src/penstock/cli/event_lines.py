"""Routing events: out of a stream's messages, and onto one line each."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from penstock.cli.terminal import CYAN, GREEN, GREY, MAGENTA, RED, YELLOW, paint, plain
from penstock.common.routing_events import (
    LOST,
    AdmittedEvent,
    BreakerEvent,
    ComparisonEvent,
    ConfigEvent,
    DegradedEvent,
    FallbackEvent,
    GapEvent,
    InstanceEvent,
    MirroredEvent,
    OutcomeEvent,
    PlacementEvent,
    QueuedEvent,
    RejectionEvent,
    ResponseFigures,
    RetryEvent,
    RouteEvent,
    WriterEvent,
)

SINGLE_TYPE, BATCH_TYPE = "application/cloudevents+json", "application/cloudevents-batch+json"

Detour = RouteEvent | RetryEvent | FallbackEvent | QueuedEvent | BreakerEvent
Data = (
    Detour
    | PlacementEvent
    | RejectionEvent
    | OutcomeEvent
    | InstanceEvent
    | DegradedEvent
    | MirroredEvent
    | ComparisonEvent
    | ConfigEvent
    | AdmittedEvent
    | GapEvent
    | WriterEvent
)

_KINDS: dict[str, tuple[type[Data], str]] = {
    "placement": (PlacementEvent, CYAN),
    "rejection": (RejectionEvent, YELLOW),
    "outcome": (OutcomeEvent, GREEN),
    "instance": (InstanceEvent, MAGENTA),
    "degraded": (DegradedEvent, RED),
    "config": (ConfigEvent, YELLOW),
    "route": (RouteEvent, CYAN),
    "retry": (RetryEvent, YELLOW),
    "fallback": (FallbackEvent, YELLOW),
    "queued": (QueuedEvent, YELLOW),
    "breaker": (BreakerEvent, RED),
    "mirrored": (MirroredEvent, GREY),
    "comparison": (ComparisonEvent, GREY),
    "admitted": (AdmittedEvent, GREY),
    "gap": (GapEvent, RED),
    "writer": (WriterEvent, YELLOW),
}
MAX_SHOWN_DATA = 200
# penstock.ingress.outcomes.Outcome.COMPLETED; importing the ingress costs a command line tool too much.
COMPLETED = "completed"


class BrokenEvent(Exception):
    """Bytes that are not the events their headers announce."""


class Event(msgspec.Struct, frozen=True):
    """One CloudEvent; `raw` is all of it, `data` is read by type."""

    id: str
    type: str
    time: str
    subject: str = ""
    data: msgspec.Raw = msgspec.Raw(b"null")
    specversion: str = ""

    @property
    def kind(self) -> str:
        """`placement` of `penstock.placement.v1`; another system's type stays as it is."""
        parts = self.type.split(".")
        return parts[1] if len(parts) == 3 and parts[0] == "penstock" else self.type


_single = msgspec.json.Decoder(msgspec.Raw)
_batch = msgspec.json.Decoder(list[msgspec.Raw])
_event = msgspec.json.Decoder(Event)


def split(headers: Mapping[str, str], payload: bytes) -> list[bytes]:
    """The events of one message, each as JSON. Raises BrokenEvent."""
    named = {name.lower(): value for name, value in headers.items()}
    content_type = named.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if content_type == BATCH_TYPE:
            return [bytes(raw) for raw in _batch.decode(payload)]
        if content_type == SINGLE_TYPE:
            return [bytes(_single.decode(payload))]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise BrokenEvent(f"not JSON: {exc}") from exc
    raise BrokenEvent(f"content-type {content_type!r} is none of CloudEvents")


def parse(raw: bytes) -> Event:
    """Raises BrokenEvent."""
    try:
        return _event.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise BrokenEvent(f"not a CloudEvent: {exc}") from exc


def as_json_line(raw: bytes) -> str:
    """An event as JSON without line breaks. Raises BrokenEvent."""
    try:
        return msgspec.json.format(raw, indent=-1).decode()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise BrokenEvent(f"not JSON: {exc}") from exc


def as_text(event: Event, colour: bool) -> str:
    """`time type id facts`, local time. Raises BrokenEvent if the data is not what the type says."""
    kind, shade = _KINDS.get(event.kind, (None, ""))
    words = _facts(_data(event, kind)) if kind else [plain(bytes(event.data).decode())[:MAX_SHOWN_DATA]]
    if event.kind == "outcome" and words[0] != COMPLETED:
        shade = RED
    return " ".join(
        [
            paint(_clock(event.time), GREY if colour else ""),
            paint(f"{plain(event.kind):<9}", shade if colour else ""),
            plain(event.subject),
            *map(plain, filter(None, words)),
        ]
    )


def _data(event: Event, kind: type[Data]) -> Data:
    try:
        return msgspec.json.decode(event.data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise BrokenEvent(f"data of {event.type}: {exc}") from exc


def _facts(data: Data) -> list[str]:
    match data:
        case PlacementEvent():
            prefill = f"{data.prefill_instance} + " if data.prefill_instance else ""
            matched = f"matched={data.matched_blocks}/{data.blocks}" if data.blocks else ""
            return [f"-> {prefill}{data.instance}", f"policy={data.policy}", matched, f"by={data.replica}"]
        case RejectionEvent():
            return [data.reason, data.message, f"model={data.model}", f"by={data.replica}"]
        case OutcomeEvent():
            return _outcome(data)
        case InstanceEvent():
            models = f"models={','.join(data.models)}" if data.models else ""
            reason = f"reason={data.reason}" if data.reason else ""
            return [data.change, data.endpoint, f"source={data.source}", data.state, models, reason]
        case DegradedEvent():
            state = "began" if data.active else "ended"
            return [f"{data.service}/{data.id}", data.what, state, data.cause]
        case RouteEvent() | RetryEvent() | FallbackEvent() | QueuedEvent() | BreakerEvent():
            return _detour(data)
        case AdmittedEvent():
            return [f"{one.decision_id} of {one.request_id}" for one in data.requests]
        case GapEvent():
            numbers = f"run {data.incarnation}, events {data.first}-{data.last}"
            return [numbers, f"{data.count} missing" if data.count else "how many is not known", data.cause]
        case WriterEvent():
            last = f"at event {data.last}" if data.last else ""
            return [data.change, f"run {data.incarnation}", last, f"by={data.by}", data.cause]
        case ConfigEvent():
            return [data.change, f"version={data.version}", f"by={data.by}", f"origin={data.origin}"]
        case MirroredEvent():
            status = str(data.status) if data.status else ""
            return [data.result, status, data.reason, f"{data.total_ms:.1f} ms" if data.total_ms else ""]
        case ComparisonEvent():
            return [f"primary {_figures(data.primary)},", f"shadow {_figures(data.shadow)}"]


def _figures(figures: ResponseFigures) -> str:
    length = (
        f"{figures.completion_tokens} tokens" if figures.completion_tokens else f"{figures.bytes_out} bytes"
    )
    words = (f"{figures.status}", f"{figures.total_ms:.1f} ms", f"ttft={figures.ttft_ms:.1f}", length)
    return " ".join((*words, figures.finish_reason)).rstrip()


def _detour(data: Detour) -> list[str]:
    match data:
        case RouteEvent():
            return [f"-> {data.route}", f"reason={data.reason}", f"model={data.model}"]
        case RetryEvent():
            delay = f"delay={data.delay_ms:.0f} ms" if data.delay_ms else ""
            return [
                data.result,
                f"away from {data.instance}",
                f"cause={data.cause}",
                f"retry={data.retry}",
                delay,
            ]
        case FallbackEvent():
            return [f"-> {data.route}", f"cause={data.cause}", data.error]
        case QueuedEvent():
            waited = f"after {data.waited_ms:.0f} ms" if data.waited_ms else ""
            return [data.result, f"route={data.route}", waited]
        case BreakerEvent():
            return [data.state, f"{data.kind} {data.target}", f"by={data.ingress}"]


def _outcome(data: OutcomeEvent) -> list[str]:
    tokens = f"tokens={data.prompt_tokens}+{data.completion_tokens}" if data.completion_tokens else ""
    return [
        data.outcome,
        str(data.status),
        f"from {data.instance}" if data.instance else "",
        f"route={data.route}" if data.route else "",
        f"witness={data.witness}" if data.outcome == LOST else "",
        f"{data.e2e_ms:.1f} ms",
        f"ttft={data.ttft_ms:.1f}" if data.ttft_ms else "",
        f"scheduling={data.scheduling_ms:.2f}" if data.scheduling_ms else "",
        f"attempts={data.attempts}" if data.attempts > 1 else "",
        tokens,
        data.error,
    ]


def _clock(stamp: str) -> str:
    try:
        moment = datetime.fromisoformat(stamp).astimezone()
    except ValueError:
        return plain(stamp)[:12]
    return f"{moment:%H:%M:%S}.{moment.microsecond // 1000:03d}"
