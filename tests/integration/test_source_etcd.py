"""The etcd source on real etcd: the contract of all sources, and what only etcd can do to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest

from integration.etcd_lab import DeafProxy, EtcdLab, running_etcd
from integration.etcd_store import PREFIX, EtcdStore, written
from integration.servers import eventually, free_port
from integration.source_contract import SourceContract, instance, reading
from penstock.common.model import Role
from penstock.common.records import LLUMNIX, write_record
from penstock.discovery.adapters.etcd_source import Pace

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def single() -> Iterator[EtcdLab]:
    with running_etcd() as etcd:
        yield etcd


@pytest.fixture
async def store(single: EtcdLab) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(single)
    yield store
    await store.close()


class TestEtcd(SourceContract):
    @pytest.fixture
    async def lab(self, store: EtcdStore) -> EtcdStore:
        return store


async def test_an_instance_ends_with_its_lease(store: EtcdStore) -> None:
    lease = await store.writer.grant(1)
    await store.writer.put({PREFIX + "a": written(instance("a"))}, lease)
    await store.put(instance("b"))
    async with reading(store) as reader:
        await reader.until("a", "b")
        await store.writer.keep_alive(lease)
        await reader.until("b")


async def test_changes_are_seen_after_the_history_was_compacted(store: EtcdStore) -> None:
    """A watch that starts before the compaction is refused: the prefix is listed again."""
    await store.put(instance("a"))
    async with reading(store) as reader:
        await reader.until("a")
        await store.away("frozen")
        await reader.until_stale(True)
        await store.back()
        for port in range(8001, 8004):
            await store.put(instance("b", port))
        await asyncio.to_thread(store.etcd.ctl, "compact", str(await store.writer.revision()))
        await store.delete("a")
        await reader.until("b")


async def test_a_watch_that_hears_nothing_is_found_out(store: EtcdStore) -> None:
    async with DeafProxy(store.etcd.members[0]) as proxy:
        deaf = EtcdStore(store.etcd, endpoints=f"127.0.0.1:{proxy.port}")
        await store.put(instance("a"), instance("b"))
        async with reading(deaf) as reader:
            await reader.until("a", "b")
            proxy.deafen()
            await store.put(instance("c"))
            await reader.until("a", "b", "c")
            await store.delete("c")
            await reader.until("a", "b")


async def test_values_of_any_size_leave_the_rest_listed(store: EtcdStore) -> None:
    huge = 1_400_000
    await store.put(*(instance(f"i{n}") for n in range(10)))
    for n in range(4):
        await store.writer.put({f"{PREFIX}huge{n}": b"x" * huge})
    async with reading(store) as reader:
        await reader.until(*(f"i{n}" for n in range(10)))
        assert set(reader.last.skipped) == {f"{PREFIX}huge{n}" for n in range(4)}
        await store.writer.put({f"{PREFIX}huge9": b"x" * huge})
        await store.put(instance("j"))
        await reader.until(*(f"i{n}" for n in range(10)), "j")


async def test_an_etcd_without_its_json_gateway_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with running_etcd(1, "--enable-grpc-gateway=false") as etcd:
        async with reading(EtcdStore(etcd)) as reader:
            await eventually(lambda: "--enable-grpc-gateway" in caplog.text)
            assert not reader.states


# The effect of each flag.


async def test_endpoints_every_member_that_is_named_is_used(store: EtcdStore) -> None:
    await store.put(instance("a"))
    nobody = f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
    async with reading(EtcdStore(store.etcd, endpoints=f"{nobody},{store.etcd.endpoints}")) as reader:
        await reader.until("a")


async def test_dial_timeout_a_member_that_never_answers_is_left_after_it(store: EtcdStore) -> None:
    await store.put(instance("a"))
    with running_etcd() as other:
        other.members[0].freeze()
        both = f"{other.endpoints},{store.etcd.endpoints}"
        patient = EtcdStore(store.etcd, "--discovery-etcd-dial-timeout", "60", endpoints=both)
        hasty = EtcdStore(store.etcd, "--discovery-etcd-dial-timeout", "0.2", endpoints=both)
        async with reading(patient) as waits, reading(hasty) as reader:
            await reader.until("a")
            assert not waits.states


async def test_lease_ttl_a_record_without_a_lease_ends_by_its_timestamp(store: EtcdStore) -> None:
    await store.writer.put({PREFIX + "a": written(instance("a"), age_s=30)})
    await store.put(instance("b"))
    long = EtcdStore(store.etcd, "--discovery-etcd-lease-ttl", "3600")
    short = EtcdStore(store.etcd, "--discovery-etcd-lease-ttl", "10")
    async with reading(long) as lists, reading(short) as reader:
        await reader.until("b")
        assert "no lease" in reader.last.skipped[PREFIX + "a"]
        await lists.until("a", "b")


async def test_lease_ttl_is_how_long_instances_stay_after_etcd_lost_its_data(store: EtcdStore) -> None:
    await store.put(instance("a"))
    long = EtcdStore(store.etcd, "--discovery-etcd-lease-ttl", "3600")
    short = EtcdStore(store.etcd, "--discovery-etcd-lease-ttl", "1")
    async with reading(long) as keeps, reading(short) as reader:
        await reader.until("a")
        await keeps.until("a")
        await store.lose_data()
        await reader.until()
        await keeps.until_stale(False)
        assert keeps.lists("a")


async def test_refresh_interval_is_the_time_between_full_listings(store: EtcdStore) -> None:
    member, started = store.etcd.members[0], "grpc_server_started_total"
    watches = partial(member.metric, started, grpc_method="Watch")
    await store.put(instance("a"))
    async with reading(store) as seldom:
        await seldom.until("a")
        before = await eventually(watches)
        async with reading(EtcdStore(store.etcd, "--discovery-etcd-refresh-interval-sec", "0.1")) as often:

            async def five_more() -> bool:
                return await watches() >= before + 5

            await eventually(five_more)
            await store.put(instance("b"))
            await often.until("a", "b")
        assert len([state for state in seldom.states if state.instances]) <= 2


async def test_refresh_interval_finds_what_a_deaf_watch_misses(store: EtcdStore) -> None:
    """The proof of the watch would find it too, so it is put off here."""
    slow = Pace(prove_every_s=3600)
    async with DeafProxy(store.etcd.members[0]) as proxy:
        through = f"127.0.0.1:{proxy.port}"
        flags = ("--discovery-etcd-refresh-interval-sec", "0.5")
        await store.put(instance("a"))
        async with (
            reading(EtcdStore(store.etcd, pace=slow, endpoints=through)) as misses,
            reading(EtcdStore(store.etcd, *flags, pace=slow, endpoints=through)) as reader,
        ):
            await reader.until("a")
            await misses.until("a")
            proxy.deafen()
            await store.put(instance("b"))
            await reader.until("a", "b")
            assert misses.lists("a")


async def test_prefix_says_where_the_records_are(store: EtcdStore) -> None:
    await store.put(instance("a"))
    await store.writer.put({"fleet-b/x": written(instance("x")), "fleet-bb/y": written(instance("y"))})
    async with reading(EtcdStore(store.etcd, "--discovery-etcd-prefix", "fleet-b/")) as reader:
        await reader.until("x")


async def test_record_format_llumnix_reads_the_keys_and_messages_of_its_sidecars(store: EtcdStore) -> None:
    pod = instance("pod-0_dp1", role=Role.PREFILL, models=("m",), dp_rank=1, dp_size=2)
    value = write_record([pod], int(time.time() * 1000), LLUMNIX, name="pod-0")
    await store.put(instance("a"))
    await store.writer.put({"llumnix/discovery/pod-0": value, "llumnix/discovery/pod-1": value})
    async with reading(EtcdStore(store.etcd, "--discovery-record-format", "llumnix")) as reader:
        await reader.until("pod-0_dp1")
        assert reader.find("pod-0_dp1") == pod
        assert list(reader.last.skipped) == ["llumnix/discovery/pod-1"]


async def test_a_frozen_member_is_left_for_another() -> None:
    with running_etcd(3) as etcd:
        store = EtcdStore(etcd)
        await store.put(instance("a"))
        async with reading(store) as reader:
            await reader.until("a")
            # The source asks the first one named; what it wrote is on the others, too.
            etcd.members[0].freeze()
            await store.put(instance("b"))
            await reader.until("a", "b")
