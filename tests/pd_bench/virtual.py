"""A trace on fleets of prefill and decode engines and on neutral ones, on virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from pd_bench.pairs import PREFILL, PairSchedulers, Transfer
from penstock.cli.replay.figures import Figures, Served, figures
from penstock.cli.replay.schedulers import Schedulers
from penstock.cli.replay.settings import ReplaySettings
from penstock.cli.replay.setups import Setup
from penstock.cli.replay.trace import TraceRequest, timed
from penstock.scheduler.chain import unpack
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.profile import Division
from penstock.sim.cluster import Arrival, Cluster, Outcome
from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest, Role

# 100 Gbit/s at 320 KiB of KV a token (70 billion parameters), and what a connector takes to begin.
TRANSFER = Transfer(0.005, 38_000.0)


@dataclass(frozen=True)
class Fleet:
    """How many engines of which role, and whether decode is placed when prefill is done."""

    neutral: int = 0
    prefill: int = 0
    decode: int = 0
    staged: bool = False
    division: Division = Division()  # noqa: RUF009  # frozen

    @property
    def name(self) -> str:
        """For the table."""
        if not self.prefill:
            return f"{self.neutral} neutral"
        neutral = f" + {self.neutral} n" if self.neutral else ""
        skip = self.division.skip_below_tokens
        less = f", from {skip} tokens on" if skip else ""
        return f"{self.prefill} p + {self.decode} d{neutral}, {'staged' if self.staged else 'batched'}{less}"

    def engines(self, settings: ReplaySettings) -> list[Engine]:
        """All alike but for their role."""
        roles: list[tuple[Role, int]] = [
            ("neutral", self.neutral),
            ("prefill", self.prefill),
            ("decode", self.decode),
        ]
        return [Engine(replace(settings.spec(), role=role)) for role, count in roles for _ in range(count)]


def run(settings: ReplaySettings, fleet: Fleet, trace: Sequence[TraceRequest], rate: float) -> Figures:
    """What clients see of the trace at so many times its speed."""
    engines, times = fleet.engines(settings), timed(trace, rate, spread=True)
    requests = [
        EngineRequest(str(number), one.prompt_tokens, one.output_tokens, tuple(unpack(one.packed_hashes)))
        for number, one in enumerate(trace)
    ]
    whole = _divided if fleet.prefill else _neutral
    served, refused, expected = whole(settings, fleet, engines, trace, requests, times)
    slo_s = settings.slo_ttft_ms / 1000, settings.slo_tpot_ms / 1000
    return figures(served, len(engines), refused, expected, slo_s)


Result = tuple[Served, int, int]


def _neutral(
    settings: ReplaySettings,
    fleet: Fleet,
    engines: Sequence[Engine],
    trace: Sequence[TraceRequest],
    requests: Sequence[EngineRequest],
    times: Sequence[float],
) -> Result:
    schedulers = Schedulers(
        engines,
        Catalog(Thresholds()),
        Setup("cache-aware", len(engines), delay_ms=1.0),
        lambda name: trace[int(name)].packed_hashes,
        index_blocks=settings.prefix_index_blocks,
        kv_factor=settings.prefix_index_kv_factor,
        seed=settings.seeds[0],
    )
    cluster = Cluster(engines, schedulers.decide, schedulers.observe)
    outcomes = cluster.run(map(Arrival, times, requests))
    ends = {o.request_id: o for o in outcomes if not o.refused}
    extra = dict.fromkeys(ends, 0.0)
    cached = {name: one.cached_tokens for name, one in ends.items()}
    served = _served(ends, extra, cached, requests, times)
    return served, len(outcomes) - len(ends), schedulers.expected_tokens


def _divided(
    settings: ReplaySettings,
    fleet: Fleet,
    engines: Sequence[Engine],
    trace: Sequence[TraceRequest],
    requests: Sequence[EngineRequest],
    times: Sequence[float],
) -> Result:
    schedulers = PairSchedulers(
        engines,
        requests,
        lambda number: trace[number].packed_hashes,
        staged=fleet.staged,
        division=fleet.division,
        transfer=TRANSFER,
        index_blocks=settings.prefix_index_blocks,
        kv_factor=settings.prefix_index_kv_factor,
        seed=settings.seeds[0],
    )
    cluster = Cluster(engines, schedulers.decide_part, schedulers.observe)
    schedulers.later = cluster.add
    parts = [
        msgspec.structs.replace(one, request_id=one.request_id + PREFILL, output_tokens=1, keeps=True)
        for one in requests
    ]
    outcomes = cluster.run(map(Arrival, times, parts))
    refused = sum(bool(o.refused) for o in outcomes)
    ends = {o.request_id: o for o in outcomes if not o.refused and not o.request_id.endswith(PREFILL)}
    extra = {name: schedulers.sent_s[name] - times[int(name)] for name in ends}
    served = _served(ends, extra, schedulers.prefill_cached, requests, times)
    if any(engine.kv_blocks_kept for engine in engines):
        raise AssertionError("blocks are kept at the end")
    return served, refused, schedulers.expected_tokens


def _served(
    ends: dict[str, Outcome],
    extra_s: dict[str, float],
    cached: dict[str, int],
    requests: Sequence[EngineRequest],
    times: Sequence[float],
) -> Served:
    names = sorted(ends, key=int)
    kept = [ends[name] for name in names]
    return Served(
        np.array([times[int(name)] for name in names]),
        np.array([one.engine for one in kept], dtype=np.intp),
        np.array([one.ttft_s + extra_s[one.request_id] for one in kept]),
        np.array([one.tpot_s for one in kept]),
        np.array([float(requests[int(name)].prompt_tokens) for name in names]),
        np.array([float(requests[int(name)].output_tokens) for name in names]),
        np.array([float(cached[name]) for name in names]),
    )


def line(fleet: Fleet, rate: float, f: Figures) -> str:
    """A row of the table."""
    return (
        f"{fleet.name:34} {rate:>5g} {f.ttft_p50_s:>8.2f} {f.ttft_p99_s:>8.2f} {1000 * f.tpot_p50_s:>8.1f}"
        f" {1000 * f.tpot_p99_s:>8.1f} {100 * f.slo_ratio:>7.1f} {f.goodput_rps:>7.2f}"
        f" {100 * f.hit_ratio:>6.1f} {f.refused:>8}"
    )


HEAD = (
    f"{'fleet':34} {'rate':>5} {'TTFT p50':>8} {'p99 s':>8} {'TPOT p50':>8} {'p99 ms':>8} {'in SLO %':>7}"
    f" {'good/s':>7} {'hit %':>6} {'refused':>8}"
)
