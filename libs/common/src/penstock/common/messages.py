"""Every struct that crosses the bus. Hot ones are arrays: a longer array from a later release is
read up to the fields known here, a shorter one takes the defaults. Fields are only appended.

Times are budgets or ages in ms or s, never wall clocks.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from penstock.common.model import EngineLoad, Name, ShortName

MAX_BATCH = 32
MAX_BLOCKS = 2048
MAX_REPORT_ENTRIES = 4096
MAX_REPORT_SPEEDS = 256
MAX_WRITERS = 256
# Of an answer to what is asked about decisions, and of the decisions in it.
MAX_EXPLANATION_BYTES, MAX_EXPLAINED = 512 * 1024, 16
# Of one piece of a snapshot. Masks are bits over the piece's own list of instances.
MAX_PIECE_BLOCKS = 4096
MAX_PIECE_INSTANCES = 4096
MAX_PIECE_FIGURES = 256
MAX_KV_CHANGES = 8

Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Copied = Annotated[bytes, msgspec.Meta(max_length=512 * 1024)]
Elapsed = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
PackedHashes = Annotated[bytes, msgspec.Meta(max_length=MAX_BLOCKS * 8)]


class Mode(StrEnum):
    """How prefill and decode are placed."""

    NEUTRAL = "neutral"
    PD_BATCH = "pd_batch"
    PD_STAGED = "pd_staged"


class Stage(StrEnum):
    """Which of the two placements of `pd_staged` is asked for."""

    ONLY = "only"
    PREFILL = "prefill"
    DECODE = "decode"


class Reason(StrEnum):
    """Why a request was refused before dispatch."""

    UNKNOWN_MODEL = "unknown_model"
    NO_INSTANCE = "no_instance"
    SATURATED = "saturated"
    BAD_STRATEGY = "bad_strategy"
    BAD_REQUEST = "bad_request"
    BAD_PROFILE = "bad_profile"


class ScheduleRequest(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One request to place (DESIGN 3.4). Hashes are packed little-endian u64, at most 2,048; their blocks
    double in size after each `run_blocks`, 0: all are of one size."""

    decision_id: ShortName
    request_id: Name
    model: Name
    owner: Name = ""
    strategy: Name = ""
    profile: Name = ""
    prompt_tokens: Count = 0
    max_tokens: Count = 0
    block_hashes: PackedHashes = b""
    session: Name = ""
    user: Name = ""
    priority: int = 0
    excluded: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = ()
    mode: Mode = Mode.NEUTRAL
    stage: Stage = Stage.ONLY
    prefill_instance: Name = ""
    prefill_group: Name = ""
    lease_ms: Count = 0
    run_blocks: Count = 0


class TraceMark(msgspec.Struct, frozen=True, array_like=True):
    """A request of the batch that is traced; `context` is trace id and span id, 16 and 8 bytes."""

    decision_id: ShortName
    context: Annotated[bytes, msgspec.Meta(max_length=24)]


class ScheduleBatch(msgspec.Struct, frozen=True, array_like=True):
    """Requests of one loop tick of one ingress; not decided once `budget_ms` is spent."""

    ingress: ShortName
    incarnation: ShortName
    budget_ms: Annotated[float, msgspec.Meta(ge=0, le=60_000)]
    requests: Annotated[tuple[ScheduleRequest, ...], msgspec.Meta(min_length=1, max_length=MAX_BATCH)]
    traces: Annotated[tuple[TraceMark, ...], msgspec.Meta(max_length=MAX_BATCH)] = ()


class Placement(msgspec.Struct, frozen=True, array_like=True, tag="placement", gc=False):
    """Where a request goes: `instance` decodes (and prefills too, unless `prefill_instance` is set)."""

    decision_id: ShortName
    instance: Name
    prefill_instance: Name = ""
    policy: Name = ""
    matched_blocks: Count = 0
    # What `matched_blocks` are of the request's `prompt_tokens`.
    matched_tokens: Count = 0
    # The config profile that it was decided by; empty: none.
    profile: Name = ""


class Rejection(msgspec.Struct, frozen=True, array_like=True, tag="rejection", gc=False):
    """Why a request goes nowhere."""

    decision_id: ShortName
    reason: Reason
    message: Annotated[str, msgspec.Meta(max_length=2048)] = ""
    retry_after_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0


class ScheduleReply(msgspec.Struct, frozen=True, array_like=True):
    """One outcome per request of the batch, in its order."""

    replica: ShortName
    outcomes: Annotated[tuple[Placement | Rejection, ...], msgspec.Meta(max_length=MAX_BATCH)]


