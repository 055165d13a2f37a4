"""Decisions per second of schedulers as processes, with everything they hear and tell on a real bus.

An asker stands for an ingress: it asks the queue group in messages of 32, reports what it has in flight every
25 ms and all of it every second, and ends each request after a while. Scheduler CPU is the kernel's account.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from functools import partial
from random import Random

import numpy as np
import psutil
from integration.servers import eventually, http_status

from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.codec import encode_record
from penstock.common.errors import BusError
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.messages import (
    CompleteMarker,
    Heartbeat,
    Placement,
    ScheduleBatch,
    ScheduleReply,
    ScheduleRequest,
)
from penstock.common.model import Endpoint, Instance
from penstock.common.settings import BusSettings
from penstock.common.subjects import DEFAULT_SHARD, HEARTBEAT, INSTANCES, LOAD, SCHEDULE
from penstock.common.telemetry import Metrics
from penstock.ingress.in_flight import InFlightAccount
from penstock.scheduler.bench import MODEL, prompts
from replica_bench.fleet import running_fleet

BATCH, PROMPT_TOKENS = 32, 1000
REPORT_S, SNAPSHOT_S, DEADLINE_S = 0.025, 1.0, 2.0
# What the fleet has in flight, in requests per instance.
PER_INSTANCE = 8


@dataclass(frozen=True)
class Figures:
    """Of one run. `cpu_us` is scheduler CPU per decision, of all replicas together."""

    decisions_per_s: float
    cpu_us: float
    p50_ms: float
    p99_ms: float
    unanswered: int


class Asker:
    """An ingress without clients."""

    def __init__(self, bus: NatsBus, blocks: int, instances: int) -> None:
        self._bus, self._prompts = bus, prompts(blocks, Random(1))
        self._account = InFlightAccount("asker", "1")
        self._running: deque[str] = deque()
        self._most = instances * PER_INSTANCE
        self._number = 0
        self._snapshot_at = 0.0
        self.decided = self.unanswered = 0
        self.seconds: list[float] = []

    async def ask_on(self) -> None:
        """One message after the other."""
        while True:
            requests = tuple(self._request() for _ in range(BATCH))
            started = time.perf_counter()
            try:
                reply = await self._bus.request(
                    SCHEDULE,
                    ScheduleBatch("asker", "1", 1000.0, requests),
                    DEFAULT_SHARD,
                    deadline_s=DEADLINE_S,
                )
            except BusError:
                self.unanswered += 1
                continue
            self.seconds.append(time.perf_counter() - started)
            self._take(reply)

    def _request(self) -> ScheduleRequest:
        self._number += 1
        return ScheduleRequest(
            f"d{self._number}",
            f"r{self._number}",
            MODEL,
            prompt_tokens=PROMPT_TOKENS,
            block_hashes=next(self._prompts),
        )

    def _take(self, reply: ScheduleReply) -> None:
        for outcome in reply.outcomes:
            if isinstance(outcome, Placement):
                self.decided += 1
                self._account.start(
                    outcome.decision_id, outcome.instance, PROMPT_TOKENS, outcome.matched_tokens
                )
                self._running.append(outcome.decision_id)
        while len(self._running) > self._most:
            self._account.finish(self._running.popleft())

    async def report_on(self) -> None:
        """What an ingress tells, as often as it does."""
        while True:
            now = time.monotonic()
            whole = now >= self._snapshot_at
            if whole:
                self._snapshot_at = now + SNAPSHOT_S
                self._bus.publish(HEARTBEAT, Heartbeat("ingress", "asker", "1", True), "ingress")
            for report in self._account.snapshot() if whole else self._account.changes():
                self._bus.publish(LOAD, report, "asker")
            await asyncio.sleep(REPORT_S)


async def measure(replicas: int, *, instances: int, blocks: int, seconds: float) -> Figures:
    """Messages are kept under way, two for each replica and two more."""
    with running_fleet() as fleet:
        bus = NatsBus(BusSettings(nats_url=fleet.nats.url), "asker", Metrics())
        await bus.start()
        await eventually(lambda: bus.connected)
        try:
            await _register(bus, instances)
            for _ in range(replicas):
                await asyncio.to_thread(fleet.start_scheduler)
            for port in fleet.admin_ports:
                await eventually(partial(_is_ready, port), 30.0)
            asker = Asker(bus, blocks, instances)
            tasks = [asyncio.create_task(asker.report_on(), name="reports")]
            tasks += [
                asyncio.create_task(asker.ask_on(), name=f"asker {number}")
                for number in range(2 * replicas + 2)
            ]
            await asyncio.sleep(2.0)
            figures = await _window(asker, [psutil.Process(one.pid) for one in fleet.schedulers], seconds)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return figures
        finally:
            await bus.close()


async def _window(asker: Asker, schedulers: list[psutil.Process], seconds: float) -> Figures:
    asker.seconds.clear()
    decided, cpu_s, started = asker.decided, _cpu_s(schedulers), time.perf_counter()
    await asyncio.sleep(seconds)
    passed_s = time.perf_counter() - started
    decided, cpu_s = asker.decided - decided, _cpu_s(schedulers) - cpu_s
    p50, p99 = np.percentile(asker.seconds, (50, 99)) * 1000
    return Figures(decided / passed_s, cpu_s / decided * 1e6, p50, p99, asker.unanswered)


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in processes)


async def _is_ready(port: int) -> bool:
    return await asyncio.to_thread(http_status, f"http://127.0.0.1:{port}/readyz") == 200


async def _register(bus: NatsBus, count: int) -> None:
    await bus.ensure_bucket(INSTANCES)
    for number in range(count):
        name = f"10.0.{number >> 8}.{number & 255}:8000"
        instance = Instance(id=name, endpoint=Endpoint("h", 8000), models=(MODEL,), source="bench")
        await bus.put(INSTANCES, instance_key(name), encode_instance(instance))
    await bus.put(INSTANCES, complete_key("bench"), encode_record(CompleteMarker("bench", ("bench",))))
