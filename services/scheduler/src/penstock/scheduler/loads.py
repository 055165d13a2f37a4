"""Loads: the numbers that policies compare, one array each, by slot; no NaN and no negative number is stored.

Every feature has a maximum age and a fallback:

| feature | true for | then |
|---|---|---|
| in flight | as long as its ingress reports (ledger) | released by the ledger |
| running, waiting, KV use of the engine | STATUS_MAX_AGE_S | tokens in flight / KV size |
| prefill and decode speed | fades, half in SPEED_HALF_LIFE_S | mean of the pool / weight, else the defaults |
| KV size | the instance's life | mean of the instances, else DEFAULT_KV_TOKENS |
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from penstock.scheduler.columns import Column
from penstock.scheduler.pool import Floats, Rows

if TYPE_CHECKING:
    from librt.vecs import vec

# Three rounds of the prober.
STATUS_MAX_AGE_S = 15.0
SPEED_HALF_LIFE_S = 60.0
# An engine of middling speed: 8,000 prompt tokens a second, 50 tokens a second to each stream.
DEFAULT_MS_PER_TOKEN = 0.125
DEFAULT_TPOT_MS = 20.0
DEFAULT_OUTPUT_TOKENS = 100.0
DEFAULT_KV_TOKENS = 65_536.0
# What a measured speed is weighed against: so many tokens at the speed of the pool.
PRIOR_PREFILL_TOKENS = 1000.0
PRIOR_DECODE_TOKENS = 50.0
# Bounds of what is believed of an instance, in ms.
MS_PER_TOKEN = 0.001, 100.0
TPOT_MS = 0.1, 10_000.0
# What a prompt waits on an engine whose KV cache is full, and from which use on.
KV_FULL_MS, KV_SCARCE_RATIO = 1000.0, 0.9
# Decode steps that a new prompt waits for because of each request in flight: they share steps with its
# prefill and make its own decode slower. In simulation, above it prefixes are left for small differences
# in load (at 2 a fifth of the hits is lost), below it decode piles up on the conversation trace.
STEPS_PER_REQUEST = 0.5
BUSY_S, USUAL_S = 10.0, 30.0
_FIRST_CAPACITY = 64


class Loads:
    """One number per slot.

    From the ledger: `requests`, `tokens` and `pending` (prompt tokens before a first answer) in flight;
    `echo` and `echo_ms` are what siblings are expected to add, `rank` what keeps them apart, in requests (see
    Echo). From the engine: `running`, `waiting` as of the monotonic second `status_at` (-inf: never),
    `kv_usage_ratio` as of `kv_at`, `kv_tokens` its KV size (0: unknown). From the ingresses, fading: sums of
    `prefill_ms`, `prefill_tokens`, `decode_ms`, `decode_tokens`, `answers`, `answer_tokens`, `served` (2 x
    prompt + output tokens). `weight` is relative to the mean of all instances.

    Derived: `queued` (requests with echo / weight), `ms_per_token` of prefill, `ranked_ms_per_token` (the
    same, (1 + rank)-fold), `tpot_ms`, `output_tokens` per answer, `backlog_ms` (prefill ahead of a new
    prompt), `kv_used` (0..1), `kv_size` in tokens, `kv_wait_ms`, `wait_ms` (all that a new prompt waits for),
    `busy` (share of the last time with work), `usual` (requests).
    """

    GIVEN: ClassVar[tuple[str, ...]] = (
        *("requests", "tokens", "pending", "echo", "echo_ms", "rank"),
        *("running", "waiting", "kv_usage_ratio", "status_at", "kv_at", "kv_tokens", "weight"),
    )
    FADING: ClassVar[tuple[str, ...]] = (
        *("prefill_ms", "prefill_tokens", "decode_ms", "decode_tokens"),
        *("answers", "answer_tokens", "served"),
    )
    DERIVED: ClassVar[tuple[str, ...]] = (
        *(
            "queued",
            "ms_per_token",
            "ranked_ms_per_token",
            "tpot_ms",
            "output_tokens",
            "backlog_ms",
            "kv_used",
            "kv_size",
        ),
        *("kv_wait_ms", "wait_ms", "busy", "usual"),
    )
    NAMES: ClassVar[tuple[str, ...]] = GIVEN + FADING + DERIVED
    _START: ClassVar[dict[str, float]] = {
        "status_at": -math.inf,
        "kv_at": -math.inf,
        "weight": 1.0,
        "ms_per_token": DEFAULT_MS_PER_TOKEN,
        "ranked_ms_per_token": DEFAULT_MS_PER_TOKEN,
        "tpot_ms": DEFAULT_TPOT_MS,
        "output_tokens": DEFAULT_OUTPUT_TOKENS,
        "kv_size": DEFAULT_KV_TOKENS,
    }
    requests: Floats
    tokens: Floats
    pending: Floats
    echo: Floats
    echo_ms: Floats
    rank: Floats
    running: Floats
    waiting: Floats
    kv_usage_ratio: Floats
    status_at: Floats
    kv_at: Floats
    kv_tokens: Floats
    weight: Floats
    prefill_ms: Floats
    prefill_tokens: Floats
    decode_ms: Floats
    decode_tokens: Floats
    answers: Floats
    answer_tokens: Floats
    served: Floats
    queued: Floats
    ms_per_token: Floats
    ranked_ms_per_token: Floats
    tpot_ms: Floats
    output_tokens: Floats
    backlog_ms: Floats
    kv_used: Floats
    kv_size: Floats
    kv_wait_ms: Floats
    wait_ms: Floats
    busy: Floats
    usual: Floats

    def __init__(self) -> None:
        self._keep_in({name: Column([self._START.get(name, 0.0)] * _FIRST_CAPACITY) for name in self.NAMES})
        self._advanced_at = self._faded_at = -math.inf

    def reset(self, slot: int) -> None:
        """Nothing known of `slot`; there is room for it afterwards."""
        if slot >= len(self.requests):
            self._keep_in({name: Column(getattr(self, name).tolist() * 2) for name in self.NAMES})
        for name in self.NAMES:
            getattr(self, name)[slot] = self._START.get(name, 0.0)

    def _keep_in(self, columns: dict[str, Column]) -> None:
        for name in self.NAMES:
            setattr(self, name, columns[name].array)
        self.cells = Cells(columns)

    def take(self, slot: int, requests: int, tokens: int, pending: int) -> None:
        """In flight on a slot, absolute."""
        cells = self.cells
        more = pending - cells.pending[slot]
        ms_per_token = cells.ms_per_token[slot]
        backlog_ms = cells.backlog_ms[slot]
        if more > 0:
            backlog_ms += more * ms_per_token
        most_ms = pending * ms_per_token
        cells.requests[slot] = requests
        cells.tokens[slot] = tokens
        cells.pending[slot] = pending
        if backlog_ms > most_ms:
            backlog_ms = most_ms
        cells.backlog_ms[slot] = backlog_ms
        # What `sum_up` does, without a call.
        queued = requests + cells.echo[slot] + cells.rank[slot]
        cells.queued[slot] = queued / cells.weight[slot]
        ahead_ms = backlog_ms + cells.echo_ms[slot] + cells.kv_wait_ms[slot]
        cells.wait_ms[slot] = ahead_ms + queued * (STEPS_PER_REQUEST * cells.tpot_ms[slot])

    def sum_up(self, slot: int) -> None:
        """Bring what follows from in flight and echo in step, as `advance` does for all."""
        cells = self.cells
        queued = cells.requests[slot] + cells.echo[slot] + cells.rank[slot]
        cells.queued[slot] = queued / cells.weight[slot]
        ahead_ms = cells.backlog_ms[slot] + cells.echo_ms[slot] + cells.kv_wait_ms[slot]
        cells.wait_ms[slot] = ahead_ms + queued * (STEPS_PER_REQUEST * cells.tpot_ms[slot])

    def advance(self, now: float) -> None:
        """Let time pass: prefill is worked off, engine numbers age."""
        passed_s = now - self._advanced_at
        if not 0 <= passed_s < math.inf:
            passed_s = 0.0
        self._advanced_at = now
        np.maximum(self.backlog_ms - passed_s * 1000.0, 0.0, out=self.backlog_ms)
        np.minimum(self.backlog_ms, self.pending * self.ms_per_token, out=self.backlog_ms)
        self._keep_kv(now)
        for numbers, of, span_s in (
            (self.busy, self.requests > 0, BUSY_S),
            (self.usual, self.requests, USUAL_S),
        ):
            numbers += (of - numbers) * -math.expm1(-passed_s / span_s)
        self.sum_up_all()

    def sum_up_all(self) -> None:
        """`sum_up` for all slots."""
        queued = self.requests + self.echo + self.rank
        np.divide(queued, self.weight, out=self.queued)
        ahead_ms = self.backlog_ms + self.echo_ms + self.kv_wait_ms
        np.add(ahead_ms, queued * self.tpot_ms * STEPS_PER_REQUEST, out=self.wait_ms)

    def put_ranks(self, slots: Rows, ranks: Floats | float) -> None:
        """Ranks of these slots, 0 for all others."""
        self.rank.fill(0.0)
        self.rank[slots] = ranks
        np.multiply(self.ms_per_token, 1.0 + self.rank, out=self.ranked_ms_per_token)
        self.sum_up_all()

    def _keep_kv(self, now: float) -> None:
        known = self.kv_tokens > 0
        usual = float(self.kv_tokens[known].mean()) if known.any() else DEFAULT_KV_TOKENS
        self.kv_size[:] = np.where(known, self.kv_tokens, usual)
        fresh = now - self.kv_at <= STATUS_MAX_AGE_S
        by_ledger = np.minimum(self.tokens / self.kv_size, 1.0)
        self.kv_used[:] = np.where(fresh, self.kv_usage_ratio, by_ledger)
        # Without the engine's word on its use or its size nothing is held against it.
        scarce = np.where(fresh & known, self.kv_used + self.pending / self.kv_size - KV_SCARCE_RATIO, 0.0)
        np.clip(scarce / (1.0 - KV_SCARCE_RATIO), 0.0, 1.0, out=self.kv_wait_ms)
        self.kv_wait_ms *= KV_FULL_MS

    def fade(self, now: float) -> None:
        """Let what was learned of speeds lose weight."""
        passed_s = now - self._faded_at
        self._faded_at = now
        if 0 < passed_s < math.inf:
            for name in self.FADING:
                numbers = getattr(self, name)
                numbers *= 0.5 ** (passed_s / SPEED_HALF_LIFE_S)

    def learn(self, slots: Rows) -> None:
        """Speeds of one pool's slots: what was measured, weighed against the pool's mean by weight."""
        weight = self.weight[slots]
        prior = _mean(self.prefill_ms[slots], self.prefill_tokens[slots], DEFAULT_MS_PER_TOKEN) / weight
        self.ms_per_token[slots] = np.clip(
            (PRIOR_PREFILL_TOKENS * prior + self.prefill_ms[slots])
            / (PRIOR_PREFILL_TOKENS + self.prefill_tokens[slots]),
            *MS_PER_TOKEN,
        )
        self.ranked_ms_per_token[slots] = self.ms_per_token[slots] * (1.0 + self.rank[slots])
        prior = _mean(self.decode_ms[slots], self.decode_tokens[slots], DEFAULT_TPOT_MS) / weight
        self.tpot_ms[slots] = np.clip(
            (PRIOR_DECODE_TOKENS * prior + self.decode_ms[slots])
            / (PRIOR_DECODE_TOKENS + self.decode_tokens[slots]),
            *TPOT_MS,
        )
        self.output_tokens[slots] = _mean(
            self.answer_tokens[slots], self.answers[slots], DEFAULT_OUTPUT_TOKENS
        )


class Cells:
    """Some of the columns, to read and write one number of."""

    __slots__ = (
        *("requests", "tokens", "pending", "backlog_ms", "echo", "echo_ms", "rank", "kv_wait_ms"),
        *("queued", "wait_ms", "weight", "ms_per_token", "ranked_ms_per_token", "tpot_ms"),
        "_arrays",
    )

    def __init__(self, columns: dict[str, Column]) -> None:
        self.requests: vec[float] = columns["requests"].cells
        self.tokens: vec[float] = columns["tokens"].cells
        self.pending: vec[float] = columns["pending"].cells
        self.backlog_ms: vec[float] = columns["backlog_ms"].cells
        self.echo: vec[float] = columns["echo"].cells
        self.echo_ms: vec[float] = columns["echo_ms"].cells
        self.rank: vec[float] = columns["rank"].cells
        self.kv_wait_ms: vec[float] = columns["kv_wait_ms"].cells
        self.wait_ms: vec[float] = columns["wait_ms"].cells
        self.queued: vec[float] = columns["queued"].cells
        self.weight: vec[float] = columns["weight"].cells
        self.ms_per_token: vec[float] = columns["ms_per_token"].cells
        self.ranked_ms_per_token: vec[float] = columns["ranked_ms_per_token"].cells
        self.tpot_ms: vec[float] = columns["tpot_ms"].cells
        self._arrays = columns["wait_ms"].array, columns["ranked_ms_per_token"].array, columns["queued"].array

    def stand_for(self, loads: Loads) -> bool:
        """Whether loads still have these columns; recorded ones have arrays of their own."""
        wait_ms, ranked, queued = self._arrays
        return loads.wait_ms is wait_ms and loads.ranked_ms_per_token is ranked and loads.queued is queued


def _mean(sums: Floats, counts: Floats, otherwise: float) -> float:
    count = float(counts.sum())
    return float(sums.sum()) / count if count >= 1.0 else otherwise
