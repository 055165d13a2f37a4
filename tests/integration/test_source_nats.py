"""The NATS source on a real server: the contract of all sources, and what only this one does."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from integration.nats_store import NatsStore
from integration.servers import eventually
from integration.source_contract import SourceContract, instance, reading
from penstock.common.errors import BusError
from penstock.common.subjects import REGISTRATIONS

pytestmark = pytest.mark.integration


@pytest.fixture
async def store() -> AsyncIterator[NatsStore]:
    store = NatsStore()
    try:
        yield await store.start()
    finally:
        await store.close()


class TestNats(SourceContract):
    @pytest.fixture
    async def lab(self, store: NatsStore) -> NatsStore:
        return store


@pytest.fixture
async def hasty() -> AsyncIterator[NatsStore]:
    """Its registrations end after two and a half seconds."""
    store = NatsStore(ttl_ms=2500)
    try:
        yield await store.start()
    finally:
        await store.close()


async def test_a_registration_that_is_not_written_again_ends(hasty: NatsStore) -> None:
    store = hasty
    await store.put(instance("a"))
    async with reading(store) as reader:
        await reader.until("a")
        await reader.until()
        await store.put(instance("a"))
        await reader.until("a")


async def test_instances_stay_for_one_time_after_the_store_lost_them_and_no_longer(hasty: NatsStore) -> None:
    store = hasty
    await store.put(instance("a"), instance("b"))
    async with reading(store) as reader:
        await reader.until("a", "b")
        await store.lose_data()
        await store.put(instance("b", 8001))
        await reader.until_like(instance("b", 8001), "endpoint")
        assert reader.lists("a", "b")
        await eventually(lambda: reader.lists("b") or reader.lists())
        assert not [state for state in reader.states if state.stale and len(state.instances) < 2]


async def test_the_source_makes_the_bucket_and_heartbeats_are_no_changes(store: NatsStore) -> None:
    await store.put(instance("a"))
    async with reading(store) as reader:
        await reader.until("a")
        seen = len(reader.states)
        for _ in range(20):
            await store.put(instance("a"))
        await store.put(instance("b"))
        await reader.until("a", "b")
        assert len(reader.states) == seen + 1


async def test_nobody_but_its_source_makes_the_bucket() -> None:
    store = NatsStore()
    try:
        await store.bus.start()
        await eventually(lambda: store.bus.connected)
        with pytest.raises(BusError):
            await store.bus.put(REGISTRATIONS, "a", b"{}")
        async with reading(store) as reader:
            await store.put(instance("a"))
            await reader.until("a")
    finally:
        await store.close()
