"""The mirror's configuration: whose word counts, and what a file that cannot be used changes (nothing)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from integration.servers import eventually

from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.config_keeping import ConfigWriter
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.live_config import MIRROR, Document, LiveConfig
from penstock.common.mirroring import NAME
from penstock.common.settings import SettingsError, load
from penstock.common.subjects import EVENTS
from penstock.common.telemetry import Metrics
from penstock.mirror.ports import FileMissing, FileUnusable, Said
from penstock.mirror.report import Report
from penstock.mirror.service import Configuration
from penstock.mirror.settings import MirrorSettings

LONG_AGO, TO_COME = "2001-01-01T00:00:00.000000Z", "2999-01-01T00:00:00.000000Z"


def test_the_mirror_has_the_file_and_the_ports_that_users_know() -> None:
    settings = load(MirrorSettings, ["--mirror-id", "m1"], prog="penstock mirror", environ={})
    assert (settings.admin_port, settings.mirror_id, str(settings.mirror_config)) == (
        8084,
        "m1",
        "/mnt/mirror.json",
    )


def test_a_name_that_is_too_long_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="--mirror-id"):
        load(MirrorSettings, ["--mirror-id", "m" * 65], prog="penstock mirror", environ={})


def to(target: str, **more: Any) -> dict[str, Any]:
    return {"Enable": True, "Target": f"http://{target}", "Ratio": 100, **more}


class File:
    """A configuration file in the hands of the test."""

    name = "mirror.json"

    def __init__(self) -> None:
        self.says: object = None
        self.since = LONG_AGO
        self.fault: Exception | None = FileMissing()
        self.looks = 0
        self._told: object = None

    def write(self, value: object, since: str = LONG_AGO) -> None:
        self.says, self.since, self.fault = value, since, None

    async def look(self, *, again: bool) -> Said | None:
        self.looks += 1
        if self.fault is not None:
            raise self.fault
        if not again and self._told == self.says:
            return None
        self._told = self.says
        return Said(self.says, self.since)


class Replica:
    """One mirror's configuration at work."""

    def __init__(self, broker: MemoryBroker, name: str) -> None:
        self.metrics, self.file = Metrics(), File()
        self.bus = MemoryBus(broker, self.metrics)
        identity = Identity("mirror", name, "1")
        self.events = EventWriter(self.bus, identity.writer, "1", self.metrics)
        self.live = LiveConfig(keeps=True)
        self.writer = ConfigWriter(self.bus, self.live, self.events)
        self.report = Report(identity, self.events, self.metrics)
        self.at_work = Configuration(
            self.bus,
            self.live,
            self.writer,
            self.report,
            self.file,
            identity.writer,
            look_every_s=0.005,
            check_every_s=0.05,
        )

    @property
    def target(self) -> str:
        return self.at_work.config.Target.removeprefix("http://")

    @property
    def document(self) -> Document:
        document = self.live.get(MIRROR, NAME)
        assert document is not None
        return document

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Replica]:
        async with asyncio.TaskGroup() as loops:
            tasks = [
                loops.create_task(work)
                for work in (self.at_work.follow(), self.at_work.watch_file(), self.events.run())
            ]
            await eventually(lambda: self.live.synced)
            try:
                yield self
            finally:
                for task in tasks:
                    task.cancel()

    async def looks_again(self) -> None:
        """Until it has looked twice more at its file, and done what follows from it."""
        goal = self.file.looks + 2
        await eventually(lambda: self.file.looks >= goal)


async def test_what_the_file_says_is_for_everybody_with_its_source() -> None:
    replica = Replica(MemoryBroker(), "a")
    async with replica.running():
        await replica.looks_again()
        assert not replica.at_work.config.active
        replica.file.write(to("one"))
        await eventually(lambda: replica.target == "one")
        assert (replica.document.origin, replica.document.by, replica.document.version) == (
            "file",
            "mirror/a",
            1,
        )
        replica.file.write(to("one", Enable=False))
        await eventually(lambda: not replica.at_work.config.active)
        replica.file.write(to("one"))
        await eventually(lambda: replica.at_work.config.active)
        assert replica.document.version == 3


