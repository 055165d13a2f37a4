"""The Redis source on real Redis: the contract of all sources, and what only Redis can do to it."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import pytest
import trustme

from integration.redis_lab import (
    NOTIFY,
    PREFIX,
    Proxy,
    RedisServer,
    RedisStore,
    clustered,
    replicated,
    written,
)
from integration.servers import eventually, free_port
from integration.source_contract import SourceContract, instance, reading
from penstock.common.records import LLUMNIX, PENSTOCK, write_record
from penstock.discovery.adapters.redis_client import RedisClient, RedisFailed
from penstock.discovery.adapters.redis_source import Pace

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def notifying() -> Iterator[RedisServer]:
    with RedisServer(*NOTIFY) as server:
        yield server


@pytest.fixture(scope="module")
def silent() -> Iterator[RedisServer]:
    with RedisServer() as server:
        yield server


@pytest.fixture
async def store(silent: RedisServer) -> AsyncIterator[RedisStore]:
    store = RedisStore(silent)
    yield store
    await store.close()


HOUR_MS = "3600000"
# A record ahead of time has its whole time from the moment it is read, however slow the machine is.
AHEAD_S = -3600.0


def told_at_once(server: RedisServer) -> RedisStore:
    """Records are read once in an hour: what is seen before is told by notifications."""
    return RedisStore(server, "--discovery-redis-refresh-interval-ms", HOUR_MS)


class TestRedisPolled(SourceContract):
    @pytest.fixture
    async def lab(self, store: RedisStore) -> RedisStore:
        return store


class TestRedisNotifying(SourceContract):
    @pytest.fixture
    async def lab(self, notifying: RedisServer) -> AsyncIterator[RedisStore]:
        store = told_at_once(notifying)
        yield store
        await store.close()


@pytest.fixture(params=["polled", "notifying"])
async def either(
    request: pytest.FixtureRequest, silent: RedisServer, notifying: RedisServer
) -> AsyncIterator[RedisStore]:
    store = RedisStore(silent) if request.param == "polled" else told_at_once(notifying)
    yield store
    await store.close()


async def test_the_last_record_ends_when_it_is_deleted_or_its_key_expires(either: RedisStore) -> None:
    await either.put(instance("a"))
    async with reading(either) as reader:
        await reader.until("a")
        await either.delete("a")
        await reader.until()
        await either.run("SET", PREFIX + "b", written(instance("b")), "PX", 200)
        await reader.until("b")
        await reader.until()


async def test_a_record_that_is_not_written_again_ends_by_its_timestamp(either: RedisStore) -> None:
    endless = write_record((instance("b"),), 0, PENSTOCK)
    await either.set(("a", written(instance("a"), age_s=AHEAD_S)), ("b", endless))
    async with reading(either) as reader:
        await reader.until("a", "b")
        await reader.until("b")
        assert "timestamp" in reader.last.skipped[PREFIX + "a"]
        await either.put(instance("a"))
        await reader.until("a", "b")


async def test_a_store_that_is_emptied_keeps_its_instances_for_one_ttl(silent: RedisServer) -> None:
    long, short = RedisStore(silent, ttl_ms=60_000), RedisStore(silent, ttl_ms=1500)
    await long.set(*((name, written(instance(name), age_s=AHEAD_S)) for name in ("a", "b")))
    async with reading(long) as keeps, reading(short) as reader:
        await reader.until("a", "b")
        await keeps.until("a", "b")
        await long.run("FLUSHALL")
        await reader.until()
        assert keeps.lists("a", "b")
        await long.set(("b", written(instance("b", 8002), age_s=2 * AHEAD_S)))
        await long.put(instance("c", 8003))
        await keeps.until("a", "b", "c")
        assert keeps.find("b").endpoint.port == 8002
    await long.close()


async def test_instances_outlive_an_outage_longer_than_their_time(silent: RedisServer) -> None:
    store = RedisStore(silent, ttl_ms=1500)
    await store.set(("a", written(instance("a"), age_s=AHEAD_S)))
    async with reading(store) as reader:
        await reader.until("a")
        await store.away("frozen")
        await reader.until_stale(True)
        stale_since = asyncio.get_running_loop().time()
        await eventually(lambda: asyncio.get_running_loop().time() > stale_since + 1.6)
        assert reader.lists("a")
        await store.back()
        await reader.until_stale(False)
        assert reader.lists("a")
        await reader.until()
    await store.close()


async def test_records_of_any_kind_harm_no_other(store: RedisStore) -> None:
    await store.put(instance("a"))
    await store.set(("b-again", written(instance("a"))), ("huge", b"x" * 1_000_000), ("empty", b""))
    await store.set(
        ("role", written(instance("c")).replace(b"8000", b'8000,"x":1},"role":"encode","y":{"z":0'))
    )
    await store.run("LPUSH", PREFIX + "list", "x")
    await store.run("SET", PREFIX.encode() + b"\xff\n", "x")
    async with reading(store) as reader:
        await reader.until("a")
        assert {key.removeprefix(PREFIX): why for key, why in reader.last.skipped.items()} == {
            "b-again": f"instance a stands under {PREFIX}a already",
            "huge": "it has more than 65536 bytes",
            "empty": "it is empty",
            "role": reader.last.skipped[PREFIX + "role"],
            "list": "it is not a string",
            "\\xff\n": "its key is not UTF-8",
        }
        assert "encode" in reader.last.skipped[PREFIX + "role"]


async def test_keys_that_only_look_alike_are_not_read(store: RedisStore) -> None:
    other = written(instance("x"))
    await store.put(instance("a"))
    await store.run("MSET", "penstock:discover", other, "xpenstock:discovery:x", other, "fleet[1]:x", other)
    await store.run("MSET", "fleet1:y", written(instance("y")))
    async with reading(store) as reader:
        await reader.until("a")
    async with reading(RedisStore(store.server, "--discovery-redis-prefix", "fleet[1]:")) as reader:
        await reader.until("x")


async def test_whoever_answers_something_else_is_told_and_harms_nothing(
    store: RedisStore, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b":1\r\n" * 50,
        b"*-5\r\n",
        b"$9999999999\r\nx",
        b"\x00" * 99,
        b"",
    ]

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers[0])
        answers.append(answers.pop(0))
        await writer.drain()

    caplog.set_level(logging.WARNING)
    async with await asyncio.start_server(answer, "127.0.0.1", port := free_port()):
        other = RedisStore(store.server, "--discovery-redis-url", f"redis://127.0.0.1:{port}")
        async with reading(other) as reader:
            await eventually(lambda: caplog.text.count("Redis cannot be read") >= len(answers) - 1)
            assert not reader.states


async def test_passwords_are_in_no_log_and_no_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with RedisServer("--requirepass", "right-secret") as server:
        store = RedisStore(server, "--discovery-redis-password", "wrong-secret")
        async with reading(store) as reader:
            await eventually(lambda: "Redis cannot be read" in caplog.text)
            assert not reader.states
    assert "invalid username-password pair" in caplog.text
    assert "secret" not in caplog.text


async def test_sentinels_name_the_master_also_after_a_failover() -> None:
    with replicated() as (master, replica, sentinel):
        nobody = f"127.0.0.1:{free_port()}"
        url = f"redis+sentinel://{nobody},{sentinel.address}/fleet"
        store = RedisStore(master, "--discovery-redis-url", url, ttl_ms=60_000)
        await store.put(instance("a"))
        async with reading(store) as reader:
            await reader.until("a")
            with replica.client() as follower:
                await eventually(lambda: follower.exists(PREFIX + "a"))
                await store.away("stopped")
                await eventually(lambda: follower.info("replication")["role"] == "master")
            promoted = RedisStore(replica)
            await promoted.put(instance("b"))
            await reader.until("a", "b")
            await reader.until_stale(False)
            sentinel.kill()
            await promoted.put(instance("c"))
            await reader.until("a", "b", "c")


async def test_a_cluster_is_read_on_all_its_primaries() -> None:
    with clustered() as nodes:
        url = f"redis+cluster://127.0.0.1:{free_port()},{nodes[0].address}"
        flags = "--discovery-redis-refresh-interval-ms", "500"
        store = RedisStore(nodes[0], "--discovery-redis-url", url, *flags, ttl_ms=60_000)
        client = RedisClient(store.settings())
        names = [f"i{n}" for n in range(30)]
        for name in names:
            await client.run(PREFIX + name, "SET", PREFIX + name, written(instance(name)))
        async with reading(store) as reader:
            await reader.until(*names)
            await client.run(PREFIX + "i0", "DEL", PREFIX + "i0")
            await reader.until(*names[1:])
            nodes[1].kill()
            await reader.until_stale(True)
            assert reader.lists(*names[1:])
            nodes[1].start()
            await reader.until_stale(False)
            await reader.until(*names[1:])
        await client.close()
        nobody = RedisStore(nodes[0], "--discovery-redis-url", f"redis+cluster://127.0.0.1:{free_port()}")
        with pytest.raises(RedisFailed, match="nodes are not known"):
            await RedisClient(nobody.settings()).nodes()


# The effect of each flag.


async def test_host_and_port_say_where_redis_is(store: RedisStore) -> None:
    await store.put(instance("a"))
    by_name = RedisStore(
        store.server,
        *("--discovery-redis-url", ""),
        *("--discovery-redis-host", "localhost", "--discovery-redis-port", str(store.server.port)),
    )
    async with reading(by_name) as reader:
        await reader.until("a")


async def test_url_names_the_database_too(store: RedisStore) -> None:
    await store.put(instance("a"))
    with store.server.client() as client:
        client.select(3)
        client.set(PREFIX + "b", written(instance("b")))
    url = f"redis://{store.server.address}/3"
    async with reading(RedisStore(store.server, "--discovery-redis-url", url)) as reader:
        await reader.until("b")


RULES = (
    "~penstock:discovery:* resetchannels &__keyspace@0__:penstock:discovery:* "
    "+scan +getrange +exists +psubscribe +punsubscribe +ping"
)


@pytest.mark.parametrize("info", ["+info", ""])
async def test_username_and_password_are_those_of_a_user_with_few_rights(
    notifying: RedisServer, info: str
) -> None:
    owner = told_at_once(notifying)
    await owner.run("ACL", "SETUSER", "reader", "on", ">secret", *RULES.split(), *info.split())
    await owner.put(instance("a"))
    who = "--discovery-redis-username", "reader", "--discovery-redis-password", "secret"
    slow = "--discovery-redis-refresh-interval-ms", HOUR_MS
    async with reading(RedisStore(notifying, *who, *slow)) as reader:
        await reader.until("a")
        await owner.put(instance("b"))
        await reader.until("a", "b")
        await owner.run("FLUSHALL")
        await reader.source.refresh()
        await owner.put(instance("c"))
        await reader.until("a", "b", "c") if info else await eventually(lambda: "c" in reader.listed)
    await owner.close()


async def test_socket_timeout_is_how_long_a_silent_server_is_waited_for(store: RedisStore) -> None:
    await store.put(instance("a"))
    patient = RedisStore(store.server, "--discovery-redis-socket-timeout", "20")
    hasty = RedisStore(store.server, "--discovery-redis-socket-timeout", "0.1")
    async with reading(patient) as waits, reading(hasty) as reader:
        await reader.until("a")
        await waits.until("a")
        await store.away("frozen")
        await reader.until_stale(True)
        assert not waits.last.stale
        await store.back()
        await reader.until_stale(False)


async def test_retry_times_is_how_often_a_broken_connection_is_made_again(store: RedisStore) -> None:
    await store.put(instance("a"))
    never = Pace(retry_first_s=3600, retry_max_s=3600)
    for times, connections in ((0, 1), (3, 3)):
        async with Proxy(store.server, drops=2) as proxy:
            flags = (
                *("--discovery-redis-url", f"redis://127.0.0.1:{proxy.port}"),
                *("--discovery-redis-retry-times", str(times), "--discovery-redis-notifications", "false"),
            )
            async with reading(RedisStore(store.server, *flags, pace=never)) as reader:
                await eventually(partial(lambda proxy, count: proxy.connections == count, proxy, connections))
                if times:
                    await reader.until("a")
                assert bool(reader.states) is bool(times)


async def test_status_ttl_is_the_age_at_which_a_record_ends(store: RedisStore) -> None:
    await store.set(("a", written(instance("a"), age_s=30)), ("b", written(instance("b"))))
    long, short = RedisStore(store.server, ttl_ms=60_000), RedisStore(store.server, ttl_ms=20_000)
    async with reading(long) as lists, reading(short) as reader:
        await lists.until("a", "b")
        await reader.until("b")


async def test_refresh_interval_is_the_time_between_readings(store: RedisStore) -> None:
    async def scans() -> int:
        stats = await store.run("INFO", "commandstats")
        return int(stats["cmdstat_scan"]["calls"])

    await store.put(instance("a"))
    async with reading(told_at_once(store.server)) as seldom:
        await seldom.until("a")
        before = await scans()
        often = RedisStore(store.server, "--discovery-redis-refresh-interval-ms", "20")
        async with reading(often) as reader:

            async def ten_more() -> bool:
                return await scans() >= before + 10

            await eventually(ten_more)
            await store.put(instance("b"))
            await reader.until("a", "b")
        assert seldom.lists("a")


async def test_notifications_can_be_left_out(notifying: RedisServer) -> None:
    store = told_at_once(notifying)
    flags = "--discovery-redis-refresh-interval-ms", HOUR_MS, "--discovery-redis-notifications", "false"
    await store.put(instance("a"))
    async with reading(store) as told, reading(RedisStore(notifying, *flags)) as reader:
        await told.until("a")
        await reader.until("a")
        await store.put(instance("b"))
        await told.until("a", "b")
        assert reader.lists("a")
        assert await store.run("PUBSUB", "NUMPAT") == 1
        await reader.source.refresh()
        await reader.until("a", "b")
    await store.close()


async def test_record_format_is_that_of_llumnix_sidecars_too(store: RedisStore) -> None:
    ranks = [instance(f"pod-1_dp{n}", 8000 + n, dp_rank=n, dp_size=2) for n in range(2)]
    value = write_record(ranks, 2**50, LLUMNIX)
    await store.put(instance("a"))
    await store.run("MSET", "llumnix:discovery:pod-1", value, "llumnix:discovery:bad", b"\xff")
    async with reading(RedisStore(store.server, "--discovery-record-format", "llumnix")) as reader:
        await reader.until("pod-1_dp0", "pod-1_dp1")
        assert [*reader.last.skipped] == ["llumnix:discovery:bad"]


async def test_tls_is_verified_and_shows_its_own_certificate(
    store: RedisStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ca, stranger = trustme.CA(), trustme.CA()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    ca.configure_trust(context)
    ca.issue_cert("127.0.0.1").configure_cert(context)
    own = ca.issue_cert("discovery@fleet")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in own.cert_chain_pems))
    own.private_key_pem.write_to_path(key)
    files = tmp_path / "ca.pem", tmp_path / "stranger.pem"
    ca.cert_pem.write_to_path(files[0])
    stranger.cert_pem.write_to_path(files[1])
    await store.put(instance("a"))
    async with Proxy(store.server, tls=context) as proxy:
        url = (
            *("--discovery-redis-url", f"rediss://127.0.0.1:{proxy.port}"),
            *("--discovery-redis-socket-timeout", "5"),
        )
        pair = "--discovery-redis-tls-cert", str(cert), "--discovery-redis-tls-key", str(key)
        good, bad = (("--discovery-redis-tls-ca", str(file)) for file in files)
        for flags, reason in ((bad + pair, "CERTIFICATE_VERIFY_FAILED"), (good, "Redis cannot be read")):
            caplog.clear()
            async with reading(RedisStore(store.server, *url, *flags)) as reader:
                await eventually(partial(lambda reason: reason in caplog.text, reason))
                assert not reader.states
        async with reading(RedisStore(store.server, *url, *good, *pair)) as reader:
            await reader.until("a")


async def test_sentinel_username_and_password_are_for_the_sentinels_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with replicated() as (master, _, sentinel):
        with sentinel.client() as client:
            client.execute_command("ACL", "SETUSER", "watcher", "on", ">secret", "+@all", "~*", "&*")
            client.execute_command("ACL", "SETUSER", "default", "off")
        store = RedisStore(master)
        await store.put(instance("a"))
        url = "--discovery-redis-url", f"redis+sentinel://{sentinel.address}/fleet"
        who = (
            "--discovery-redis-sentinel-username",
            "watcher",
            "--discovery-redis-sentinel-password",
            "secret",
        )
        async with (
            reading(RedisStore(master, *url, *who)) as reader,
            reading(RedisStore(master, *url)) as nobody,
        ):
            await reader.until("a")
            await eventually(lambda: "no sentinel names the master fleet" in caplog.text)
            assert not nobody.states
