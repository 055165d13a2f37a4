"""What the routing log says: the data of each event type. Ids and counts only, never prompt text or keys.

The event's `subject` is the request id (the instance id for `instance`, the service for `degraded`, the
target for `breaker`, kind and name for `config`).
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from penstock.common.messages import ScheduleRequest
from penstock.common.model import Instance

PLACEMENT, REJECTION, OUTCOME, INSTANCE, DEGRADED, CONFIG_CHANGE = (
    "placement",
    "rejection",
    "outcome",
    "instance",
    "degraded",
    "config",
)
ROUTED, RETRY, FALLBACK, QUEUED, BREAKER = "route", "retry", "fallback", "queued", "breaker"
MIRRORED, COMPARISON = "mirrored", "comparison"
ADMITTED, GAP, WRITER_CHANGE = "admitted", "gap", "writer"
# The `outcome` of a request whose ingress cannot tell how it ended.
LOST = "lost"


class CandidateTerms(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One of the best candidates of a decision and what spoke for it: `terms` are its scores, 0..1, by
    scorer; weighted by the event's `weights` and summed up they are `score`."""

    instance: str
    score: float
    in_flight: int = 0
    matched_blocks: int = 0
    terms: dict[str, float] = {}


class ViewAge(msgspec.Struct, frozen=True, omit_defaults=True):
    """How old a replica's knowledge was at a decision, in ms; -1 for never heard. `registry_ms` is 0 while
    the watch vouches for it; `load_ms` is that of the ingress silent for longest, `engine_ms` that of the
    oldest engine status; `feed_ms` since a sibling's placements came last, `behind` of which are missing."""

    registry_ms: float = 0.0
    load_ms: float = -1.0
    engine_ms: float = -1.0
    feed_ms: float = -1.0
    behind: int = 0


class Inputs(msgspec.Struct, frozen=True, omit_defaults=True):
    """All that a choice among candidates followed from; re-computed, it gives the same one, bit for bit.

    `request` is without user and session, for which `session_seed` stands. `policy` is the one that decided,
    `thresholds` what it was built with. `instances` are the candidates that the filters left, in order;
    `numbers` are little-endian f64 arrays aligned with them, by name in the scheduler's Loads; `steps` are
    pairs of leading blocks and the candidates that hold so many, as little-endian bits. `records` are there
    for policies of the operator's own, which may read them. Of a pair that was placed together these are of
    decode's instance, and `prefill` of the other's.
    """

    request: ScheduleRequest
    policy: str
    seed: int
    turn: int
    replicas: int
    session_seed: int = 0
    thresholds: dict[str, int | float] = {}
    instances: list[str] = []
    numbers: dict[str, bytes] = {}
    steps: list[tuple[int, bytes]] = []
    records: list[Instance] = []
    prefill: Inputs | None = None