async def test_the_content_changed_last_counts_and_not_who_looks_last() -> None:
    broker = MemoryBroker()
    one, other = Replica(broker, "one"), Replica(broker, "other")
    one.file.write(to("old"))
    other.file.write(to("old"))
    async with one.running(), other.running():
        await eventually(lambda: one.target == other.target == "old")
        one.file.write(to("new"))
        await eventually(lambda: one.target == other.target == "new")
        # The other one's file is read again and again, and still says what was before.
        for _ in range(20):
            await other.looks_again()
        assert (one.target, other.target, one.document.by) == ("new", "new", "mirror/one")
        other.file.write(to("new"))
        await other.looks_again()
        assert one.document.version == 2


@pytest.mark.parametrize(("since", "target"), [(LONG_AGO, "held"), (TO_COME, "started")])
async def test_one_that_starts_writes_what_was_put_into_its_file_since(since: str, target: str) -> None:
    broker = MemoryBroker()
    one, other = Replica(broker, "one"), Replica(broker, "other")
    one.file.write(to("held"))
    other.file.write(to("started"), since)
    async with one.running():
        await eventually(lambda: one.target == "held")
        async with other.running():
            await eventually(lambda: other.target == target)
            for _ in range(5):
                await other.looks_again()
            assert one.target == other.target == target


async def test_what_an_admin_writes_counts_until_it_is_deleted() -> None:
    replica = Replica(MemoryBroker(), "a")
    replica.file.write(to("file"))
    async with replica.running():
        await eventually(lambda: replica.target == "file")
        await replica.writer.put(MIRROR, NAME, to("admin"), "anna", "admin")
        await eventually(lambda: replica.target == "admin")
        replica.file.write(to("file 2".replace(" ", "-")), TO_COME)
        for _ in range(5):
            await replica.looks_again()
        assert (replica.target, replica.document.origin) == ("admin", "admin")
        await replica.writer.delete(MIRROR, NAME, "anna", "admin")
        await eventually(lambda: replica.target == "file-2")
        assert replica.document.origin == "file"


async def test_a_file_that_cannot_be_used_changes_nothing_and_is_told_of_once() -> None:
    broker = MemoryBroker()
    replica = Replica(broker, "a")
    replica.file.write(to("good"))
    async with replica.running():
        await eventually(lambda: replica.target == "good")
        for fault in (FileUnusable("it is not JSON: half"), FileMissing()):
            replica.file.fault = fault
            await eventually(lambda: replica.at_work.file_fault)
            for _ in range(3):
                await replica.looks_again()
            assert replica.target == "good"
        replica.file.write(to("better"))
        await eventually(lambda: replica.target == "better")
        assert replica.at_work.file_fault == ""
        assert await replica.events.flush(5)
    told = [
        (event["data"]["active"], event["data"].get("cause", ""))
        for message in broker.streams[EVENTS.name].messages
        for event in json.loads(message.payload)
        if event["type"] == "penstock.degraded.v1"
    ]
    assert told == [
        (True, "mirror.json: it is not JSON: half"),
        (True, "mirror.json: it is gone, what it said last counts"),
        (False, ""),
    ]


async def test_a_document_that_is_no_configuration_leaves_the_last_good_one() -> None:
    replica = Replica(MemoryBroker(), "a")
    replica.file.write(to("good"))
    async with replica.running():
        await eventually(lambda: replica.target == "good")
        await replica.writer.put(MIRROR, NAME, {"Ratio": 200}, "tool", "admin")
        await eventually(lambda: replica.document.origin == "admin")
        assert replica.target == "good"


async def test_a_change_while_the_bus_is_away_is_written_when_it_is_back() -> None:
    broker = MemoryBroker()
    replica = Replica(broker, "a")
    replica.file.write(to("one"))
    async with replica.running():
        await eventually(lambda: replica.target == "one")
        broker.set_up(False)
        replica.file.write(to("two"))
        await replica.looks_again()
        assert replica.target == "one"
        broker.set_up(True)
        await eventually(lambda: replica.target == "two")
