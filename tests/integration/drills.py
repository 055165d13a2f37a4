"""Outages under load: figures of each phase, the routing log meanwhile, and what is held afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiohttp
import psutil

from integration.servers import NatsServer, Process, eventually
from integration.stack import Ingress, Load, Stack, chat, engine_state, metric
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.settings import BusSettings
from penstock.common.subjects import EVENTS, event_filter
from penstock.common.telemetry import Metrics

# How long an outage lasts: seconds in `make test`, `make soak` sets a minute and more.
OUTAGE_S = float(os.environ.get("PENSTOCK_SOAK_SECONDS", "2"))
CLIENTS = 12
SEEN_WITHIN_S = 60.0
HEALED_WITHIN_S = 30.0
# What an allocator keeps after a busy time, and after the log's writer kept its 8 MiB; a leak of 3 KB per
# request is more than this in 10,000.
RSS_SLACK_BYTES = 30 * 1024 * 1024
Event = tuple[str, dict[str, Any]]


@dataclass
class Phase:
    """Requests that ended in one phase of a drill; times in seconds."""

    name: str
    seconds: list[float] = field(default_factory=list)
    failures: int = 0

    def figures(self) -> str:
        """One line."""
        ordered = sorted(self.seconds) or [0.0]
        p50, p99 = (ordered[min(len(ordered) - 1, int(len(ordered) * q))] * 1000 for q in (0.5, 0.99))
        return (
            f"{self.name:17} {len(self.seconds):6} requests {self.failures:4} failed "
            f"p50 {p50:7.1f} ms p99 {p99:7.1f} ms most {ordered[-1] * 1000:7.1f} ms"
        )


class TimedLoad(Load):
    """A Load that files the time of every request under the phase it ends in."""

    def __init__(self, urls: list[str], clients: int = CLIENTS) -> None:
        super().__init__(urls, clients)
        self.phases = [Phase("before")]

    async def __aenter__(self) -> TimedLoad:
        await super().__aenter__()
        return self

    async def _plain(self, url: str, prompt: str, headers: dict[str, str]) -> str:
        return await self._timed(super()._plain(url, prompt, headers))

    async def _streamed(self, url: str, prompt: str, headers: dict[str, str]) -> str:
        return await self._timed(super()._streamed(url, prompt, headers))

    async def _timed(self, answer: Awaitable[str]) -> str:
        started, failed = time.monotonic(), True
        try:
            text = await answer
            failed = False
            return text
        finally:
            self.phases[-1].seconds.append(time.monotonic() - started)
            self.phases[-1].failures += failed


class Drill:
    """What a test does and looks at while its load runs."""

    def __init__(self, stack: Stack, load: TimedLoad, session: aiohttp.ClientSession, log: list[Event]):
        self.stack, self.load, self.session, self.log = stack, load, session, log
        self.notes: list[str] = []
        self._said = {process: len(process.lines) for process in processes(stack)}

    async def said(self, process: Process, text: str) -> None:
        """A process has logged a line with `text` since the drill began."""
        await eventually(
            lambda: any(text in line for line in process.lines[self._said.get(process, 0) :]), SEEN_WITHIN_S
        )

    def phase(self, name: str) -> None:
        """Requests that end from here on are counted apart."""
        self.load.phases.append(Phase(name))

    async def timed_out(self) -> float:
        """Schedule messages of the first ingress that nobody answered in time, so far."""
        port = self.stack.ingresses[0].admin_port
        name = "penstock_ingress_schedule_attempts_total"
        return (await labelled(self.session, port, name, "result")).get("timeout", 0)

    async def runs(self, seconds: float, at_least: int = 20) -> None:
        """Let the load go on for so long, and for so many answers."""
        until, goal = time.monotonic() + seconds, self.load.answered + at_least
        await eventually(
            lambda: time.monotonic() >= until and self.load.answered >= goal, seconds + SEEN_WITHIN_S
        )

    async def shows(self, name: str, wanted: Callable[[float], bool], port: int | None = None) -> None:
        """A metric (of the first ingress unless `port` says whose) gets a value as wanted."""
        admin_port = port or self.stack.ingresses[0].admin_port

        async def seen() -> None:
            value = await metric(self.session, admin_port, name)
            assert wanted(value), f"{name} is {value}"

        await until_true(seen, SEEN_WITHIN_S)

    async def logged(self, kind: str, **data: object) -> None:
        """An event with these data is in the routing log since the drill began."""

        def found() -> None:
            events = [event for of, event in self.log if of == kind]
            assert any(data.items() <= event.items() for event in events), f"no {kind} {data} in {events}"

        await until_true(found, SEEN_WITHIN_S)

    async def healed(self, placed_by_scheduler: int = 10) -> None:
        """Requests are placed by schedulers again, `placed_by_scheduler` in a row."""
        started = time.monotonic()

        async def placed() -> None:
            for n in range(placed_by_scheduler):
                status, headers, _ = await chat(self.session, self.stack.url, f"who placed this {n}")
                assert status == 200
                assert headers["routing-strategy"] != "local"

        await until_true(placed, HEALED_WITHIN_S)
        self.notes.append(f"placed by schedulers again {time.monotonic() - started:.1f} s after the outage")

    async def used(self, engine: str) -> None:
        """An engine is given requests."""
        started = time.monotonic()
        before = (await engine_state(self.session, engine))["requests_total"]

        async def working() -> bool:
            return bool((await engine_state(self.session, engine))["requests_total"] > before)

        await eventually(working, HEALED_WITHIN_S)
        self.notes.append(f"engine takes work again {time.monotonic() - started:.1f} s after it is back")


async def until_true(check: Callable[[], Any], timeout_s: float) -> None:
    """`eventually` for checks that assert."""

    async def passes() -> bool:
        outcome = check()
        if asyncio.iscoroutine(outcome):
            await outcome
        return True

    await eventually(passes, timeout_s)


@asynccontextmanager
async def drill(
    stack: Stack, name: str, *, may_fail: Callable[[str], bool] | None = None, clients: int = CLIENTS
) -> AsyncIterator[Drill]:
    """A load before, during and after the block. At the end no request has failed but those that `may_fail`
    (given the failure's text), nothing is in flight anywhere, and pools and memory are as before.

    Prints the figures; pytest shows them with -s.
    """
    async with aiohttp.ClientSession() as session, following(stack) as log:
        await stack.ready()
        async with TimedLoad([stack.url], clients) as load:
            running = Drill(stack, load, session, log)
            await running.runs(1.0, at_least=200)
            before = held_memory(stack)
            running.phase("during")
            yield running
            running.phase("after")
            await running.runs(1.0, at_least=100)
            await load.stop()
        lines = [phase.figures() for phase in load.phases] + running.notes + load.failures[:5]
        print(f"\n{name}\n  " + "\n  ".join(lines))
        wrong = [f for f in load.failures if may_fail is None or not may_fail(f)]
        assert not wrong, f"{len(wrong)} requests failed: {wrong[:5]}"
        await until_true(partial(nothing_is_held, stack, session, clients), HEALED_WITHIN_S)
        grown = {p: rss - before[p] for p, rss in held_memory(stack).items() if p in before}
        assert all(growth < RSS_SLACK_BYTES for growth in grown.values()), f"memory grew: {grown}"


async def nothing_is_held(stack: Stack, session: aiohttp.ClientSession, clients: int) -> None:
    """Ingresses, schedulers and engines count no request; every upstream connection is idle, and there are
    no more of them than clients ever needed."""
    held: dict[str, float] = {}
    for ingress in stack.ingresses:
        for name in ("ingress_exchanges", "ingress_in_flight", "events_unacknowledged_bytes"):
            full = f"penstock_{name}"
            held[f"{full} of {ingress.port}"] = await metric(session, ingress.admin_port, full)
        connections = await upstream_connections(session, ingress)
        held["upstream connections in use"] = connections["open"] - connections["idle"]
        held["more upstream connections than clients"] = max(
            0, connections["open"] - clients * len(stack.engines)
        )
    for port in stack.scheduler_ports:
        unsent = await metric(session, port, "penstock_events_unacknowledged_bytes")
        held[f"events of {port} that are not stored"] = unsent
        held[f"ledger of {port}"] = await metric(session, port, "penstock_scheduler_in_flight_requests")
    for engine in stack.engines:
        state = await engine_state(session, engine)
        held[f"engine {engine}"] = state["running"] + state["waiting"]
    assert not any(held.values()), {name: count for name, count in held.items() if count}


async def upstream_connections(session: aiohttp.ClientSession, ingress: Ingress) -> dict[str, float]:
    """Upstream connections of an ingress: {"open": n, "idle": n}."""
    return await labelled(session, ingress.admin_port, "penstock_ingress_upstream_connections", "state")


async def labelled(
    session: aiohttp.ClientSession, admin_port: int, name: str, label: str
) -> dict[str, float]:
    """A metric's values by its one label."""
    async with session.get(f"http://127.0.0.1:{admin_port}/metrics") as response:
        text = await response.text()
    pairs = re.findall(rf'^{name}{{{label}="([^"]*)"}} (\S+)$', text, re.MULTILINE)
    return {value: float(number) for value, number in pairs}


def processes(stack: Stack) -> list[Process]:
    """Those whose log lines tell of degradation."""
    known = [*stack.schedulers, *(ingress.process for ingress in stack.ingresses)]
    return known if stack.discovery is None else [*known, stack.discovery]


def workers(ingress: Ingress) -> list[psutil.Process]:
    """The worker processes of an ingress."""
    return list(psutil.Process(ingress.process.pid).children())


def held_memory(stack: Stack) -> dict[int, int]:
    """Resident bytes by process id: workers of the ingresses, and schedulers."""
    processes = [worker for ingress in stack.ingresses for worker in workers(ingress)]
    processes += [psutil.Process(scheduler.pid) for scheduler in stack.schedulers]
    return {process.pid: process.memory_info().rss for process in processes}


@contextlib.contextmanager
def frozen(*processes: Process | NatsServer) -> Iterator[None]:
    """SIGSTOP for the block."""
    for process in processes:
        process.freeze()
    try:
        yield
    finally:
        for process in processes:
            process.thaw()


@asynccontextmanager
async def following(
    stack: Stack, kinds: tuple[str, ...] = ("degraded", "instance")
) -> AsyncIterator[list[Event]]:
    """Events of the routing log as they come, (type, data)."""
    bus = NatsBus(BusSettings(nats_url=stack.events_url), "drill", Metrics())
    log: list[Event] = []
    await bus.start()
    await eventually(lambda: bus.connected)
    followers = [asyncio.create_task(_follow(bus, kind, log), name=f"follow {kind}") for kind in kinds]
    try:
        yield log
    finally:
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        await bus.close()


async def _follow(bus: NatsBus, kind: str, log: list[Event]) -> None:
    async for stored in bus.follow(EVENTS, event_filter(kind), None):
        events = json.loads(stored.payload)
        for event in events if isinstance(events, list) else [events]:
            log.append((kind, event["data"]))
