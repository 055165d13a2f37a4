"""The flow of one instance's probes: check, report, wait, again."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from zlib import crc32

from penstock.common.model import Endpoint, InstanceId
from penstock.discovery.followers import Followers
from penstock.discovery.instruments import Instruments
from penstock.discovery.ports import Prober, Reading
from penstock.discovery.reconcile import Verdict

# (instance, address that was probed, verdict) -> seconds until its next probe
Judge = Callable[[InstanceId, Endpoint, Verdict], float]
# (instance, address that was read, reading, age in seconds)
Report = Callable[[InstanceId, Endpoint, Reading, float], None]


# Part of the interval by which rounds differ.
JITTER = 0.05


def part_of(instance_id: InstanceId) -> float:
    """A number in 0..1 that is the instance's own."""
    return crc32(instance_id.encode("utf-8", "replace")) / 2**32


@dataclass
class Slots:
    """How many probes run at one time, over all sources. A check waits for its slot; a reading of load
    is skipped without one, since busy engines take seconds for it and checks must not queue behind."""

    checks: asyncio.Semaphore
    readings: asyncio.Semaphore

    @classmethod
    def of(cls, count: int) -> Slots:
        """`count` checks and as many readings."""
        return cls(asyncio.Semaphore(count), asyncio.Semaphore(count))


class Probing:
    """Probes a changing set of endpoints, each in a task of its own."""

    def __init__(
        self,
        prober: Prober,
        slots: Slots,
        judge: Judge,
        report: Report,
        instruments: Instruments,
        rng: Callable[[], float] = random.random,
    ) -> None:
        """`rng` gives numbers in 0..1; it keeps rounds from falling into step."""
        self._prober, self._slots, self._judge, self._report = prober, slots, judge, report
        self._instruments, self._rng = instruments, rng
        self._followers = Followers(self._follow, "probe")

    def keep(self, endpoints: Mapping[InstanceId, Endpoint]) -> None:
        """Probe exactly these from here on."""
        self._followers.keep(endpoints)

    async def run(self) -> None:
        """Start and end the tasks; until cancelled."""
        await self._followers.run()

    async def _follow(self, instance_id: InstanceId, endpoint: Endpoint) -> None:
        # The first check is at once, the second at the instance's own part of the interval: what began
        # together spreads evenly, in every replica and after every restart in the same way.
        spread, first = part_of(instance_id), True
        while True:
            verdict = await self._check(endpoint)
            # Where its models do not say which engine it is, its metrics do: one that is seen for the first
            # time is told as a whole, not added and updated a moment later.
            strange = first and not verdict.engine
            if strange and not verdict.fault:
                await self._read_load(instance_id, endpoint)
            pause_s = self._judge(instance_id, endpoint, verdict)
            if not strange and not verdict.fault:
                await self._read_load(instance_id, endpoint)
            first = False
            await asyncio.sleep(pause_s * spread)
            spread = 1 + JITTER * (2 * self._rng() - 1)

    async def _check(self, endpoint: Endpoint) -> Verdict:
        async with self._slots.checks:
            started = time.monotonic()
            verdict = await self._prober.check(endpoint)
            self._instruments.probe_seconds.observe(time.monotonic() - started)
        if verdict.fault:
            self._instruments.probe_failures.inc(verdict.fault)
        return verdict

    async def _read_load(self, instance_id: InstanceId, endpoint: Endpoint) -> None:
        if self._slots.readings.locked():
            self._instruments.load_readings.inc("skipped")
            return
        async with self._slots.readings:
            started = time.monotonic()
            reading = await self._prober.read_load(endpoint)
        self._instruments.load_readings.inc("read" if reading.load else "absent")
        # The engine may have taken its figures at any moment since it was asked.
        self._report(instance_id, endpoint, reading, time.monotonic() - started)
