"""Deadlines and replies on the bus while one side's loop has much to do, on the loop of production."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvloop

from integration.servers import NatsServer, eventually
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.errors import BusError, BusTimeout
from penstock.common.messages import Placement, ScheduleBatch, ScheduleReply, ScheduleRequest
from penstock.common.settings import BusSettings
from penstock.common.subjects import INSTANCES, SCHEDULE
from penstock.common.telemetry import Metrics

pytestmark = pytest.mark.integration

DEADLINE_S = 0.5
PATIENCE_S = 10.0
Handler = Callable[[ScheduleBatch], ScheduleReply | None]


def batch(name: str) -> ScheduleBatch:
    return ScheduleBatch(name, "1", DEADLINE_S * 1000, (ScheduleRequest("d", "r", "m"),))


def reply() -> ScheduleReply:
    """As long as a message of many requests gets."""
    return ScheduleReply("replica", tuple(Placement(f"{n}" * 30, "i" * 50) for n in range(32)))


async def connected(url: str) -> NatsBus:
    bus = NatsBus(BusSettings(nats_url=url), "busy/test", Metrics())
    await bus.start()
    await eventually(lambda: bus.connected)
    return bus


@contextmanager
def scheduler(url: str, handler: Handler) -> Iterator[None]:
    """Serves schedule messages on a loop and thread of its own."""
    ready = threading.Event()
    ended: list[Callable[[], object]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        ended.append(lambda: loop.call_soon_threadsafe(stop.set))
        bus = await connected(url)
        await bus.serve(SCHEDULE, handler, "0")
        ready.set()
        await stop.wait()
        await bus.close()

    thread = threading.Thread(target=lambda: on_uvloop(serve()))
    thread.start()
    assert ready.wait(PATIENCE_S)
    try:
        yield
    finally:
        ended[0]()
        thread.join()


def on_uvloop(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main)


def call(bus: NatsBus, name: str, results: list[ScheduleReply | BusError], deadline_s: float) -> None:
    bus.call(SCHEDULE, batch(name), "0", deadline_s=deadline_s, settled=results.append)


def test_the_time_that_a_loop_was_busy_with_other_things_does_not_make_an_answer_late() -> None:
    asked_for, may_answer = threading.Event(), threading.Event()

    def handler(asked: ScheduleBatch) -> ScheduleReply | None:
        asked_for.set()
        assert may_answer.wait(PATIENCE_S)
        return None if asked.ingress == "silent" else reply()

    async def ask(url: str) -> None:
        bus, results = await connected(url), list[ScheduleReply | BusError]()
        call(bus, "busy", results, DEADLINE_S)
        for _ in range(3):
            # The socket gets what is written at the end of a turn.
            await asyncio.sleep(0)
        assert asked_for.wait(PATIENCE_S)
        busy_until = time.monotonic() + 1.2 * DEADLINE_S
        while time.monotonic() < busy_until:
            pass
        may_answer.set()
        await eventually(lambda: results)
        assert results == [reply()]
        call(bus, "silent", results, DEADLINE_S)
        await eventually(lambda: len(results) == 2)
        assert isinstance(results[1], BusTimeout)
        await bus.close()

    with NatsServer() as nats, scheduler(nats.url, handler):
        on_uvloop(ask(nats.url))


def test_who_asked_first_need_not_wait_until_all_that_came_with_it_are_served() -> None:
    at_work, both_sent, first_served = threading.Event(), threading.Event(), threading.Event()
    in_time: list[bool] = []

    def handler(asked: ScheduleBatch) -> ScheduleReply | None:
        if asked.ingress == "keeps it busy":
            at_work.set()
            assert both_sent.wait(PATIENCE_S)
        elif asked.ingress == "second":
            in_time.append(first_served.wait(PATIENCE_S / 3))
        return reply()

    async def ask(url: str) -> None:
        bus = await connected(url)
        call(bus, "keeps it busy", [], PATIENCE_S)
        await eventually(at_work.is_set)
        results = list[ScheduleReply | BusError]()
        for name in ("first", "second"):
            call(bus, name, results, PATIENCE_S)
        # The server has passed both on: the scheduler will read them together.
        await bus.ensure_bucket(INSTANCES)
        both_sent.set()
        await eventually(lambda: results)
        first_served.set()
        await eventually(lambda: len(results) == 2)
        await bus.close()

    with NatsServer() as nats, scheduler(nats.url, handler):
        on_uvloop(ask(nats.url))
    assert in_time == [True]
