"""`penstock register` as a process beside simulated engines, on each of its stores."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

import pytest
from aiohttp import web

from integration.etcd_lab import EtcdLab, running_etcd
from integration.etcd_store import EtcdStore
from integration.nats_store import NatsStore
from integration.redis_lab import NOTIFY, RedisServer, RedisStore
from integration.servers import Process, eventually, free_port, http_status
from integration.source_contract import Reader, StoreLab, reading
from penstock.common.model import Role

pytestmark = pytest.mark.integration

HEARTBEAT_S = "0.4"
PATIENCE_S = 60.0
MODEL, ADAPTER = "sim-model", "sim-adapter"
SERVER_INFO = {
    "disaggregation_mode": "prefill",
    "disaggregation_bootstrap_port": 8998,
    "dp_size": 4,
    "tp": [1],
}


class Sidecar(Process):
    """One process of `penstock register`, as it is run by module name."""

    port: int

    @classmethod
    def start(cls, store: Sequence[str], *flags: str) -> Sidecar:
        """`store` and `flags` are added to short intervals."""
        port = free_port()
        made = cls.module(
            "penstock.discovery.register",
            *("--admin-port", str(port), "--heartbeat-interval", HEARTBEAT_S),
            *("--probe-interval", "0.2", "--probe-timeout", "1", "--store-timeout", "1"),
            *store,
            *flags,
        )
        made.port = port
        return made

    def answers(self, path: str) -> bool:
        return http_status(f"http://127.0.0.1:{self.port}{path}") == 200


def sim(port: int = 0) -> Process:
    """One simulated engine."""
    flags = "--port", str(port), "--lora-adapters", ADAPTER, "--owned-by", "vllm"
    made = Process.module("penstock.sim", *flags)
    made.wait_for_line("listening on")
    return made


def address(engine: Process) -> str:
    match = engine.find(r"listening on http://(\S+)")
    assert match
    return match[1]


@dataclass
class Case:
    """A store, the flags by which a sidecar reaches it, and the ways to go away that are tried."""

    store: StoreLab
    flags: tuple[str, ...]
    outages: Sequence[str]


@pytest.fixture(scope="module")
def engine() -> Iterator[Process]:
    """One that is left alone."""
    with sim() as running:
        yield running


@pytest.fixture(scope="module")
def etcd() -> Iterator[EtcdLab]:
    with running_etcd() as lab:
        yield lab


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with RedisServer(*NOTIFY) as server:
        yield server


async def nats_case(request: pytest.FixtureRequest) -> Case:
    store = await NatsStore(ttl_ms=2000).start()
    # A frozen one is found by pings, which takes long, and is the source's own test.
    return Case(store, store.register_flags, ("stopped",))


async def etcd_case(request: pytest.FixtureRequest) -> Case:
    store = EtcdStore(request.getfixturevalue("etcd"))
    flags = ("--store", "etcd", "--discovery-etcd-endpoints", store.etcd.endpoints)
    return Case(store, (*flags, "--discovery-etcd-lease-ttl", "2"), store.outages)


async def redis_case(request: pytest.FixtureRequest) -> Case:
    store = RedisStore(request.getfixturevalue("redis"), ttl_ms=2000)
    return Case(store, store.register_flags, store.outages)


@pytest.fixture(params=[nats_case, etcd_case, redis_case], ids=["nats", "etcd", "redis"])
async def case(request: pytest.FixtureRequest) -> AsyncIterator[Case]:
    made: Case = await request.param(request)
    try:
        yield made
    finally:
        await made.store.close()


async def until_registered(reader: Reader, *engines: str) -> None:
    await eventually(lambda: bool(reader.states) and reader.listed.keys() == {*engines}, PATIENCE_S)


async def test_engines_are_registered_with_what_they_say_and_withdrawn_at_once_when_they_fail(
    case: Case,
) -> None:
    with sim() as one, sim() as other:
        here, there = address(one), address(other)
        engines = f"http://{here},prefill@{there}"
        with Sidecar.start(case.flags, "--engine", engines, "--labels", "zone=a") as sidecar:
            async with reading(case.store) as reader:
                await until_registered(reader, here, there)
                listed = reader.listed
                assert (listed[here].models, listed[here].lora_adapters) == ((MODEL,), (ADAPTER,))
                assert (listed[here].role, listed[there].role) == (Role.NEUTRAL, Role.PREFILL)
                assert (listed[here].owner, listed[here].labels) == ("vllm", {"zone": "a"})
                await eventually(lambda: sidecar.answers("/readyz"), PATIENCE_S)

                one.kill()
                await until_registered(reader, there)
                await eventually(lambda: sidecar.answers("/readyz"))
                other.kill()
                await until_registered(reader)
                assert not sidecar.answers("/readyz")
                await eventually(lambda: sidecar.answers("/livez"))

                with sim(int(here.rsplit(":")[-1])):
                    await until_registered(reader, here)
                    sidecar.terminate()
                    await until_registered(reader)
                    await asyncio.to_thread(sidecar.assert_exit, 0, PATIENCE_S)


async def test_a_store_that_was_away_or_lost_its_data_is_written_again_and_a_killed_sidecar_s_record_ends(
    case: Case, engine: Process
) -> None:
    here = address(engine)
    with Sidecar.start(case.flags, "--engine", here) as sidecar:
        await eventually(lambda: sidecar.answers("/readyz"), PATIENCE_S)
        for how in case.outages:
            await case.store.away(how)
            await eventually(lambda: not sidecar.answers("/readyz"))
            await eventually(lambda: sidecar.answers("/livez"))
            await case.store.back()
            await eventually(lambda: sidecar.answers("/readyz"), PATIENCE_S)
        async with reading(case.store) as reader:
            await until_registered(reader, here)
            # Else it may write it again before anybody has looked.
            sidecar.freeze()
            await case.store.delete(here)
            await until_registered(reader)
            sidecar.thaw()
            await until_registered(reader, here)
        await case.store.lose_data()
        async with reading(case.store) as reader:
            await until_registered(reader, here)
            sidecar.kill()
            await until_registered(reader)


async def test_a_store_that_is_away_at_the_start_and_at_the_end_costs_the_sidecar_nothing(
    engine: Process,
) -> None:
    store = ("--store", "etcd", "--discovery-etcd-endpoints", f"127.0.0.1:{free_port()}")
    secret = "the-password"
    user = ("--discovery-etcd-username", "u", "--discovery-etcd-password", secret)
    with Sidecar.start([*store, *user], "--engine", address(engine)) as sidecar:
        await asyncio.to_thread(sidecar.wait_for_line, "the store is not written", PATIENCE_S)
        await eventually(lambda: sidecar.answers("/livez"))
        assert not sidecar.answers("/readyz")
        sidecar.terminate()
        await asyncio.to_thread(sidecar.assert_exit, 0, PATIENCE_S)
        assert secret not in sidecar.stderr


async def test_llumnix_gateways_find_the_engine_and_a_frozen_store_delays_the_end_by_the_drain_timeout(
    redis: RedisServer, engine: Process
) -> None:
    store = RedisStore(redis, "--discovery-record-format", "llumnix", ttl_ms=2000)
    llumnix = ("--discovery-record-format", "llumnix", "--name", "pod-7", "--kv-address", "10.0.0.7:20000")
    flags = (*llumnix, "--engine", f"decode@{address(engine)}", "--drain-timeout", "0.3")
    try:
        with Sidecar.start(store.register_flags, *flags) as sidecar:
            async with reading(store) as reader:
                await until_registered(reader, "pod-7_dp0")
                found = reader.listed["pod-7_dp0"]
                said = (str(found.endpoint), found.role, found.models, found.kv_address)
                assert said == (address(engine), Role.DECODE, (MODEL,), "10.0.0.7:20000")
            with redis.client() as client:
                assert client.keys() == [b"llumnix:discovery:pod-7"]
                assert 0 < client.pttl("llumnix:discovery:pod-7") <= 2000
            await store.away("frozen")
            sidecar.terminate()
            await asyncio.to_thread(sidecar.assert_exit, 0, PATIENCE_S)
            assert "is not withdrawn and will expire" in sidecar.stderr
    finally:
        await store.close()


class Moody:
    """An engine that answers as it is told to."""

    def __init__(self) -> None:
        self.mood = "well"

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/server_info" and self.mood == "sglang":
            return web.json_response(SERVER_INFO)
        if request.path != "/v1/models":
            return web.Response()
        match self.mood:
            case "garbage":
                return web.Response(body=b"\xff\x00{" * 1000)
            case "nested":
                return web.Response(body=b"[" * 200_000)
            case "many":
                return web.json_response({"data": [{"id": f"model-{n}"} for n in range(20_000)]})
            case "endless":
                response = web.StreamResponse()
                await response.prepare(request)
                with contextlib.suppress(ConnectionError):
                    while True:
                        await response.write(b" " * 65_536)
                return response
            case "elsewhere":
                raise web.HTTPFound("http://127.0.0.1:1/")
            case "named":
                return web.json_response({"data": [{"id": "x" * 400, "owned_by": "\u0000\n" * 100}]})
        owner = "sglang" if self.mood == "sglang" else "vllm"
        return web.json_response({"data": [{"id": "m", "owned_by": owner}]})


@contextlib.asynccontextmanager
async def moody() -> AsyncIterator[tuple[Moody, str]]:
    engine, app = Moody(), web.Application()
    app.router.add_get("/{path:.*}", engine.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield engine, f"127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_hostile_answers_cost_an_engine_its_registration_and_a_good_one_is_read_further() -> None:
    store = await NatsStore().start()
    try:
        async with moody() as (engine, here), reading(store) as reader:
            with Sidecar.start(store.register_flags, "--engine", here) as sidecar:
                await until_registered(reader, here)
                for mood in ("garbage", "nested", "many", "endless", "elsewhere", "named"):
                    engine.mood = mood
                    await until_registered(reader)
                    engine.mood = "well"
                    await until_registered(reader, here)
                assert sidecar.exit_code is None
                engine.mood = "sglang"
                await eventually(lambda: reader.listed[here].role is Role.PREFILL)
                said = reader.listed[here]
                assert (said.engine, said.dp_size, said.bootstrap_port) == ("sglang", 4, 8998)
    finally:
        await store.close()


def test_every_fault_of_the_settings_is_told_at_once() -> None:
    flags = (
        *("--engine", "ftp://x", "--store", "mysql", "--labels", "zone", "--dp-size", "-1"),
        *("--heartbeat-interval", "30", "--no-such-flag", "--advertise-host", "a/b"),
    )
    with Process.module("penstock.discovery.register", *flags) as sidecar:
        sidecar.assert_exit(2, 20.0)
    for flag in ("--engine", "--store", "--labels", "--dp-size", "--no-such-flag", "--advertise-host"):
        assert flag in sidecar.stderr
