"""Hostile messages on every subject and bucket: what is no message is dropped and counted, what is one is
bounded in what it does, and the services go on."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import aiohttp
import msgspec
import pytest

from integration.bus_users import ALL, StackOfUsers, stack_of_users
from integration.hostile import EVIL_TEXT, garbage, mutations
from integration.servers import eventually
from integration.stack import MODEL, chat
from integration.under_attack import admin_ports, attack, dropped
from penstock.common.codec import encode
from penstock.common.messages import (
    DiscoverRequest,
    EngineStatus,
    ExplainRequest,
    Heartbeat,
    InFlight,
    KvEvents,
    LoadReport,
    MirrorCopy,
    MirrorPrimary,
    Placed,
    PlacedFeed,
    ScheduleBatch,
    ScheduleRequest,
    SnapshotRequest,
)
from penstock.common.model import EngineLoad
from penstock.common.subjects import (
    DISCOVER,
    EXPLAIN,
    EXPLAIN_NOW,
    HEARTBEAT,
    KV,
    LOAD,
    MIRROR,
    MIRROR_PRIMARY,
    PLACED,
    SCHEDULE,
    SCHEDULE_BY,
    SNAPSHOT,
    STATUS,
    SUBJECTS,
    Subject,
)

pytestmark = pytest.mark.integration

SCHEDULER_ID = "blue"
BATCH = ScheduleBatch(
    "evil", "run", 50.0, (ScheduleRequest("evil.1", "r", MODEL, block_hashes=b"\1" * 64, max_tokens=5),)
)


def valid(engine: str) -> dict[Any, tuple[str, msgspec.Struct]]:
    """A valid message of each subject, about `engine` where it is about one, and its name on the bus."""
    placed = Placed("evil.2", "evil", "run", engine, 10, 0, b"\2" * 64)
    work = InFlight("evil.3", engine, 10, 1)
    return {
        SCHEDULE.request: (SCHEDULE.request.name("0"), BATCH),
        SCHEDULE_BY.request: (SCHEDULE_BY.request.name("0", SCHEDULER_ID), BATCH),
        PLACED: (PLACED.name("0"), PlacedFeed("evil", "run", 1, (placed,))),
        LOAD: (LOAD.name("evil"), LoadReport("evil", "run", 1, (work,), ("evil.4",))),
        STATUS: (STATUS.name(engine), EngineStatus(engine, EngineLoad(1, 2, 0.5, 100, 16))),
        HEARTBEAT: (HEARTBEAT.name("scheduler"), Heartbeat("scheduler", "evil", "run", True)),
        SNAPSHOT.request: (SNAPSHOT.request.name("0", SCHEDULER_ID), SnapshotRequest("evil")),
        DISCOVER.request: (DISCOVER.request.name(), DiscoverRequest()),
        EXPLAIN.request: (EXPLAIN.request.name("0"), ExplainRequest("evil.1")),
        EXPLAIN_NOW.request: (EXPLAIN_NOW.request.name("0"), BATCH.requests[0]),
        KV: (KV.name(engine), KvEvents(engine, "evil", 1, True)),
        MIRROR: (
            MIRROR.name(MODEL),
            MirrorCopy("e", "r", MODEL, b"POST", b"/v1/chat/completions", b"", b"{}"),
        ),
        MIRROR_PRIMARY: (MIRROR_PRIMARY.name("evil"), MirrorPrimary("e", 200)),
    }


# Not for schedulers.
ELSEWHERE = DISCOVER.request, MIRROR, MIRROR_PRIMARY
# Of these one replica hears; of all else, every one.
BY_ONE = SCHEDULE.request, SCHEDULE_BY.request, SNAPSHOT.request, EXPLAIN_NOW.request


@pytest.fixture(scope="module")
def stack() -> Iterator[StackOfUsers]:
    with stack_of_users() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        stack.start_scheduler("--scheduler-id", SCHEDULER_ID)
        stack.start_scheduler()
        stack.start_ingress()
        yield stack


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.pattern)
async def test_bytes_that_are_no_message_are_dropped_and_counted(
    stack: StackOfUsers, subject: Subject[msgspec.Struct]
) -> None:
    name, _ = valid(stack.engines[0])[subject]
    async with attack(stack) as hostile, aiohttp.ClientSession() as session:
        before = [await dropped(session, port) for port in stack.scheduler_ports]
        sent = garbage(subject.max_bytes)
        for payload in sent.values():
            hostile.publish(name, payload, reply=b"_INBOX.evil.1")
        assert await hostile.settle() == []

        async def counted() -> int:
            after = [await dropped(session, port) for port in stack.scheduler_ports]
            grown = sum(
                (now - then for now, then in zip(after, before, strict=True)), Counter[tuple[str, str]]()
            )
            return sum(count for (pattern, _), count in grown.items() if pattern == subject.pattern)

        if subject in ELSEWHERE:
            return
        hearers = 1 if subject in BY_ONE else len(stack.schedulers)
        await eventually(counted)
        assert await counted() == hearers * len(sent)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.pattern)
async def test_messages_of_hostile_values_do_no_lasting_harm(
    stack: StackOfUsers, subject: Subject[msgspec.Struct]
) -> None:
    name, message = valid(stack.engines[0])[subject]
    async with attack(stack) as hostile:
        for _, payload in mutations(message):
            hostile.publish(name, payload, reply=b"_INBOX.evil.1")
        assert await hostile.settle() == []


# What stands on the wire where a name, a reply address or headers belong.
BYTES = [bytes([byte]) for byte in range(256) if byte not in b" \t\r\n"]
REPLIES = [
    b"",
    b"*",
    b">",
    b"a.*",
    b"_INBOX.*",
    b".",
    b"a..b",
    b"\xff" * 3000,
    b"a" * 3500,
    b"$JS.API.INFO",
    b"r",
]
BLOCKS = [
    b"",
    b"NATS/1.0",
    b"\r\n\r\n",
    b"NATS/1.0\r\n\r\n",
    b"NATS/1.0 100\r\n\r\n",
    b"NATS/1.0 503\r\n\r\n",
    b"NATS/1.0 \xff\xff\xff \xff\r\n\r\n",
    b"NATS/1.0\r\n: \r\n a:b\r\nnone\r\n\r\n",
    b"NATS/1.0\r\n" + b"a:b\r\n" * 5000 + b"\r\n",
    b"\0" * 64,
    b"NATS/1.0\r\nNats-Sequence: 99999999999999999999\r\nStatus: 503\r\n\r\n",
]


async def test_no_bytes_of_a_name_a_reply_address_or_headers_cost_anybody_the_connection(
    stack: StackOfUsers,
) -> None:
    async with attack(stack) as hostile:
        sent = valid(stack.engines[0])
        for (subject, (name, message)), byte in itertools.product(sent.items(), BYTES):
            if subject.pattern.endswith("*") and byte not in (b".", b"*", b">"):
                hostile.publish(f"{name}x".encode() + byte + b"1", encode(message))
        for name, message in sent.values():
            for byte in BYTES:
                hostile.publish(name, encode(message), reply=b"r" + byte + b"1")
            for reply in REPLIES:
                hostile.publish(name, encode(message), reply=reply)
                hostile.publish("$SRV.PING", b"", reply=reply)
            for block in BLOCKS:
                hostile.publish(name, encode(message), b"_INBOX.evil.1", block)
        await hostile.settle()


async def test_forged_sequences_and_replays_do_not_outlast_the_next_snapshots(stack: StackOfUsers) -> None:
    async with (
        attack(stack, ALL) as hostile,
        aiohttp.ClientSession() as session,
        stack.users.client(ALL) as spy,
    ):
        heard = await spy.client.subscribe(LOAD.pattern)
        placed = await spy.client.subscribe(PLACED.pattern)
        for number in range(20):
            await chat(session, stack.url, f"to be replayed {number}")
        recorded = [
            (m.subject, m.data) for s in (heard, placed) for m in [await s.next_msg() for _ in range(5)]
        ]
        report = msgspec.msgpack.decode(recorded[0][1], type=LoadReport)
        for _ in range(3):
            for subject, payload in reversed(recorded):
                hostile.publish(subject, payload)
        for forged in forgeries(report):
            hostile.publish(recorded[0][0], encode(forged))
        await hostile.settle()


def forgeries(seen: LoadReport) -> Iterator[LoadReport]:
    """In the name of a living ingress: a far later sequence, a past one, a snapshot that never ends."""
    far = 2**40 - 1000
    work = tuple(InFlight(f"forged.{n}", "nowhere", 10**6) for n in range(500))
    new = msgspec.structs.replace
    yield new(seen, sequence=far, in_flight=work)
    yield new(seen, sequence=far + 1, in_flight=work[:50], pieces=1)
    yield new(seen, sequence=0, in_flight=work[50:], finished=("forged.1",))
    yield new(seen, sequence=far + 2, in_flight=work[100:], pieces=64, piece=0)
    yield new(seen, sequence=far + 3, in_flight=work[100:], pieces=3, piece=7)
    yield new(seen, sequence=far + 4, incarnation="another run", in_flight=work)
    yield new(seen, sequence=far + 5, finished=tuple(f"{seen.incarnation}.{n:x}" for n in range(1000)))


async def test_floods_of_forged_members_leave_room_for_the_real_ones(stack: StackOfUsers) -> None:
    async with attack(stack) as hostile, aiohttp.ClientSession() as session:
        for number in range(3000):
            name = f"forged-{number}"
            for service in ("scheduler", "ingress"):
                beat = Heartbeat(service, name, "run", True)
                hostile.publish(HEARTBEAT.name(service), encode(beat))
            report = LoadReport(name, "run", 1, (InFlight(f"{name}.1", "nowhere", 100),))
            hostile.publish(LOAD.name(name), encode(report))
        await hostile.settle()
        # While they are believed in, requests are still answered.
        for number in range(20):
            status, _, _ = await chat(session, stack.url, f"meanwhile {number}")
            assert status == 200


async def test_a_hostile_name_ends_no_line_of_a_log_or_a_metric(stack: StackOfUsers) -> None:
    async with attack(stack) as hostile, aiohttp.ClientSession() as session:
        beat = Heartbeat("scheduler", EVIL_TEXT, EVIL_TEXT, True, EVIL_TEXT)
        hostile.publish(HEARTBEAT.name("scheduler"), encode(beat))
        report = LoadReport(EVIL_TEXT, EVIL_TEXT, 1, (InFlight(EVIL_TEXT, EVIL_TEXT, 1),))
        hostile.publish(LOAD.name("x"), encode(report))
        await hostile.settle()
        scheduler = stack.schedulers[0]
        # It is silent from here on, and that is said with its name.
        await eventually(lambda: scheduler.find("ingresses are silent.*x-evil"))
        assert not [line for line in scheduler.lines if line.startswith("x-evil")]
        for port in admin_ports(stack):
            async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
                assert not [line for line in (await response.text()).split("\n") if line.startswith("x-evil")]
