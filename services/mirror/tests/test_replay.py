"""Replaying copies: shared, bounded, by the configuration of the moment, and told of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from integration.servers import eventually

from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.messages import MirrorCopy, MirrorPrimary
from penstock.common.mirroring import MirrorConfig
from penstock.common.routing_events import ResponseFigures
from penstock.common.subjects import COPIES, EVENTS, MIRROR, MIRROR_PRIMARY
from penstock.common.telemetry import Metrics
from penstock.mirror.ports import ShadowFailed
from penstock.mirror.replay import Replay
from penstock.mirror.report import Report
from penstock.mirror.shadow_request import ShadowRequest

PROMPT = "what nobody may read"


class Shadow:
    """Answers when it is let."""

    def __init__(self) -> None:
        self.sent: list[ShadowRequest] = []
        self.timeouts: list[float] = []
        self.open = asyncio.Event()
        self.open.set()
        self.fault: Exception | None = None
        self.most = self.now = 0

    async def send(self, request: ShadowRequest, timeout_s: float) -> ResponseFigures:
        self.sent.append(request)
        self.timeouts.append(timeout_s)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await self.open.wait()
            if self.fault is not None:
                raise self.fault
            return ResponseFigures(200, 1.0, 2.0, 30, 4, "stop")
        finally:
            self.now -= 1


class Replica:
    """One mirror that replays."""

    def __init__(self, broker: MemoryBroker, shadow: Shadow, name: str = "m", hands: int = 4) -> None:
        self.metrics, self.shadow = Metrics(), shadow
        self.bus = MemoryBus(broker, self.metrics)
        identity = Identity("mirror", name, "1")
        self.events = EventWriter(self.bus, identity.writer, "1", self.metrics)
        self.config = MirrorConfig(Enable=True, Target="http://shadow", Ratio=100)
        self.report = Report(identity, self.events, self.metrics)
        self.replay = Replay(
            self.bus,
            shadow,
            self.report,
            lambda: self.config,
            max_concurrency=hands,
            request_timeout_s=7.0,
        )

    def configure(self, **fields: Any) -> None:
        self.config = MirrorConfig.model_validate(self.config.model_dump() | fields)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Replica]:
        tasks = [asyncio.create_task(work) for work in (self.replay.run(), self.events.run())]
        try:
            yield self
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.replay.drain(0)

    def counted(self, result: str, reason: str = "") -> float:
        counter = self.metrics.counter("penstock_mirror_copies_total", "", "result", "reason")
        return counter.labels(result, reason).value


class Lab:
    def __init__(self) -> None:
        self.broker, self.shadow = MemoryBroker(), Shadow()
        self.bus = MemoryBus(self.broker)

    def replica(self, name: str = "m", hands: int = 4) -> Replica:
        return Replica(self.broker, self.shadow, name, hands)

    async def publish(self, *names: str, **fields: Any) -> None:
        await self.bus.ensure_stream(COPIES)
        for name in names:
            values: dict[str, Any] = {"headers": b"", "body": f'{{"prompt":"{PROMPT}"}}'.encode()} | fields
            self.bus.publish(MIRROR, MirrorCopy(name, f"r-{name}", "m", b"POST", b"/v1/x", **values), "m")

    @property
    def ids(self) -> list[str]:
        return [dict(request.headers)["x-penstock-mirror"] for request in self.shadow.sent]


@pytest.fixture
async def lab() -> Lab:
    return Lab()


async def test_every_copy_is_sent_once_by_one_replica_or_the_other(lab: Lab) -> None:
    names = [f"{number}" for number in range(100)]
    async with lab.replica("a").running() as one, lab.replica("b").running() as other:
        await lab.publish(*names)
        await eventually(lambda: one.counted("sent") + other.counted("sent") == 100)
    assert sorted(lab.ids) == sorted(names)


async def test_no_more_are_under_way_than_may_be_and_the_rest_waits(lab: Lab) -> None:
    lab.shadow.open.clear()
    async with lab.replica(hands=3).running() as replica:
        await lab.publish(*map(str, range(10)))
        await eventually(lambda: len(lab.shadow.sent) == 3)
        lab.shadow.open.set()
        await eventually(lambda: replica.counted("sent") == 10)
    assert (lab.shadow.most, lab.ids) == (3, [f"{number}" for number in range(10)])


async def test_what_waits_when_it_is_switched_off_is_not_sent(lab: Lab) -> None:
    async with lab.replica().running() as replica:
        replica.configure(Enable=False)
        await lab.publish("1", "2")
        await eventually(lambda: replica.counted("dropped", "disabled") == 2)
        replica.configure(Enable=True)
        await lab.publish("3")
        await eventually(lambda: replica.counted("sent") == 1)
    assert lab.ids == ["3"]


@pytest.mark.parametrize(("timeout_ms", "timeout_s"), [(0, 7.0), (250, 0.25), (5000.0, 5.0)])
async def test_the_timeout_is_in_ms_and_0_stands_for_that_of_requests(
    lab: Lab, timeout_ms: float, timeout_s: float
) -> None:
    async with lab.replica().running() as replica:
        replica.configure(Timeout=timeout_ms)
        await lab.publish("1")
        await eventually(lambda: replica.counted("sent") == 1)
    assert lab.shadow.timeouts == [timeout_s]


@pytest.mark.parametrize(
    ("fault", "result", "reason"),
    [
        (TimeoutError(), "timed_out", "timeout"),
        (ShadowFailed("unreachable", "refused"), "failed", "unreachable"),
    ],
)
async def test_what_became_of_a_copy_is_counted_and_told(
    lab: Lab, fault: Exception, result: str, reason: str
) -> None:
    lab.shadow.fault = fault
    async with lab.replica().running() as replica:
        await lab.publish("1")
        await eventually(lambda: replica.counted(result, reason) == 1)
        lab.shadow.fault = None
        await lab.publish("2")
        await eventually(lambda: replica.counted("sent") == 1)
        assert await replica.events.flush(5)
    log = b"".join(message.payload for message in lab.broker.streams[EVENTS.name].messages)
    assert b'"result":"%b"' % result.encode() in log
    assert b'"result":"sent"' in log
    assert PROMPT.encode() not in log


async def test_a_line_for_each_copy_is_logged_when_that_is_wanted(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with lab.replica().running() as replica:
        for number, wanted in ((1, False), (2, True)):
            replica.report.log_copies = wanted
            await lab.publish(f"{number}")
            await eventually(lambda: replica.counted("sent") == number)  # noqa: B023
    (line,) = [record.fields for record in caplog.records if record.message == "copy"]  # type: ignore[attr-defined]
    assert (line["request_id"], line["result"], line["status"]) == ("r-2", "sent", 200)
    assert PROMPT not in caplog.text


async def test_a_copy_that_is_no_request_and_a_fault_of_ours_cost_no_more_than_themselves(lab: Lab) -> None:
    async with lab.replica(hands=1).running() as replica:
        await lab.publish("bad", headers=b"no header\r\n")
        await eventually(lambda: replica.counted("dropped", "invalid") == 1)
        lab.shadow.fault = KeyError("a fault")
        await lab.publish("fault")
        await eventually(lambda: lab.ids == ["fault"])
        lab.shadow.fault = None
        await lab.publish("good")
        await eventually(lambda: replica.counted("sent") == 1)


async def test_a_drain_lets_what_is_under_way_end(lab: Lab) -> None:
    lab.shadow.open.clear()
    async with lab.replica().running() as replica:
        await lab.publish("1", "2")
        await eventually(lambda: len(lab.shadow.sent) == 2)
        drained = asyncio.create_task(replica.replay.drain(10))
        lab.shadow.open.set()
        await drained
        assert replica.counted("sent") == 2
        assert not replica.replay.under_way


async def test_a_drain_ends_what_does_not_end(lab: Lab) -> None:
    lab.shadow.open.clear()
    async with lab.replica().running() as replica:
        await lab.publish("1")
        await eventually(lambda: lab.shadow.sent)
        await replica.replay.drain(0.01)
        assert (replica.replay.under_way, lab.shadow.now) == (set(), 0)


@pytest.mark.parametrize("first", ["primary", "shadow"])
async def test_both_ends_of_a_compared_request_make_an_event(lab: Lab, first: str) -> None:
    async with lab.replica("a").running() as one, lab.replica("b").running() as other:
        compared = [r.metrics.counter("penstock_mirror_comparisons_total", "") for r in (one, other)]
        await eventually(lambda: len(lab.broker.subscriptions) == 2)
        if first == "shadow":
            await lab.publish("1", compared=True)
            await eventually(lambda: one.counted("sent") + other.counted("sent") == 1)
        lab.bus.publish(MIRROR_PRIMARY, MirrorPrimary("1", 200, 5.0, 6.0, 70, 8, "length"), "i")
        if first == "primary":
            await lab.publish("1", compared=True)
        await eventually(lambda: sum(counter.labels().value for counter in compared) == 1)


async def test_the_bus_may_go_and_come(lab: Lab) -> None:
    async with lab.replica().running() as replica:
        await lab.publish("1")
        await eventually(lambda: replica.counted("sent") == 1)
        lab.broker.set_up(False)
        lab.broker.drop_storage()
        lab.broker.set_up(True)
        await lab.publish("2")
        await eventually(lambda: replica.counted("sent") == 2)
