"""One run: the stand, the rounds in random order, and what came of them."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from penstock.cli.bench.clients import Tally
from penstock.cli.bench.cores import Cores, choose_cores, pin
from penstock.cli.bench.measures import TABLE, Figures, Measure, When
from penstock.cli.bench.results import Results
from penstock.cli.bench.settings import MEASURES, BenchSettings, chosen
from penstock.cli.bench.stand import Stand
from penstock.cli.bench.way import Way
from penstock.cli.bench.window import Slot

# What one measurement may take beside its windows (eight at most): connecting, warming up, last answers.
SLOT_MARGIN_S = 60.0


@dataclass
class Run:
    """What a run has found so far."""

    seed: int
    started_at: float
    results: Results = field(default_factory=Results)
    ways: list[str] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    failed: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    heads: Counter[tuple[str, str]] = field(default_factory=Counter)
    strays: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    pinned: bool = False
    seconds: float = 0.0

    def add(self, measure: Measure, slot: Slot, number: int, figures: Figures) -> None:
        """What one measurement gave."""
        tally = slot.tally
        self.results.add(measure.name, slot.way.name, number, figures)
        self.failed += tally.failed
        self.failures.update(f"{slot.way.name}, {measure.name}: {cause}" for cause in tally.failures)
        self.heads[slot.way.name, measure.name] += tally.heads
        self.strays[slot.way.name, measure.name] += tally.strays

    def stray_notes(self) -> list[str]:
        """Where answers did not come the way that was measured."""
        return [
            f"{way}, {measure}: {strays / self.heads[way, measure]:.1%} of the answers came another way"
            for (way, measure), strays in sorted(self.strays.items())
            if strays
        ]

    def say(self, text: str) -> None:
        """For whoever waits, and for the end of the report."""
        self.notes.append(text)
        print(text, file=sys.stderr)


async def bench(settings: BenchSettings) -> Run:
    """Everything, from nothing to nothing. Raises BenchFailed."""
    seed = random.SystemRandom().randrange(2**31) if settings.seed is None else settings.seed
    names = chosen(settings.measures, MEASURES)
    run = Run(seed, time.monotonic(), measures=[m for m in TABLE if m.name in names])
    cores = choose_cores()
    run.pinned = cores.pinned
    # All that is started from here on inherits it; gateways get their own core later.
    pin(os.getpid(), cores.load)
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        stand = Stand(settings, Path(folder), cores)
        try:
            ways = await stand.start(run.say)
            run.ways = [way.name for way in ways]
            await _rounds(settings, run, stand, ways, cores)
        finally:
            await stand.stop()
    run.seconds = time.monotonic() - run.started_at
    return run


async def _rounds(settings: BenchSettings, run: Run, stand: Stand, ways: Sequence[Way], cores: Cores) -> None:
    rng = random.Random(run.seed)
    gc.collect()
    gc.freeze()
    gc.disable()
    repeats = settings.repeats
    turns = [(When.FIRST, 1), *((When.ROUNDS, number) for number in range(1, repeats + 1)), (When.LAST, 1)]
    for when, number in turns:
        due = [measure for measure in run.measures if measure.when is when]
        for measure in rng.sample(due, len(due)):
            print(f"{measure.name}, round {number}", file=sys.stderr)
            names = measure.ways(way.name for way in ways)
            for way in rng.sample([way for way in ways if way.name in names], len(names)):
                stand.check()
                gc.collect()
                slot = Slot(way, settings.slot_s, Tally(way.mark), rng, cores)
                run.add(measure, slot, number, await _figures(settings, measure, slot))


async def _figures(settings: BenchSettings, measure: Measure, slot: Slot) -> Figures:
    try:
        async with asyncio.timeout(SLOT_MARGIN_S + 10 * slot.seconds):
            return await measure.run(slot, settings)
    except (OSError, TimeoutError, psutil.Error) as exc:
        slot.tally.fail(f"cannot be measured: {exc!r}")
        return {}
