"""One run: a trace through a decision function, on a simulated cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import msgspec
import numpy as np

from penstock.cli.replay.figures import Figures, Served, figures
from penstock.cli.replay.oracle import TrueCaches
from penstock.cli.replay.references import REFERENCES, Reference
from penstock.cli.replay.schedulers import Schedulers
from penstock.cli.replay.settings import ReplaySettings
from penstock.cli.replay.setups import Setup
from penstock.cli.replay.trace import TraceRequest, timed
from penstock.scheduler.chain import unpack
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import Thresholds
from penstock.sim.cluster import Arrival, Cluster, Outcome
from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest

# Told how many of the requests have arrived.
Progress = Callable[[int], None]
TOLD_EVERY = 100


class Run(msgspec.Struct, frozen=True):
    """A setup and what came of it."""

    setup: Setup
    served: Served
    figures: Figures


def replay(settings: ReplaySettings, setup: Setup, trace: Sequence[TraceRequest], progress: Progress) -> Run:
    """Run it. Raises ReplayFailed if the scheduler refuses a request, or a policy of one's own fails."""
    engines = [Engine(spec) for spec in settings.specs(setup.instances)]
    decider = _decider(settings, setup, trace, engines)
    decided = 0

    def decide(request: EngineRequest, now: float, fleet: Sequence[Engine]) -> int:
        nonlocal decided
        decided += 1
        if decided % TOLD_EVERY == 0:
            progress(decided)
        return decider.decide(request, now, fleet)

    arrivals = _arrivals(settings, trace)
    outcomes = Cluster(engines, decide, decider.observe).run(arrivals)
    served = _served(outcomes, arrivals)
    refused = sum(bool(outcome.refused) for outcome in outcomes)
    expected = decider.expected_tokens if isinstance(decider, Schedulers) else None
    slo_s = settings.slo_ttft_ms / 1000, settings.slo_tpot_ms / 1000
    return Run(setup, served, figures(served, setup.instances, refused, expected, slo_s))


def _decider(
    settings: ReplaySettings, setup: Setup, trace: Sequence[TraceRequest], engines: Sequence[Engine]
) -> Schedulers | Reference:
    if setup.reference:
        return REFERENCES[setup.policy](Random(setup.seed), setup.instances, settings.block_size)
    schedulers = Schedulers(
        engines,
        Catalog(Thresholds(), settings.custom_policies),
        setup,
        lambda request_id: trace[int(request_id)].packed_hashes,
        index_blocks=settings.prefix_index_blocks,
        kv_factor=settings.prefix_index_kv_factor,
        seed=setup.seed,
    )
    if setup.all_knowing:
        schedulers.use_index(TrueCaches(engines))
    return schedulers


def _arrivals(settings: ReplaySettings, trace: Sequence[TraceRequest]) -> list[Arrival]:
    """A request's id is its place in the trace. Engines get the hashes that schedulers unpack."""
    times = timed(trace, settings.rate_scale, spread=settings.spread)
    return [
        Arrival(
            at_s,
            EngineRequest(
                str(number), one.prompt_tokens, one.output_tokens, tuple(unpack(one.packed_hashes))
            ),
        )
        for number, (at_s, one) in enumerate(zip(times, trace, strict=True))
    ]


def _served(outcomes: Sequence[Outcome], arrivals: Sequence[Arrival]) -> Served:
    kept = sorted((int(o.request_id), o) for o in outcomes if not o.refused)
    requests = [arrivals[number].request for number, _ in kept]
    return Served(
        np.array([arrivals[number].at_s for number, _ in kept]),
        np.array([o.engine for _, o in kept], dtype=np.intp),
        np.array([o.ttft_s for _, o in kept]),
        np.array([o.tpot_s for _, o in kept]),
        np.array([float(request.prompt_tokens) for request in requests]),
        np.array([float(request.output_tokens) for request in requests]),
        np.array([float(o.cached_tokens) for _, o in kept]),
    )
