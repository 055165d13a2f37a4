"""A scheduler on a bus in memory, with clocks that tests move, and what they ask it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.codec import encode_record
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.lifecycle import Lifecycle
from penstock.common.messages import (
    CompleteMarker,
    InFlight,
    LoadReport,
    Placement,
    ScheduleBatch,
    ScheduleReply,
    ScheduleRequest,
)
from penstock.common.model import Endpoint, Instance, Role
from penstock.common.subjects import (
    DEFAULT_SHARD,
    EVENTS,
    INSTANCES,
    SCHEDULE,
    event_filter,
)
from penstock.common.telemetry import Metrics
from penstock.scheduler.service import SchedulerService
from penstock.scheduler.settings import SchedulerSettings


class Clock:
    """A monotonic clock that tests move."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class LoopClock:
    """The clock of an event loop, at a rate that tests set, and with time that they skip."""

    def __init__(self) -> None:
        self.rate, self.skipped_s, self._read_at = 1.0, 0.0, time.monotonic()

    def __call__(self) -> float:
        now = time.monotonic()
        self.skipped_s += (now - self._read_at) * (self.rate - 1.0)
        self._read_at = now
        return now + self.skipped_s


class Tasks(Lifecycle):
    """A lifecycle whose loops run from the moment they are added."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[asyncio.Task[None]] = []

    def add_loop(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(work, name=name))


class Running:
    """One scheduler replica and what a test looks at."""

    def __init__(self, broker: MemoryBroker, name: str, warm_up_s: float, **settings: object) -> None:
        self.clock, self.metrics, self.lifecycle = Clock(), Metrics(), Tasks()
        self.loop_clock = LoopClock()
        self.bus = MemoryBus(broker, self.metrics)
        self.own = Identity("scheduler", name, "1")
        self.events = EventWriter(self.bus, self.own.writer, self.own.incarnation, self.metrics)
        self.service = SchedulerService(
            self.bus,
            self.own,
            self.events,
            self.metrics,
            self.lifecycle,
            SchedulerSettings.model_validate({"prefix_index_blocks": 10_000, **settings}),
            warm_up_s=warm_up_s,
            clock=self.clock,
            loop_clock=self.loop_clock,
        )
        self.ledger, self.view = self.service.replica.ledger, self.service.replica.view

    @property
    def serving(self) -> bool:
        return not self.lifecycle.missing()

    def count(self, name: str, *labels: str) -> float:
        families = {family.name: family for family in self.metrics.snapshot()}
        return next((s.value for s in families[name].samples if s.labels == labels), 0)


@asynccontextmanager
async def replica(
    broker: MemoryBroker, name: str = "s1", warm_up_s: float = 0.0, **settings: object
) -> AsyncIterator[Running]:
    running = Running(broker, name, warm_up_s, **settings)
    await running.service.start()
    running.lifecycle.add_loop("event-log", running.events.run())
    try:
        yield running
    finally:
        for task in running.lifecycle.tasks:
            task.cancel()
        ends = await asyncio.gather(*running.lifecycle.tasks, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


async def eventually(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  # what is waited for is state without an event
            await asyncio.sleep(0.005)


def wire() -> tuple[MemoryBroker, MemoryBus]:
    """A broker and a connection for everybody who is not a scheduler."""
    broker = MemoryBroker()
    return broker, MemoryBus(broker)


async def register(client: MemoryBus, *names: str, complete: bool = True) -> None:
    """Those whose names begin with `p-` prefill, with `d-` decode."""
    await client.ensure_bucket(INSTANCES)
    for name in names:
        role = {"p": Role.PREFILL, "d": Role.DECODE}.get(name.partition("-")[0], Role.NEUTRAL)
        instance = Instance(id=name, endpoint=Endpoint("h", 1), models=("m",), role=role, source="test")
        await client.put(INSTANCES, instance_key(name), encode_instance(instance))
    if complete:
        marker = encode_record(CompleteMarker("test", ("test",)))
        await client.put(INSTANCES, complete_key("test"), marker)


async def events_of(client: MemoryBus, event_type: str, count: int) -> list[dict[str, Any]]:
    """The first events of a type in the log; TimeoutError if there are fewer."""
    events: list[dict[str, Any]] = []
    async with asyncio.timeout(30):
        async for stored in client.follow(EVENTS, event_filter(event_type), since_s=60):
            events += json.loads(stored.payload)
            if len(events) >= count:
                break
    return events


def request(decision: str, **more: object) -> ScheduleRequest:
    return msgspec.structs.replace(ScheduleRequest(decision, f"r-{decision}", "m", prompt_tokens=10), **more)


def batch(*requests: ScheduleRequest, budget_ms: float = 50.0) -> ScheduleBatch:
    return ScheduleBatch("i", "1", budget_ms, requests)


async def ask(client: MemoryBus, *requests: ScheduleRequest, budget_ms: float = 50.0) -> ScheduleReply:
    one = batch(*requests, budget_ms=budget_ms)
    return await client.request(SCHEDULE, one, DEFAULT_SHARD, deadline_s=30.0)


def report(sequence: int, *work: InFlight, finished: tuple[str, ...] = (), pieces: int = 0) -> LoadReport:
    return LoadReport("i", "1", sequence, work, finished, 0, pieces)


def instances_of(reply: ScheduleReply) -> Counter[str]:
    return Counter(outcome.instance for outcome in reply.outcomes if isinstance(outcome, Placement))