class Placed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One placement as the other replicas need it: what it adds to load and to the prefix index.

    `tail` holds the packed hashes after the first `matched_blocks`; receivers hold the matched ones.
    `uncached_tokens` are those of `tokens` that the instance has to compute before the first answer.
    """

    decision_id: ShortName
    ingress: ShortName
    incarnation: ShortName
    instance: Name
    tokens: Count = 0
    matched_blocks: Count = 0
    tail: PackedHashes = b""
    uncached_tokens: Count = 0


class PlacedFeed(msgspec.Struct, frozen=True, array_like=True):
    """Placements of one replica, in order; `first_sequence` counts placements, from 1."""

    replica: ShortName
    incarnation: ShortName
    first_sequence: Count
    placed: Annotated[tuple[Placed, ...], msgspec.Meta(max_length=MAX_BATCH)]
    confirm_within_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 1.0


class SnapshotCursor(msgspec.Struct, frozen=True, array_like=True):
    """Where a snapshot goes on; the giver keeps nothing of it. `part` is 0 for instances' figures, 1 for
    blocks; `generation` is one of the giver's prefix index."""

    part: Count = 0
    generation: Count = 0
    position: Count = 0


class SnapshotRequest(msgspec.Struct, frozen=True, array_like=True):
    """A replica that is not warm asks a sibling for the next piece of what it knows."""

    replica: ShortName
    cursor: SnapshotCursor | None = None


class WriterPosition(msgspec.Struct, frozen=True, array_like=True):
    """The last placement of a writer of the `placed` feed that is part of a snapshot."""

    replica: ShortName
    incarnation: ShortName
    sequence: Count


Fading = Annotated[float, msgspec.Meta(ge=0, le=1e15)]


class InstanceFigures(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What was learned of an instance over time; the fading sums and means of the scheduler's Loads."""

    instance: Name
    prefill_ms: Fading = 0.0
    prefill_tokens: Fading = 0.0
    decode_ms: Fading = 0.0
    decode_tokens: Fading = 0.0
    answers: Fading = 0.0
    answer_tokens: Fading = 0.0
    served: Fading = 0.0
    busy: Fading = 0.0
    usual: Fading = 0.0
    kv_tokens: Fading = 0.0


class SnapshotPiece(msgspec.Struct, frozen=True, array_like=True):
    """A part of what a replica knows, of use by itself. `next` asks for what follows, None at the end.

    The first piece has `writers`. Blocks are packed little-endian u64 in `hashes`; `runs` are pairs of
    little-endian u16, (mask, count): so many blocks in turn are held by the instances of that mask, whose
    bits are places in `instances`. `older`: they belong to the previous generation of the index.
    `refused`: the giver is not warm itself, or its loop lags.
    """

    replica: ShortName
    incarnation: ShortName
    next: SnapshotCursor | None = None
    refused: bool = False
    writers: Annotated[tuple[WriterPosition, ...], msgspec.Meta(max_length=MAX_WRITERS)] = ()
    figures: Annotated[tuple[InstanceFigures, ...], msgspec.Meta(max_length=MAX_PIECE_FIGURES)] = ()
    instances: Annotated[tuple[Name, ...], msgspec.Meta(max_length=MAX_PIECE_INSTANCES)] = ()
    masks: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=MAX_PIECE_INSTANCES // 8)], ...],
        msgspec.Meta(max_length=MAX_PIECE_BLOCKS),
    ] = ()
    runs: Annotated[bytes, msgspec.Meta(max_length=MAX_PIECE_BLOCKS * 4)] = b""
    hashes: Annotated[bytes, msgspec.Meta(max_length=MAX_PIECE_BLOCKS * 8)] = b""
    older: bool = False


