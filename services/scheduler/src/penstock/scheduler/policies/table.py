"""The closed table of policies: what a `routing-strategy` may name, alone or in a weighted list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from penstock.scheduler.candidates import Candidates
from penstock.scheduler.decisions import Case
from penstock.scheduler.policies.measures import (
    BusyTime,
    ExpectedTtft,
    KvUse,
    Latency,
    Measure,
    OtherSession,
    PrefillAhead,
    Requests,
    Served,
    UnmatchedBlocks,
)
from penstock.scheduler.policies.pickers import Best, BestOfTwo, Picker, Random, RoundRobin
from penstock.scheduler.policies.scorers import FewestRequests, Headroom, Least, PrefixMatch, Scorer
from penstock.scheduler.pool import Floats

LEAST_REQUEST = "least-request"
CACHE_AWARE = "cache-aware"
DECODE_BALANCE = "decode-balance"
# Near-equal with several replicas: one request in twenty, or its like.
_BAND = 0.05


@dataclass(frozen=True)
class Thresholds:
    """When prefix-cache takes an instance for overloaded, see PrefixMatch and Headroom; how much an instance
    may have in flight, see NotSaturated; what the match counts against headroom in prefix-cache, and
    waiting against computing in cache-aware, see ExpectedTtft."""

    imbalance_requests: float = 16.0
    imbalance_ratio: float = 0.25
    max_requests: int = 0
    prefix_weight: float = 2 / 3
    wait_weight: float = 1.0
    max_kv_ratio: float = 0.0


@dataclass(frozen=True)
class Strategy:
    """One entry. `member` is what it brings into a weighted list; None: it cannot stand in one."""

    picker: Picker
    scorers: tuple[tuple[Scorer, float], ...] = ()
    member: Measure | None = None
    by_prefix: bool = False


@dataclass(frozen=True)
class Shortfall:
    """1 - a score, for weighted lists of what has no unit of its own."""

    scorers: tuple[tuple[Scorer, float], ...]
    by_prefix: bool = False
    small: float = 0.05

    @property
    def reads(self) -> tuple[str, ...]:
        """The scorers'."""
        return tuple(name for scorer, _ in self.scorers for name in scorer.reads)

    def of(self, case: Case, candidates: Candidates) -> Floats:
        total = 1.0 - self.scorers[0][0].score(case, candidates) * self.scorers[0][1]
        for scorer, weight in self.scorers[1:]:
            total -= scorer.score(case, candidates) * weight
        return total


def _least(measure: Measure, band: float = _BAND) -> Strategy:
    picker = Best(band, by_block=measure.by_prefix)
    return Strategy(picker, ((Least(measure), 1.0),), measure, measure.by_prefix)


def _prefix_cache(thresholds: Thresholds) -> Strategy:
    """2/3 prefix match (of those not overloaded) + 1/3 headroom, by default.

    A full match outweighs any difference in load that the guard lets pass; a match of a quarter of the
    prompt, say a shared system prompt, is outweighed by half the headroom, so that such requests spread.
    The band is one request's worth of headroom by the default thresholds. In a list: unmatched blocks alone.
    """
    requests, ratio = thresholds.imbalance_requests, thresholds.imbalance_ratio
    match, room = thresholds.prefix_weight, 1 - thresholds.prefix_weight
    scorers = (PrefixMatch(requests, ratio), match), (Headroom(requests, ratio), room)
    return Strategy(Best(0.02, by_block=True), scorers, UnmatchedBlocks(), by_prefix=True)


def _load_balance(thresholds: Thresholds) -> Strategy:
    """1/2 prefill ahead + 1/2 projected KV use: Llumnix's metrics for prefill and for decode, both of which a
    neutral instance does."""
    scorers = (Least(PrefillAhead()), 0.5), (Least(KvUse(projected=True)), 0.5)
    return Strategy(Best(_BAND), scorers, Shortfall(scorers))


def _decode_balance() -> Strategy:
    """1/2 projected KV use + 1/2 fewest requests: room for what will be decoded, and the batch it joins,
    which sets the time per token. Chooses decode instances under disaggregation."""
    scorers = (Least(KvUse(projected=True)), 0.5), (FewestRequests(), 0.5)
    return Strategy(Best(_BAND), scorers, Shortfall(scorers))


def _session_affinity(thresholds: Thresholds) -> Strategy:
    """The session's instance whatever its load; without a session, fewest requests."""
    scorers = (Least(OtherSession()), 0.9), (FewestRequests(), 0.1)
    return Strategy(Best(_BAND * 0.1), scorers, OtherSession())


STRATEGIES: Mapping[str, Callable[[Thresholds], Strategy]] = {
    CACHE_AWARE: lambda thresholds: _least(ExpectedTtft(thresholds.wait_weight), band=0.0),
    "prefix-cache": _prefix_cache,
    LEAST_REQUEST: lambda _: Strategy(Best(_BAND), ((FewestRequests(), 1.0),), Requests()),
    "load-balance": _load_balance,
    DECODE_BALANCE: lambda _: _decode_balance(),
    "least-latency": lambda _: _least(Latency()),
    "least-kv-cache": lambda _: _least(KvUse()),
    "least-busy-time": lambda _: _least(BusyTime()),
    "throughput": lambda _: _least(Served()),
    "session-affinity": _session_affinity,
    "power-of-two": lambda _: Strategy(BestOfTwo(), ((FewestRequests(), 1.0),)),
    "round-robin": lambda _: Strategy(RoundRobin()),
    "random": lambda _: Strategy(Random()),
}
# Names that other gateways have for the same thing. AIBrix: least-gpu-cache; production-stack: session,
# prefixaware, roundrobin. Underscores (SGLang's router) and capitals are understood everywhere.
ALIASES: Mapping[str, str] = {
    "least-gpu-cache": "least-kv-cache",
    "session": "session-affinity",
    "prefixaware": "prefix-cache",
    "roundrobin": "round-robin",
}
