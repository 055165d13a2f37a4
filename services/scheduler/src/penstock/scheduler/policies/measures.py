"""Measures: one number per candidate in a unit of its own, the lower the better, never NaN or negative.

`small` is a difference that decides little: scores are ratios of (small + number). `by_prefix` says that the
prefix index is asked first; `reads` names the arrays of Loads that are read, without which a decision cannot
be computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from penstock.scheduler.candidates import Candidates
from penstock.scheduler.decisions import Case
from penstock.scheduler.draws import rendezvous
from penstock.scheduler.pool import Floats


class Measure(Protocol):
    """`of` returns an array of its own, aligned with the candidates, of which there is at least one."""

    @property
    def small(self) -> float: ...

    @property
    def by_prefix(self) -> bool: ...

    @property
    def reads(self) -> tuple[str, ...]: ...

    def of(self, case: Case, candidates: Candidates) -> Floats:
        """A number for each."""


@dataclass(frozen=True)
class Requests:
    """In-flight requests / weight, from the ledger (AIBrix: running requests, counted by the gateway)."""

    small: float = 1.0
    by_prefix: bool = False
    reads: ClassVar[tuple[str, ...]] = ("queued",)

    def of(self, case: Case, candidates: Candidates) -> Floats:
        return candidates.requests.copy()


@dataclass(frozen=True)
class ExpectedTtft:
    """Expected time to first token, ms: wait + uncached prompt tokens x ms per token of prefill.

    Wait is the prefill of prompts ahead (uncached tokens in flight without a first answer x ms per token,
    less the time since they were placed), plus half a decode step (TPOT, ms) for each request in flight,
    since each lengthens the steps that prefill shares, plus up to 1 s for a KV cache that is nearly full
    (from 0.9 on). Uncached is the prompt less the share of it that the instance holds by the
    prefix index. Speeds are those that ingresses measured, fading, else the pool's (see Loads). While
    siblings decide at the same time, uncached tokens count (1 + rank)-fold (see Echo): requests that room
    alone draws keep apart. Waiting counts `wait_weight` times.
    """

    wait_weight: float = 1.0
    small: float = 100.0
    by_prefix: bool = True
    reads: ClassVar[tuple[str, ...]] = ("ranked_ms_per_token", "wait_ms")

    def of(self, case: Case, candidates: Candidates) -> Floats:
        loads, slots = candidates.loads, candidates.kept.slots
        tokens = case.request.prompt_tokens
        # `take` needs half the time of an index.
        cost = loads.ranked_ms_per_token.take(slots)
        if candidates.steps:
            uncached = candidates.shares(case, -tokens)
            uncached += tokens
            cost *= uncached
        else:
            cost *= tokens
        wait = loads.wait_ms.take(slots)
        if self.wait_weight != 1.0:
            wait *= self.wait_weight
        cost += wait
        return cost


@dataclass(frozen=True)
class UnmatchedBlocks:
    """Blocks of the prompt that the instance was not given before, from the prefix index."""

    small: float = 1.0
    by_prefix: bool = True
    reads: ClassVar[tuple[str, ...]] = ()

    def of(self, case: Case, candidates: Candidates) -> Floats:
        return len(case.hashes) - candidates.matched


@dataclass(frozen=True)
class Served:
    """2 x prompt + output tokens served, fading with a half-life of 60 s, + 2 x tokens in flight, / weight.

    AIBrix's throughput strategy (prompt tokens count double) over the ingresses' own counts; what is in
    flight makes a burst count before it is served.
    """

    small: float = 1000.0
    by_prefix: bool = False
    reads: ClassVar[tuple[str, ...]] = ("served", "tokens", "weight")

    def of(self, case: Case, candidates: Candidates) -> Floats:
        loads, slots = candidates.loads, candidates.kept.slots
        return (loads.served[slots] + 2.0 * loads.tokens[slots]) / loads.weight[slots]


@dataclass(frozen=True)
class KvUse:
    """Share of the KV cache in use, 0..1: the engine's word, past its maximum age tokens in flight / size.

    `projected` adds the prompts in flight that are not computed yet and this request's own, over 1 if they
    do not fit (Llumnix: kv_cache_usage_ratio_projected).
    """

    projected: bool = False
    small: float = 0.05
    by_prefix: bool = False
    reads: ClassVar[tuple[str, ...]] = ("kv_used", "pending", "kv_size")

    def of(self, case: Case, candidates: Candidates) -> Floats:
        loads, slots = candidates.loads, candidates.kept.slots
        used = loads.kv_used[slots]
        if self.projected:
            used += (loads.pending[slots] + case.request.prompt_tokens) / loads.kv_size[slots]
        return used


@dataclass(frozen=True)
class PrefillAhead:
    """Uncached prompt tokens in flight without a first answer (Llumnix: all_prefills_tokens_num), in ms at
    the instance's prefill speed."""

    small: float = 100.0
    by_prefix: bool = False
    reads: ClassVar[tuple[str, ...]] = ("pending", "ms_per_token", "echo_ms")

    def of(self, case: Case, candidates: Candidates) -> Floats:
        loads, slots = candidates.loads, candidates.kept.slots
        return loads.pending[slots] * loads.ms_per_token[slots] + loads.echo_ms[slots]


@dataclass(frozen=True)
class Latency:
    """Expected time to the last token, ms: prefill of the whole prompt and of those ahead, then the pool's
    mean output at the instance's TPOT, scaled by (1 + requests in flight) / (1 + usual ones).

    AIBrix's least-latency adds queue, prefill and decode means scaled to the request likewise; the last
    factor stands for what changed since the speeds were measured, so that the fastest does not drown.
    """

    small: float = 100.0
    by_prefix: bool = False
    reads: ClassVar[tuple[str, ...]] = (
        "ms_per_token",
        "backlog_ms",
        "requests",
        "echo",
        "usual",
        "output_tokens",
        "tpot_ms",
    )

    def of(self, case: Case, candidates: Candidates) -> Floats:
        loads, slots = candidates.loads, candidates.kept.slots
        prefill_ms = case.request.prompt_tokens * loads.ms_per_token[slots] + loads.backlog_ms[slots]
        busier = (1.0 + loads.requests[slots] + loads.echo[slots]) / (1.0 + loads.usual[slots])
        return prefill_ms + loads.output_tokens[slots] * loads.tpot_ms[slots] * busier


@dataclass(frozen=True)
class BusyTime:
    """Share of the last 10 s (fading) in which the instance had work in flight, 0..1, by the ledger; among
    equally busy ones the requests in flight decide (AIBrix: gpu_busy_time_ratio, which no engine reports)."""

    small: float = 0.05
    by_prefix: bool = False
    reads: ClassVar[tuple[str, ...]] = ("queued", "busy")

    def of(self, case: Case, candidates: Candidates) -> Floats:
        requests = candidates.requests
        return candidates.loads.busy[candidates.kept.slots] + requests / (1.0 + requests)


@dataclass(frozen=True)
class OtherSession:
    """0 for the instance that the request's session belongs to, 1 for others; 0 for all without a session.

    It belongs to the highest-ranking candidate in rendezvous order of (session, instance): when one
    leaves, its sessions alone move, and one that joins takes an equal share from each. (AIBrix does
    likewise for its session key; engines' addresses are not told to clients here.)
    """

    small: float = 0.1
    by_prefix: bool = False
    reads: ClassVar[tuple[str, ...]] = ()

    def of(self, case: Case, candidates: Candidates) -> Floats:
        session = case.session_key
        others = np.zeros(len(candidates))
        if session:
            others += 1.0
            others[rendezvous(candidates.kept.keys, session)] = 0.0
        return others