class InFlight(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Work of one decision as its ingress knows it; absolute values, so that repeats do no harm.

    `output_tokens` is above 0 once an answer has begun, `cached_tokens` the placement's `matched_tokens`.
    """

    decision_id: ShortName
    instance: Name
    prompt_tokens: Count = 0
    output_tokens: Count = 0
    cached_tokens: Count = 0


class InstanceSpeed(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How fast an instance served what one incarnation of an ingress sent it: sums since the start of that
    incarnation, so that a lost or repeated report does no harm.

    `streams` are those whose first token was seen, `ttft_ms` the sum of their times from dispatch to it.
    `prefill_ms` is the part of these times in which no earlier prompt of this ingress was ahead, spent on
    `uncached_tokens`. `decode_ms` is the time spent on `decode_tokens`, those after a first one.

    `judged` are answers whose engine says what it had in its KV cache and whose placement expected
    something there: `expected_tokens`, of which the engine found `confirmed_tokens`.
    """

    instance: Name
    requests: Count = 0
    prompt_tokens: Count = 0
    output_tokens: Count = 0
    streams: Count = 0
    ttft_ms: Count = 0
    prefill_ms: Count = 0
    uncached_tokens: Count = 0
    decode_ms: Count = 0
    decode_tokens: Count = 0
    judged: Count = 0
    expected_tokens: Count = 0
    confirmed_tokens: Count = 0


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """What changed in an ingress's in-flight work, or all of it.

    `sequence` counts the reports of one incarnation from 1. `pieces` is 0 for changes; a snapshot
    comes in `pieces` reports numbered from 0 and replaces everything once the last one is in.
    `finished` also names placements that came too late to be used. `speeds` are of instances whose sums
    changed, in a report of changes each second.
    """

    ingress: ShortName
    incarnation: ShortName
    sequence: Count
    in_flight: Annotated[tuple[InFlight, ...], msgspec.Meta(max_length=MAX_REPORT_ENTRIES)] = ()
    finished: Annotated[tuple[ShortName, ...], msgspec.Meta(max_length=MAX_REPORT_ENTRIES)] = ()
    piece: Count = 0
    pieces: Count = 0
    leaving: bool = False
    speeds: Annotated[tuple[InstanceSpeed, ...], msgspec.Meta(max_length=MAX_REPORT_SPEEDS)] = ()


class EngineStatus(msgspec.Struct, frozen=True):
    """An engine's own load, read by discovery's prober `age_s` before it was sent."""

    instance: Name
    load: EngineLoad
    age_s: Annotated[float, msgspec.Meta(ge=0, le=1e9)] = 0.0


class KvChange(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Blocks that an instance's KV cache holds from here on (`stored`), parents before their children, or
    holds no longer, children first. Hashes as in `ScheduleRequest.block_hashes`."""

    stored: bool
    hashes: PackedHashes


class KvEvents(msgspec.Struct, frozen=True, array_like=True):
    """What changed in an instance's KV cache, as its engine announces it, bridged by discovery.

    `feed` names what `sequence` counts, from 1: another feed, or a gap, means that changes are missing.
    With `cleared` the KV cache is empty, or unknown, before the changes of this message.
    """

    instance: Name
    feed: ShortName
    sequence: Count
    cleared: bool = False
    changes: Annotated[tuple[KvChange, ...], msgspec.Meta(max_length=MAX_KV_CHANGES)] = ()


class Heartbeat(msgspec.Struct, frozen=True):
    """A service process is alive; `ready` says that it takes work."""

    service: ShortName
    id: ShortName
    incarnation: ShortName
    ready: bool
    version: ShortName = ""


class ExplainRequest(msgspec.Struct, frozen=True, array_like=True):
    """Which decisions were made for a request, or what was decided under this id?"""

    name: Name


class ExplainReply(msgspec.Struct, frozen=True, array_like=True):
    """Each of `decisions` is JSON, a penstock.common.routing_events.Explained; a replica that knows none does
    not answer."""

    replica: ShortName
    decisions: Annotated[
        tuple[Annotated[bytes, msgspec.Meta(max_length=MAX_EXPLANATION_BYTES)], ...],
        msgspec.Meta(max_length=MAX_EXPLAINED),
    ] = ()


class CompleteMarker(msgspec.Struct, frozen=True):
    """A source has written all its records; `sources` are all sources that discovery runs."""

    source: ShortName
    sources: tuple[ShortName, ...]


class MirrorCopy(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A request as its shadow is to get it: `target` is path and query, `headers` whole lines, without those
    of one hop, host, length and request id. `id` names this copy; with `compared` a MirrorPrimary follows."""

    id: ShortName
    request_id: ShortName
    model: Name
    method: Annotated[bytes, msgspec.Meta(max_length=32)]
    target: Copied
    headers: Copied
    body: Copied
    compared: bool = False


class MirrorPrimary(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How a copied request itself ended; times in ms since it was received, 0 for never."""

    id: ShortName
    status: Annotated[int, msgspec.Meta(ge=0, le=999)] = 0
    ttft_ms: Elapsed = 0.0
    e2e_ms: Elapsed = 0.0
    bytes_out: Count = 0
    completion_tokens: Count = 0
    finish_reason: ShortName = ""


class DiscoverRequest(msgspec.Struct, frozen=True):
    """List every source again. With a `ticket`, how far the `replica` that gave it is with that."""

    ticket: ShortName = ""
    replica: ShortName = ""


Named = Annotated[tuple[Name, ...], msgspec.Meta(max_length=256)]


class DiscoverReply(msgspec.Struct, frozen=True):
    """What a replica of discovery lists over all sources: `discovered` instances, and once `done` what
    changed by listing again, at most 256 names each; `errors` name the sources that cannot be read."""

    replica: ShortName
    ticket: ShortName
    done: bool
    discovered: Count = 0
    added: Named = ()
    removed: Named = ()
    unchanged: Count = 0
    errors: Named = ()