class PlacementEvent(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A request was given an instance, by a scheduler or, in need, its ingress (`policy` "local"). `profile`
    is the config profile that counted, if one did. Of a pair that was placed together, what begins with
    `prefill_` is of the choice of prefill's instance, the rest of decode's."""

    decision_id: str
    request_id: str
    model: str
    instance: str
    policy: str
    replica: str
    ingress: str = ""
    prefill_instance: str = ""
    prompt_tokens: int = 0
    matched_blocks: int = 0
    blocks: int = 0
    candidates: list[CandidateTerms] = []
    excluded: dict[str, int] = {}
    seed: int = 0
    weights: dict[str, float] = {}
    view: ViewAge | None = None
    fault: str = ""
    inputs: Inputs | None = None
    profile: str = ""
    prefill_candidates: list[CandidateTerms] = []
    prefill_weights: dict[str, float] = {}


class RejectionEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request was refused before dispatch; `excluded` counts the instances filtered out, by filter."""

    decision_id: str
    request_id: str
    model: str
    reason: str
    replica: str
    ingress: str = ""
    message: str = ""
    excluded: dict[str, int] = {}
    policy: str = ""
    seed: int = 0
    view: ViewAge | None = None
    inputs: Inputs | None = None


class Explained(msgspec.Struct, frozen=True, omit_defaults=True):
    """A decision as its replica tells it when asked: one of the two, with every candidate; and whether the
    same came out when it was made again, in words."""

    recomputed: str
    placement: PlacementEvent | None = None
    rejection: RejectionEvent | None = None


class OutcomeEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """How an admitted request ended. `outcome` is one of penstock.ingress.outcomes.Outcome; times in ms.
    `waited_ms` of them the request waited for capacity. `undecided`: it ended while its last decision was
    asked for, which may therefore not be in the log. `user` is a hash, with --audit-user-salt.
    `trace_id`: of one that was traced.

    Of one that was divided: how long prefill took to answer, how long its answer waited for decode to be
    asked, and decode took to its first piece.

    `lost`, status 0, is told by a `witness` for an ingress that is dead, as far as is known. Its id is made
    of the last decision's, so that what two witnesses say is one event; any other outcome beats it."""

    request_id: str
    model: str
    outcome: str
    status: int
    path: str
    ingress: str
    decisions: list[str] = []
    instance: str = ""
    attempts: int = 0
    stream: bool = False
    scheduling_ms: float = 0.0
    ttft_ms: float = 0.0
    e2e_ms: float = 0.0
    bytes_out: int = 0
    chunks: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""
    route: str = ""
    waited_ms: float = 0.0
    prefill_instance: str = ""
    prefill_ms: float = 0.0
    transfer_wait_ms: float = 0.0
    decode_ttft_ms: float = 0.0
    user: str = ""
    undecided: bool = False
    witness: str = ""
    trace_id: str = ""


class RouteEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request was given a route; `reason` is canary, weight or prefix, or none: no route takes it."""

    request_id: str
    model: str
    route: str
    reason: str
    ingress: str


class RetryEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """An attempt at `instance` failed by `cause` and the request may go to another one after `delay_ms`:
    `result` is sent, or over_budget."""

    request_id: str
    model: str
    instance: str
    cause: str
    ingress: str
    retry: int = 0
    delay_ms: float = 0.0
    result: str = ""


class FallbackEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request goes on to a member of the fallback chain, because of `cause`; `error` is what failed."""

    request_id: str
    model: str
    route: str
    cause: str
    ingress: str
    error: str = ""


class QueuedEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A fallback answered 429: `result` is entered, full, too_long or exhausted; then sent, after
    `waited_ms`, or expired; and of a further call answered or failed."""

    request_id: str
    model: str
    route: str
    result: str
    ingress: str
    waited_ms: float = 0.0


class BreakerEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A circuit breaker is open, half_open or closed; `kind` is instance or endpoint."""

    kind: str
    target: str
    state: str
    ingress: str


class InstanceEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """The fleet changed: `change` is added, updated, removed, stale, recovered, unhealthy or draining; or
    skipped, when a record was passed over: `instance` then is its key in the store."""

    instance: str
    change: str
    endpoint: str
    source: str
    models: tuple[str, ...] = ()
    state: str = ""
    reason: str = ""
    role: str = "neutral"


# What is missing where an instance's KV-cache events are not trusted; its id follows.
KV_EVENTS_OF = "prefix index by KV-cache events of "


class DegradedEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A service began (`active`) or ceased to work around something that is missing."""

    service: str
    id: str
    what: str
    active: bool
    cause: str = ""


class ConfigEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """Live configuration was changed (`change`: created, updated or deleted), by whom and through what. Never
    the content, which may hold secrets."""

    kind: str
    name: str
    change: str
    version: int
    by: str
    origin: str


class MirroredEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of a copy of a request: `sent` (its shadow answered with `status`), `failed`, `timed_out`
    or `dropped`, with the reason. `total_ms` counts from sending the copy; written by an ingress for copies
    that it could not send on, else by a mirror."""

    copy_id: str
    request_id: str
    model: str
    result: str
    by: str
    reason: str = ""
    status: int = 0
    total_ms: float = 0.0


class ResponseFigures(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is compared of two responses: times in ms, 0 for never; the length as bytes of the body and, where
    the engine reports it, tokens."""

    status: int = 0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    bytes_out: int = 0
    completion_tokens: int = 0
    finish_reason: str = ""


class ComparisonEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request and its copy, both answered. The primary's times count from receiving the request, the
    shadow's from sending the copy."""

    copy_id: str
    request_id: str
    model: str
    primary: ResponseFigures
    shadow: ResponseFigures


class Admission(msgspec.Struct, frozen=True, omit_defaults=True):
    """One request that a decision is asked for; `after` is the one before it of the same request."""

    decision_id: str
    request_id: str
    model: str
    after: str = ""


class AdmittedEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """Decisions are asked for, for requests of one moment. Written with --audit-spool, before they are."""

    ingress: str
    requests: list[Admission]


class GapEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """`count` events between `first` and `last` of a writer are not in the log and never will be. `since` and
    `until` are when they were given up. 0: their number is not known."""

    writer: str
    incarnation: str
    first: int
    last: int
    count: int
    cause: str
    since: str = ""
    until: str = ""


class WriterChange(StrEnum):
    """What became of a writer of the log."""

    BEGAN = "began"
    ENDED = "ended"
    SILENT = "silent"
    ADOPTED = "adopted"


class WriterEvent(msgspec.Struct, frozen=True, omit_defaults=True):
    """A run of a process `began`: this is its first event. Or it writes no more: it `ended` by itself, and
    this is its last event; or it fell `silent`, as `by` sees it; or its spool was `adopted` by `by`, who put
    all up to `last` into the log."""

    writer: str
    incarnation: str
    change: WriterChange
    by: str
    last: int = 0
    cause: str = ""


# Every event type and what its data is: what the writers write, tools read, and the documents describe.
TYPES: dict[str, type[msgspec.Struct]] = {
    PLACEMENT: PlacementEvent,
    REJECTION: RejectionEvent,
    OUTCOME: OutcomeEvent,
    INSTANCE: InstanceEvent,
    DEGRADED: DegradedEvent,
    ROUTED: RouteEvent,
    RETRY: RetryEvent,
    FALLBACK: FallbackEvent,
    QUEUED: QueuedEvent,
    BREAKER: BreakerEvent,
    CONFIG_CHANGE: ConfigEvent,
    MIRRORED: MirroredEvent,
    COMPARISON: ComparisonEvent,
    ADMITTED: AdmittedEvent,
    GAP: GapEvent,
    WRITER_CHANGE: WriterEvent,
}


def type_of(kind: str) -> str:
    """The CloudEvents `type` of one kind of event."""
    return f"penstock.{kind}.v1"
