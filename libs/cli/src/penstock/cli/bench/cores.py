"""CPU time of processes in the kernel's accounting, and the cores that they run on."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

import psutil

# clock_getcpuclockid(3) of a process on Linux: nanoseconds, all threads, those that ended included.
_CPUCLOCK_SCHED = 2
# `user` holds the guests' time too.
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")
_PRECISE = sys.platform == "linux"


class Cores(NamedTuple):
    """Where the gateway runs, and where everything else does; both empty where nothing can be pinned."""

    gateway: frozenset[int]
    load: frozenset[int]

    @property
    def pinned(self) -> bool:
        """Whether the gateway has a core of its own."""
        return bool(self.gateway)


def choose_cores() -> Cores:
    """The last core for the gateway (interrupts gather on the first), the others for the rest."""
    if not hasattr(os, "sched_getaffinity"):
        return Cores(frozenset(), frozenset())
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return Cores(frozenset(), frozenset())
    return Cores(frozenset(cores[-1:]), frozenset(cores[:-1]))


def pin(pid: int, cores: Iterable[int]) -> None:
    """Every thread of a process; threads and processes that it starts later inherit it."""
    wanted = frozenset(cores)
    if not wanted:
        return
    for thread in psutil.Process(pid).threads():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, wanted)


def cpu_s(pid: int) -> float:
    """Seconds of CPU used so far, user and system. Raises OSError or psutil.Error if it has ended."""
    if _PRECISE:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def cpu_by_part(parts: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Seconds of CPU by part, over the processes of each."""
    return {name: sum(map(cpu_s, pids)) for name, pids in parts.items()}


def busy_s(cores: Iterable[int]) -> float:
    """Seconds that these cores were not idle since the machine started, whoever used them."""
    every = psutil.cpu_times(percpu=True)
    return sum(float(getattr(every[number], kind, 0.0)) for number in cores for kind in _BUSY)


def resident_mb(pids: Iterable[int]) -> float:
    """Resident memory, in MB of 10^6 bytes."""
    return sum(psutil.Process(pid).memory_info().rss for pid in pids) / 1e6
