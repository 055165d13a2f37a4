"""Hostile records in the registry and hostile events in the log: what is stored may not harm for good."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import aiohttp
import msgspec
import pytest
from nats.js.errors import APIError

from integration.bus_labs import collecting
from integration.bus_users import ALL, StackOfUsers, stack_of_users
from integration.hostile import EVIL_TEXT, HOSTILE_VALUES, garbage, paths, replaced
from integration.servers import eventually
from integration.stack import MODEL, metric
from integration.under_attack import admin_ports, attack, response_head
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.bus import Listing
from penstock.common.codec import encode_record
from penstock.common.instances import complete_key, instance_key
from penstock.common.messages import (
    CompleteMarker,
)
from penstock.common.model import Endpoint, Instance
from penstock.common.permissions import AUDITOR, JOIN
from penstock.common.settings import BusSettings
from penstock.common.subjects import EVENTS, INSTANCES, event_filter, event_subject
from penstock.common.telemetry import Metrics

pytestmark = pytest.mark.integration

SOURCE = "endpoints"
HEADER_BLOCKS = [
    b"NATS/1.0",
    b"\r\n\r\n",
    b"NATS/1.0 100\r\n\r\n",
    b"NATS/1.0 204 EOB\r\n\r\n",
    b"NATS/1.0 404\r\n\r\n",
    b"NATS/1.0 503\r\n\r\n",
    b"NATS/1.0\r\nStatus: 100\r\n\r\n",
    b"NATS/1.0\r\nStatus: 204\r\nNats-Sequence: 1\r\nNats-Last-Sequence: 7\r\n\r\n",
    b"NATS/1.0\r\nKV-Operation: DEL\r\n\r\n",
    b"NATS/1.0\r\n" + b"a:b\r\n" * 100 + b"\r\n",
    b"NATS/1.0 \xff\xff\xff\r\n\xff:\xff\r\n\r\n",
]

# What the server may not do to the other records of the bucket because of one.
REFUSED_BLOCKS = [b"NATS/1.0\r\nNats-Rollup: all\r\n\r\n", b"NATS/1.0\r\nNats-TTL: 1s\r\n\r\n"]


@pytest.fixture(scope="module")
def stack() -> Iterator[StackOfUsers]:
    with stack_of_users() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        stack.start_scheduler()
        stack.start_ingress()
        yield stack


def record(name: str, endpoint: Endpoint, *models: str) -> Instance:
    return Instance(id=name, endpoint=endpoint, models=models, source="evil")


def subject_of(name: str) -> str:
    return INSTANCES.subject(instance_key(name))


def mutated_records() -> Iterator[bytes]:
    """A valid record with one value replaced by each that JSON can hold."""
    plain = json.loads(encode_record(record("evil", Endpoint("127.0.0.1", 9), "evil-model")))
    for path in paths(plain):
        for value in HOSTILE_VALUES.values():
            if not isinstance(value, bytes | msgspec.msgpack.Ext):
                yield json.dumps(replaced(plain, path, value)).encode()


async def test_records_that_are_none_are_counted_and_cost_nobody_anything(stack: StackOfUsers) -> None:
    (engine,) = stack.engines
    keys = ["instance.evil", instance_key(engine), complete_key(SOURCE), "complete.evil", "evil", "a.b.c.d"]
    async with attack(stack) as hostile, aiohttp.ClientSession() as session:
        for key in keys:
            for payload in garbage(INSTANCES.max_value_bytes).values():
                if len(payload) <= INSTANCES.max_value_bytes:
                    hostile.publish(INSTANCES.subject(key), payload)
        for payload in mutated_records():
            hostile.publish(subject_of("evil"), payload)
        for byte in (b"\x0b", b"\x0c", b"\xff", b"\x00"):
            hostile.publish(INSTANCES.subject("instance.x").encode() + byte + b"1", b"{}")
        hostile.publish(INSTANCES.subject("complete.evil"), encode_record(CompleteMarker(SOURCE, ())))
        hostile.publish(subject_of("evil"), b"{}")
        assert await hostile.settle() == []
        for port in admin_ports(stack):
            await eventually(lambda port=port: metric(session, port, "penstock_registry_undecodable_total"))  # type: ignore[misc]
        # Whoever starts among the remains becomes ready all the same.
        ingress = stack.start_ingress()
        await stack.ready()
        ingress.process.terminate()
        await asyncio.to_thread(ingress.process.assert_exit, 0)
        stack.ingresses.remove(ingress)


@pytest.mark.parametrize("block", HEADER_BLOCKS + REFUSED_BLOCKS, ids=repr)
async def test_headers_of_a_record_do_not_blind_the_watch(stack: StackOfUsers, block: bytes) -> None:
    probe = record("probe", Endpoint("127.0.0.1", 9), "probe-model")
    async with attack(stack) as hostile, aiohttp.ClientSession() as session:

        async def listed() -> bool:
            async with session.get(f"{stack.url}/v1/models") as response:
                return "probe-model" in await response.text()

        hostile.publish(subject_of("evil"), encode_record(record("evil", probe.endpoint)), block=block)
        hostile.publish(subject_of("probe"), encode_record(probe))
        await hostile.settle()
        await eventually(listed)
        hostile.publish(subject_of("probe"), b"", block=b"NATS/1.0\r\nKV-Operation: DEL\r\n\r\n")
        await hostile.settle()

        async def gone() -> bool:
            return not await listed()

        await eventually(gone)
        for port in admin_ports(stack):
            assert await metric(session, port, "penstock_registry_lost") == 0
        # Whoever lists the bucket from here on finds the fleet in it.
        assert {instance_key(stack.engines[0]), complete_key(SOURCE)} <= await keys_of_a_new_listing(stack)


async def test_a_purge_takes_nothing_out_of_the_registry(stack: StackOfUsers) -> None:
    await stack.ready()
    async with stack.users.client(ALL) as everything:
        for subject in (None, subject_of("*")):
            with pytest.raises(APIError, match="purge"):
                await everything.client.jetstream().purge_stream(INSTANCES.stream, subject=subject)
    assert {instance_key(stack.engines[0]), complete_key(SOURCE)} <= await keys_of_a_new_listing(stack)


async def keys_of_a_new_listing(stack: StackOfUsers) -> set[str]:
    bus = NatsBus(BusSettings(nats_url=stack.users.url("ingress")), "ingress/test", Metrics())
    await bus.start()
    async with collecting(bus.watch(INSTANCES)) as events:
        await eventually(lambda: events)
    await bus.close()
    assert isinstance(events[0], Listing)
    return set(events[0].entries)


async def test_the_name_of_an_instance_adds_no_header_to_a_response(stack: StackOfUsers) -> None:
    host, port = stack.engines[0].split(":")
    evil = record(EVIL_TEXT, Endpoint(host, int(port)), MODEL)
    async with attack(stack) as hostile:
        hostile.publish(subject_of(evil.id), encode_record(evil))
        await hostile.settle()

        async def served_by_it() -> bytes:
            head = await response_head(stack.url)
            return head if b"target-pod: a" in head else b""

        head = await eventually(served_by_it)
        assert b"\nx-evil" not in head.lower()
        assert head.startswith(b"HTTP/1.1 200 ")
        hostile.publish(subject_of(evil.id), b"", block=b"NATS/1.0\r\nKV-Operation: DEL\r\n\r\n")
        await hostile.settle()


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1\r\nx-evil: 1",
        "127.0.0.1\n",
        "127.0.0.1 x",
        "[::1]",
        "",
        "a/b",
        "a@b",
        "a\x00b",
        "ä",
        "x" * 513,
    ],
)
async def test_a_host_that_could_end_a_header_is_no_host(stack: StackOfUsers, host: str) -> None:
    evil = record("evil", Endpoint(host, 80), "evil-model")
    async with attack(stack) as hostile, aiohttp.ClientSession() as session:
        (port,) = (ingress.admin_port for ingress in stack.ingresses)
        before = await metric(session, port, "penstock_registry_undecodable_total")
        hostile.publish(subject_of("evil"), encode_record(evil))
        await hostile.settle()

        async def counted() -> bool:
            return await metric(session, port, "penstock_registry_undecodable_total") > before

        await eventually(counted)


async def test_a_lease_that_nobody_can_read_is_taken_over(stack: StackOfUsers) -> None:
    async with attack(stack) as hostile:
        for payload in (b"\xff", b'{"holder": "evil", "incarnation": "x", "counter": 9}', b"{}"):
            hostile.publish(INSTANCES.subject(f"lease.{SOURCE}"), payload)
        await hostile.settle()
        discovery = stack.discovery
        assert discovery is not None
        await eventually(lambda: discovery.find("is written by unreadable"))
        taken = [line for line in discovery.lines if "is written by this replica" in line]
        again = "is written by this replica"
        await eventually(lambda: len([li for li in discovery.lines if again in li]) > len(taken))


async def test_hostile_events_do_not_stop_whoever_follows_the_log(stack: StackOfUsers) -> None:
    await stack.ready()
    bus = NatsBus(BusSettings(nats_url=stack.users.url(AUDITOR)), "tap/test", Metrics())
    await bus.start()
    async with (
        collecting(bus.follow(EVENTS, event_filter("outcome", "evil"), 3600)) as stored,
        attack(stack, JOIN) as hostile,
    ):
        subject = event_subject("outcome", "evil")
        for number, block in enumerate(HEADER_BLOCKS):
            hostile.publish(subject, b"%d" % number, block=block)
        for block in REFUSED_BLOCKS:
            hostile.publish(subject, b"refused", block=block)
        hostile.publish(subject, b"end")
        await hostile.settle()
        await eventually(lambda: stored and stored[-1].payload == b"end")
        assert [m.payload for m in stored] == [*(b"%d" % n for n in range(len(HEADER_BLOCKS))), b"end"]
        assert [m.sequence for m in stored] == sorted({m.sequence for m in stored})
    await bus.close()
