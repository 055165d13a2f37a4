"""What is seen of a load between two moments."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.cli.bench.clients import Tally
from penstock.cli.bench.cores import Cores, busy_s, cpu_by_part
from penstock.cli.bench.way import GATEWAY, Way

WARM_S = 0.3
# Answers still under way when a window is over get this long.
PATIENCE_S = 15.0


@dataclass(frozen=True)
class Window:
    """Answers or chunks, their times, and CPU seconds by part; `core_s` is all use of the gateway's core."""

    seconds: float
    done: int
    times_ns: Sequence[int]
    cpu_s: dict[str, float]
    core_s: float = 0.0

    def percentile_us(self, percent: float) -> float:
        """The time that `percent` of the answers did not exceed; nan without answers."""
        ordered = sorted(self.times_ns)
        if not ordered:
            return float("nan")
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] / 1000

    def each_us(self, part: str) -> float:
        """CPU microseconds of a part for each answer or chunk; nan if it has none."""
        return self.cpu_s[part] / self.done * 1e6 if part in self.cpu_s and self.done else float("nan")

    @property
    def rate(self) -> float:
        """Answers or chunks in a second."""
        return self.done / self.seconds

    @property
    def per_core(self) -> float:
        """Answers or chunks in a second of the gateway's CPU."""
        return 1e6 / self.each_us(GATEWAY) if self.cpu_s.get(GATEWAY) else float("nan")

    @property
    def gateway_ratio(self) -> float:
        """How busy the gateway kept its core, 0..1."""
        return self.cpu_s[GATEWAY] / self.seconds if GATEWAY in self.cpu_s else float("nan")

    @property
    def foreign_ratio(self) -> float:
        """How busy others kept the gateway's core, 0..1."""
        return max(0.0, self.core_s - self.cpu_s.get(GATEWAY, 0.0)) / self.seconds


@dataclass(frozen=True)
class Slot:
    """One measurement: of which way, for how long, on what cores."""

    way: Way
    seconds: float
    tally: Tally
    rng: random.Random
    cores: Cores
    patience_s: float = PATIENCE_S

    @property
    def warm_s(self) -> float:
        """Seconds of load before the window."""
        return min(WARM_S, self.seconds / 4)

    async def window(self) -> Window:
        """Watch for the slot's time what goes on."""
        tally, parts, core = self.tally, self.way.parts, self.cores.gateway
        done, times, cpu, core_s = tally.done, len(tally.times_ns), cpu_by_part(parts), busy_s(core)
        began = time.perf_counter()
        await asyncio.sleep(self.seconds)
        elapsed = time.perf_counter() - began
        used = {name: spent - cpu[name] for name, spent in cpu_by_part(parts).items()}
        return Window(elapsed, tally.done - done, tally.times_ns[times:], used, busy_s(core) - core_s)
