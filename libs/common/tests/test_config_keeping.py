"""Changing live configuration: versions, conflicts, and a bus that forgets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from penstock.common import config_keeping
from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.codec import encode_record
from penstock.common.config_keeping import ConfigWriter, VersionConflict, follow_config
from penstock.common.errors import BusError, BusUnavailable, MessageTooLarge
from penstock.common.event_log import EventWriter
from penstock.common.live_config import DRAIN, USER, Changed, ConfigRecord, LiveConfig, config_key
from penstock.common.subjects import CONFIG, EVENTS
from penstock.common.telemetry import Metrics
from penstock.common.user_hashes import UserHashes


class Process:
    """One that follows and writes."""

    def __init__(self, broker: MemoryBroker, *, keeps: bool = True) -> None:
        self.bus = MemoryBus(broker)
        self.config = LiveConfig(keeps=keeps)
        self.changed: list[Changed] = []
        self.writer = ConfigWriter(self.bus, self.config)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Process]:
        follow = follow_config(self.bus, self.config, lambda changed: self.changed.append(list(changed)))
        task = asyncio.create_task(follow)
        try:
            if self.config.keeps:
                await eventually(lambda: self.config.synced and not self.config.lost)
            yield self
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def eventually(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110  # a condition of several objects, with a deadline
            await asyncio.sleep(0.005)


async def test_a_change_reaches_every_follower_with_its_version_and_writer() -> None:
    broker = MemoryBroker()
    async with Process(broker).running() as one, Process(broker, keeps=False).running() as other:
        await eventually(lambda: other.config.synced)
        first = await one.writer.put(USER, "alice", {"rpm": 1}, "ops", "admin")
        second = await one.writer.put(USER, "alice", {"rpm": 2}, "root", "file")
        await eventually(lambda: other.config.get(USER, "alice") == second)
        assert (first.version, second.version, second.by, second.origin) == (1, 2, "root", "file")
        assert second.changed_at >= first.changed_at > "2020"
        assert other.changed == [[], [(USER, "alice")], [(USER, "alice")]]
        assert one.config.get(USER, "alice") == second


async def test_a_document_that_says_the_same_is_not_written_again() -> None:
    async with Process(MemoryBroker()).running() as one:
        first = await one.writer.put(USER, "a", {"x": [1, None]}, "me", "admin")
        assert await one.writer.put(USER, "a", {"x": [1, None]}, "you", "admin") == first


async def test_a_change_over_another_version_is_refused() -> None:
    async with Process(MemoryBroker()).running() as one:
        await one.writer.put(USER, "a", 1, "me", "admin", expected_version=0)
        with pytest.raises(VersionConflict) as caught:
            await one.writer.put(USER, "a", 2, "me", "admin", expected_version=0)
        assert (caught.value.expected, caught.value.actual) == (0, 1)
        with pytest.raises(VersionConflict):
            await one.writer.delete(USER, "a", "me", "admin", expected_version=2)
        assert await one.writer.delete(USER, "a", "me", "admin", expected_version=1)
        with pytest.raises(VersionConflict):
            await one.writer.put(USER, "a", 2, "me", "admin", expected_version=1)


async def test_versions_go_on_after_a_deletion() -> None:
    async with Process(MemoryBroker()).running() as one:
        await one.writer.put(USER, "a", 1, "me", "admin")
        assert await one.writer.delete(USER, "a", "me", "admin")
        assert not await one.writer.delete(USER, "a", "me", "admin")
        again = await one.writer.put(USER, "a", 1, "me", "admin", expected_version=0)
        assert again.version == 3


async def test_two_who_change_one_document_at_a_time_both_get_through_or_one_is_told() -> None:
    broker = MemoryBroker()
    async with Process(broker).running() as one, Process(broker).running() as other:
        both = [process.writer.put(USER, "a", n, "me", "admin") for n, process in enumerate((one, other))]
        assert sorted(document.version for document in await asyncio.gather(*both)) == [1, 2]
        strict = [process.writer.put(USER, "a", n, "me", "admin", 2) for n, process in ((5, one), (6, other))]
        results = await asyncio.gather(*strict, return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["Document", "VersionConflict"]


async def test_a_value_over_the_bound_is_refused_with_its_bound() -> None:
    async with Process(MemoryBroker()).running() as one:
        with pytest.raises(MessageTooLarge):
            await one.writer.put(USER, "a", "x" * CONFIG.max_value_bytes, "me", "admin")
        assert one.config.get(USER, "a") is None


async def test_nothing_is_written_before_the_configuration_is_known_or_without_a_bus() -> None:
    broker = MemoryBroker()
    with pytest.raises(BusUnavailable):
        await Process(broker).writer.put(USER, "a", 1, "me", "admin")
    async with Process(broker).running() as one:
        broker.set_up(False)
        with pytest.raises(BusError):
            await one.writer.put(USER, "a", 1, "me", "admin")
        broker.set_up(True)
        await one.writer.put(USER, "a", 1, "me", "admin")


async def test_a_bus_that_forgot_everything_is_told_again() -> None:
    broker = MemoryBroker()
    async with Process(broker).running() as one, Process(broker).running() as other:
        kept = await one.writer.put(USER, "kept", {"rpm": 1}, "me", "admin")
        await one.writer.put(DRAIN, "gone", {}, "me", "admin")
        await one.writer.delete(DRAIN, "gone", "me", "admin")
        await eventually(lambda: other.config.sequence == one.config.sequence)
        broker.set_up(False)
        broker.drop_storage()
        broker.set_up(True)
        bucket = broker.buckets[CONFIG.name]
        await eventually(lambda: bucket.exists and len(bucket.entries) == 2)
        await eventually(lambda: not one.config.owed() and not other.config.owed())
        assert one.config.get(USER, "kept") == other.config.get(USER, "kept") == kept
    async with Process(broker).running() as later:
        assert later.config.get(USER, "kept") == kept
        assert later.config.get(DRAIN, "gone") is None
        # The deletion came back with it: the version goes on.
        assert (await later.writer.put(DRAIN, "gone", {}, "me", "admin")).version == 3


async def test_who_slept_through_a_deletion_does_not_bring_the_document_back() -> None:
    broker = MemoryBroker()
    async with Process(broker).running() as one:
        await one.writer.put(USER, "a", 1, "me", "admin")
        sleeper = Process(broker)
        async with sleeper.running():
            pass
        await one.writer.delete(USER, "a", "me", "admin")
        broker.drop_storage()
        async with sleeper.running():
            await eventually(lambda: sleeper.config.get(USER, "a") is None and not sleeper.config.owed())
            await eventually(lambda: not one.config.owed())
            assert one.config.get(USER, "a") is None


async def test_marks_of_deleted_documents_go_after_their_time() -> None:
    broker = MemoryBroker()
    async with Process(broker).running() as one:
        old = (datetime.now(UTC) - config_keeping.MARKS_LAST - timedelta(days=1)).isoformat()
        mark = ConfigRecord(None, 2, "me", old, "admin", kind=USER, name="old", deleted=True)
        await one.bus.put(CONFIG, config_key(USER, "old"), encode_record(mark))
        await one.writer.put(USER, "fresh", 1, "me", "admin")
        await one.writer.delete(USER, "fresh", "me", "admin")
        await config_keeping._sweep(one.bus, one.config)
        assert list(broker.buckets[CONFIG.name].entries) == [config_key(USER, "fresh")]


async def test_a_user_whose_configuration_changes_is_a_hash_in_the_log_if_that_is_asked_for() -> None:
    broker = MemoryBroker()
    process = Process(broker)
    events, users = EventWriter(process.bus, "ingress/i", "run", Metrics()), UserHashes("salt")
    process.writer = ConfigWriter(process.bus, process.config, events, users=users)
    async with process.running():
        log = asyncio.create_task(events.run())
        await process.writer.put(USER, "alice", {"key": "secret"}, "ops", "admin")
        assert await events.flush(5)
        log.cancel()
    text = b"".join(stored.payload for stored in broker.streams[EVENTS.name].messages)
    assert f"user/{users('alice')}".encode() in text
    assert b"alice" not in text


async def test_a_change_is_an_event_that_says_who_and_not_what() -> None:
    broker = MemoryBroker()
    process = Process(broker)
    events = EventWriter(process.bus, "ingress/i", "run", Metrics())
    process.writer = ConfigWriter(process.bus, process.config, events)
    async with process.running():
        log = asyncio.create_task(events.run())
        await process.writer.put(USER, "alice", {"key": "secret"}, "ops", "admin")
        await process.writer.delete(USER, "alice", "ops", "admin")
        await eventually(
            lambda: (
                EVENTS.name in broker.streams
                and b"deleted" in broker.streams[EVENTS.name].messages[-1].payload
            )
        )
        log.cancel()
    text = b"".join(stored.payload for stored in broker.streams[EVENTS.name].messages)
    assert b"penstock.config.v1" in text
    assert b'"change":"created","version":1,"by":"ops","origin":"admin"' in text
    assert b"secret" not in text
