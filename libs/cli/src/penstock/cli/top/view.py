"""What one moment looks like: the JSON of `penstock top --json`, and what a frame is drawn from."""

from __future__ import annotations

import msgspec


class InstanceView(msgspec.Struct, frozen=True):
    """One instance. `running`, `waiting` and `kv_usage_ratio` are the engine's own words, None until it has
    told; `in_flight` are requests placed there since the view began that have not ended; ratios are 0..1 and
    rates per second over the window, None without anything to measure. `precision_ratio`: prompt tokens that
    were expected in its KV cache and found there, of those expected; None too while it reports none found.
    `kv_events_distrusted`: a scheduler does not use its KV-cache events."""

    id: str
    endpoint: str
    models: tuple[str, ...]
    role: str
    state: str
    reason: str
    source: str
    running: int | None
    waiting: int | None
    kv_usage_ratio: float | None
    in_flight: int
    requests_per_s: float
    errors_per_s: float
    hit_ratio: float | None
    precision_ratio: float | None = None
    kv_events_distrusted: bool = False


class TotalsView(msgspec.Struct, frozen=True):
    """The whole fleet over the window. `match_ratio`: blocks that schedulers expected in KV caches, of all
    blocks of placed prompts; `hit_ratio`: tokens that engines found there, of all prompt tokens;
    `precision_ratio` as of an instance."""

    instances: int
    taking_requests: int
    in_flight: int
    decisions_per_s: float
    local_ratio: float | None
    rejections_per_s: float
    requests_per_s: float
    errors_per_s: float
    tokens_per_s: float
    match_ratio: float | None
    hit_ratio: float | None
    ttft_p50_ms: float | None
    ttft_p99_ms: float | None
    precision_ratio: float | None = None


class ProcessView(msgspec.Struct, frozen=True):
    """A process of the suite that was heard within the last seconds."""

    service: str
    id: str
    ready: bool
    version: str


class DegradedView(msgspec.Struct, frozen=True):
    """Something that is worked around, for `for_s` seconds so far."""

    service: str
    id: str
    what: str
    cause: str
    for_s: float


class BreakerView(msgspec.Struct, frozen=True):
    """A circuit breaker that is not closed."""

    kind: str
    target: str
    state: str
    ingress: str


class View(msgspec.Struct, frozen=True):
    """One moment; `time` is Unix seconds. `broken` counts messages that could not be read."""

    time: float
    connected: bool
    window_s: int
    totals: TotalsView
    instances: tuple[InstanceView, ...]
    processes: tuple[ProcessView, ...]
    degraded: tuple[DegradedView, ...]
    breakers: tuple[BreakerView, ...]
    broken: int
