"""The spool: on disk before it is sent, until it is stored; found by others once its process is dead."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from integration.servers import eventually

from penstock.common.adapters.event_spool import DiskSpool, leftovers
from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.errors import SpoolFault
from penstock.common.event_adoption import Adopter
from penstock.common.event_batches import PREVIOUS, SEQUENCE, Message, chain
from penstock.common.event_log import EventWriter
from penstock.common.routing_events import (
    ADMITTED,
    OUTCOME,
    PLACEMENT,
    ROUTED,
    Admission,
    AdmittedEvent,
    OutcomeEvent,
    PlacementEvent,
    RouteEvent,
)
from penstock.common.subjects import EVENTS
from penstock.common.telemetry import Metrics

MIB = 1024 * 1024


def outcome(request: str, *decisions: str) -> OutcomeEvent:
    return OutcomeEvent(request, "m", "completed", 200, "/v1/chat/completions", "1", list(decisions))


class Process:
    """An ingress process with a spool; `die` is SIGKILL."""

    def __init__(
        self, broker: MemoryBroker, root: Path, run: str, size: int = 64 * MIB, kept: int = MIB
    ) -> None:
        self.broker, self.root = broker, root
        self.bus, self.metrics = MemoryBus(broker), Metrics()
        self.spool = DiskSpool(root, "ingress/1", run, size, "second")
        self.writer = EventWriter(
            self.bus, "ingress/1", run, self.metrics, max_kept_bytes=kept, spool=self.spool
        )
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        adopter = Adopter(self.bus, self.writer, EVENTS, "1", lambda: leftovers(self.root, "ingress"))
        self._loops = [asyncio.create_task(work) for work in (self.writer.run(), adopter.run())]

    async def die(self) -> None:
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        self.spool.close(stored=False)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Process]:
        self.start()
        try:
            yield self
        finally:
            assert not any(task.done() for task in self._loops), self._loops
            await self.die()

    def admit(self, number: int, after: str = "") -> None:
        admission = Admission(f"i.{number}", f"r{number}", "m", after)
        self.writer.emit(ADMITTED, "", "1", AdmittedEvent("1", [admission]))
        self.writer.settle()

    def count(self, result: str) -> int:
        return int(self.metrics.counter("penstock_events_total", "", "result").labels(result).value)


def stored(broker: MemoryBroker) -> list[dict[str, object]]:
    stream = broker.streams.get(EVENTS.name)
    messages = stream.messages if stream else []
    return [event for message in messages for event in json.loads(message.payload)]


def of_kind(broker: MemoryBroker, kind: str) -> list[dict[str, object]]:
    return [event["data"] for event in stored(broker) if event["type"] == f"penstock.{kind}.v1"]  # type: ignore[misc]


def held(root: Path) -> list[Path]:
    return list(root.iterdir())


def files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.segment"))


async def test_what_is_settled_is_on_disk_before_the_bus_has_it(tmp_path: Path) -> None:
    process = Process(MemoryBroker(), tmp_path, "run1")
    process.writer.emit(OUTCOME, "m", "r", outcome("r", "i.1"))
    assert not files(tmp_path)
    process.writer.settle()
    assert b'"request_id":"r"' in files(tmp_path)[0].read_bytes()


async def test_a_spool_of_which_everything_is_stored_leaves_nothing(tmp_path: Path) -> None:
    process = Process(MemoryBroker(), tmp_path, "run1")
    async with process.running():
        process.writer.emit(OUTCOME, "m", "r", outcome("r", "i.1"))
        assert await process.writer.flush(5)
        process.spool.close(stored=True)
    assert not held(tmp_path)


async def test_a_later_run_stores_what_a_dead_one_could_not(tmp_path: Path) -> None:
    broker = MemoryBroker()
    broker.set_up(False)
    dead = Process(broker, tmp_path, "run1")
    async with dead.running():
        for number in range(200):
            dead.writer.emit(OUTCOME, "m", f"r{number}", outcome(f"r{number}", f"i.{number}"))
        dead.writer.settle()
    broker.set_up(True)
    async with Process(broker, tmp_path, "run2").running():
        await eventually(lambda: of_kind(broker, "writer"))
    assert [data["request_id"] for data in of_kind(broker, "outcome")] == [f"r{n}" for n in range(200)]
    (change,) = of_kind(broker, "writer")
    assert (change["change"], change["incarnation"], change["last"]) == ("adopted", "run1", 200)
    previous = ""
    for message in broker.streams[EVENTS.name].messages[:4]:
        assert message.headers[PREVIOUS] == previous
        previous = chain(previous, message.payload)


async def test_requests_open_when_their_ingress_died_are_lost_once_each(tmp_path: Path) -> None:
    broker = MemoryBroker()
    dead = Process(broker, tmp_path, "run1")
    async with dead.running():
        for number in range(6):
            dead.admit(number)
        dead.writer.emit(OUTCOME, "m", "r1", outcome("r1", "i.1"))
        # A further attempt of request 2, and one that goes to an endpoint outside.
        again = Admission("i.20", "r2", "m", "i.2")
        dead.writer.emit(ADMITTED, "", "1", AdmittedEvent("1", [again]))
        dead.writer.emit(ROUTED, "m", "external", RouteEvent("external", "m", "openai", "weight", "1"))
        dead.writer.settle()
    async with Process(broker, tmp_path, "run2").running():
        await eventually(lambda: of_kind(broker, "writer"))
    lost = [event for event in stored(broker) if str(event["id"]).startswith("lost/")]
    assert {event["id"]: event["data"]["decisions"] for event in lost if event["data"].get("decisions")} == {  # type: ignore[attr-defined,index]
        "lost/i.0": ["i.0"],
        "lost/i.20": ["i.2", "i.20"],
        "lost/i.3": ["i.3"],
        "lost/i.4": ["i.4"],
        "lost/i.5": ["i.5"],
    }
    assert [event["subject"] for event in lost if not event["data"].get("decisions")] == ["external"]  # type: ignore[attr-defined]
    assert {event["source"] for event in lost} == {"/penstock/ingress/1"}


async def test_a_request_open_since_before_the_segments_that_are_left_is_lost_too(tmp_path: Path) -> None:
    broker = MemoryBroker()
    dead = Process(broker, tmp_path, "run1", size=4 * MIB)
    async with dead.running():
        dead.admit(1)
        long = "x" * 200_000
        for number in range(20):
            event = OutcomeEvent(f"o{number}", "m", "completed", 200, "/", "1", [f"o.{number}"], error=long)
            dead.writer.emit(OUTCOME, "m", f"o{number}", event)
            assert await dead.writer.flush(5)
        assert "00000001" not in files(tmp_path)[0].name
    async with Process(broker, tmp_path, "run2").running():
        await eventually(lambda: of_kind(broker, "writer"))
    assert [data["decisions"] for data in of_kind(broker, "outcome") if data["outcome"] == "lost"] == [
        ["i.1"]
    ]


async def test_what_memory_has_no_room_for_waits_on_disk_and_is_sent_in_order(tmp_path: Path) -> None:
    broker = MemoryBroker()
    broker.set_up(False)
    process = Process(broker, tmp_path, "run1", kept=64 * 1024)
    async with process.running():
        for number in range(100):
            process.writer.emit(PLACEMENT, f"m{number}", "r", unpackable(number))
            process.writer.settle()
        assert process.count("dropped") == 0
        broker.set_up(True)
        assert await process.writer.flush(10)
    ranges = [message.headers[SEQUENCE] for message in broker.streams[EVENTS.name].messages]
    assert ranges == [f"{n}-{n}" for n in range(1, 101)]
    # Those whose messages are all stored are gone; the last one is kept for what comes.
    assert len(files(tmp_path)) == 1


def unpackable(number: int) -> PlacementEvent:
    return PlacementEvent(f"d{number}", "r", "m", "i", "p", "s", fault=os.urandom(10_000).hex())


async def test_a_full_spool_drops_its_oldest_events_and_the_log_says_which(tmp_path: Path) -> None:
    broker = MemoryBroker()
    broker.set_up(False)
    process = Process(broker, tmp_path, "run1", size=MIB, kept=64 * 1024)
    async with process.running():
        for number in range(100):
            process.writer.emit(PLACEMENT, f"m{number}", "r", unpackable(number))
            process.writer.settle()
        assert sum(path.stat().st_size for path in files(tmp_path)) <= MIB
        dropped = process.count("dropped")
        assert 40 < dropped < 80
        broker.set_up(True)
        assert await process.writer.flush(10)
    (gap,) = of_kind(broker, "gap")
    assert (gap["first"], gap["last"], gap["count"]) == (1, dropped, dropped)
    left = [data["decision_id"] for data in of_kind(broker, "placement")]
    assert left == [f"d{number}" for number in range(100 - len(left), 100)]
    assert len(left) >= 100 - dropped


async def test_a_damaged_segment_is_read_up_to_the_damage_and_the_log_says_so(tmp_path: Path) -> None:
    broker = MemoryBroker()
    broker.set_up(False)
    dead = Process(broker, tmp_path, "run1")
    for number in range(3):
        dead.admit(number)
    await dead.die()
    (file,) = files(tmp_path)
    file.write_bytes(file.read_bytes()[:-7])
    broker.set_up(True)
    async with Process(broker, tmp_path, "run2").running():
        await eventually(lambda: of_kind(broker, "writer"))
    (gap,) = of_kind(broker, "gap")
    assert (gap["writer"], gap["incarnation"], gap["first"], gap["count"]) == ("ingress/1", "run1", 3, 0)
    assert "damaged at byte" in str(gap["cause"])


async def test_a_spool_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    living = Process(MemoryBroker(), tmp_path, "run1")
    assert not list(leftovers(tmp_path, "ingress"))
    with pytest.raises(SpoolFault):
        DiskSpool(tmp_path, "ingress/1", "run1", MIB, "never")
    await living.die()
    (found,) = leftovers(tmp_path, "ingress")
    assert not list(leftovers(tmp_path, "scheduler"))
    assert not list(leftovers(tmp_path, "ingress"))
    found.release()
    assert [one.name for one in leftovers(tmp_path, "ingress")] == ["ingress-1.run1"]


async def test_a_disk_that_refuses_is_told_and_costs_no_event(tmp_path: Path) -> None:
    broker = MemoryBroker()
    process = Process(broker, tmp_path, "run1")
    async with process.running():
        process.admit(1)
        # The next write opens the file anew, in a folder that is not there.
        (folder,) = held(tmp_path)
        folder.rename(tmp_path / "moved")
        process.spool._file = -1
        process.admit(2)
        assert await process.writer.flush(5)
        (tmp_path / "moved").rename(folder)
        process.admit(3)
        assert await process.writer.flush(5)
    assert len(of_kind(broker, "admitted")) == 3
    told = [(data["what"], data["active"]) for data in of_kind(broker, "degraded")]
    assert told == [("audit spool", True), ("audit spool", False)]


def test_a_message_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    spool = DiskSpool(tmp_path, "ingress/1", "run1", MIB, "always")
    messages = [Message(n, "s", {"a": str(n)}, b"payload %d" % n, n, n) for n in range(1, 9)]
    spool.write(messages, list)
    for message in messages:
        assert message.place is not None
        loaded = spool.load(message.place)
        assert (loaded.number, loaded.headers, loaded.payload) == (
            message.number,
            message.headers,
            message.payload,
        )
