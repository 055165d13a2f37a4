"""Who may do what on the bus of `penstock up` (DESIGN D13), tried against a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from integration.bus_labs import collecting
from integration.bus_users import ALL, UserServer, server_with_users
from integration.servers import eventually
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.bus import Listing
from penstock.common.permissions import ARCHIVE, AUDITOR, GRANTS, JOIN, REGISTER
from penstock.common.routing_events import (
    ADMITTED,
    COMPARISON,
    CONFIG_CHANGE,
    DEGRADED,
    GAP,
    INSTANCE,
    MIRRORED,
    OUTCOME,
    PLACEMENT,
    REJECTION,
    WRITER_CHANGE,
)
from penstock.common.settings import BusSettings
from penstock.common.subjects import (
    CONFIG,
    COPIES,
    DISCOVER,
    EVENTS,
    HEARTBEAT,
    INSTANCES,
    LIMITS,
    LOAD,
    MIRROR,
    MIRROR_PRIMARY,
    PLACED,
    REGISTRATIONS,
    SCHEDULE,
    SCHEDULE_BY,
    SNAPSHOT,
    STATUS,
    event_filter,
    event_subject,
)
from penstock.common.telemetry import Metrics

pytestmark = pytest.mark.integration

SERVICES = frozenset({"ingress", "scheduler", "discovery", "mirror"})
TRUSTED = SERVICES | {JOIN}
REGISTERED = REGISTRATIONS.stream
CONFIGURED = CONFIG.stream
NOBODY: frozenset[str] = frozenset()
LOG, REGISTRY = EVENTS.name, INSTANCES.stream
READ_LOG = f"$JS.API.DIRECT.GET.{LOG}"
Attempt = Callable[[Client], Coroutine[Any, Any, Any]]


def who(*services: str) -> frozenset[str]:
    """These, and whoever joins as any of them."""
    return frozenset(services) | {JOIN}


PUBLISHING: dict[str, frozenset[str]] = {
    SCHEDULE.request.name("0"): who("ingress"),
    SCHEDULE_BY.request.name("0", "replica"): who("ingress"),
    LOAD.name("i"): who("ingress"),
    DISCOVER.request.name(): who("ingress"),
    PLACED.name("0"): who("scheduler"),
    SNAPSHOT.request.name("0", "replica"): who("scheduler"),
    STATUS.name("i"): who("discovery"),
    MIRROR.name("m"): who("ingress"),
    MIRROR_PRIMARY.name("i"): who("ingress"),
    **{
        f"$JS.API.{call}": who("mirror")
        for call in (
            f"CONSUMER.MSG.NEXT.{COPIES.name}.mirror",
            f"CONSUMER.CREATE.{COPIES.name}.mirror",
            f"STREAM.INFO.{COPIES.name}",
            f"STREAM.CREATE.{COPIES.name}",
            f"STREAM.UPDATE.{COPIES.name}",
        )
    },
    LIMITS.subject("key.60.1"): who("ingress"),
    **{f"$JS.API.STREAM.{call}.{LIMITS.name}": who("ingress") for call in ("INFO", "CREATE", "UPDATE")},
    f"$JS.API.STREAM.MSG.GET.{LIMITS.name}": NOBODY,
    f"$JS.API.DIRECT.GET.{LIMITS.name}": NOBODY,
    f"$JS.API.CONSUMER.MSG.NEXT.{COPIES.name}.another": NOBODY,
    f"$JS.API.CONSUMER.CREATE.{COPIES.name}": NOBODY,
    f"$JS.API.DIRECT.GET.{COPIES.name}": NOBODY,
    f"$JS.API.STREAM.MSG.GET.{COPIES.name}": NOBODY,
    **{HEARTBEAT.name(service): who(service) for service in sorted(SERVICES)},
    HEARTBEAT.name("impostor"): NOBODY,
    event_subject(PLACEMENT, "m"): who("ingress", "scheduler"),
    event_subject(REJECTION, "m"): who("ingress", "scheduler"),
    event_subject(OUTCOME, "m"): who("ingress", "scheduler"),
    event_subject(ADMITTED, ""): who("ingress"),
    event_subject(GAP, ""): TRUSTED,
    event_subject(WRITER_CHANGE, ""): TRUSTED,
    event_subject(INSTANCE, "m"): who("discovery"),
    event_subject(DEGRADED, ""): TRUSTED,
    event_subject(CONFIG_CHANGE, ""): who("ingress", "scheduler", "discovery", "mirror"),
    event_subject(MIRRORED, "m"): who("ingress", "mirror"),
    event_subject(COMPARISON, "m"): who("mirror"),
    event_subject("forged", "m"): NOBODY,
    INSTANCES.subject("instance.i"): who("discovery"),
    REGISTRATIONS.subject("pod"): who("discovery", REGISTER),
    CONFIG.subject("user.alice"): who("ingress", "discovery", "mirror"),
    "_INBOX.ingress.id.run.answers.1": who("scheduler", "discovery"),
    "_INBOX.ingress.id.run.consumer.1": NOBODY,
    "_INBOX.scheduler.id.run.answers.1": who("scheduler"),
    "_INBOX.scheduler.id.run.consumer.1": NOBODY,
    "_INBOX.discovery.id.run.answers.1": NOBODY,
    "_INBOX.tool.1": TRUSTED,
    "$SRV.PING": who(),
    READ_LOG: frozenset({JOIN, AUDITOR, ARCHIVE}),
    f"$JS.API.DIRECT.GET.{REGISTRY}": NOBODY,
    f"$JS.API.STREAM.INFO.{LOG}": TRUSTED | {ARCHIVE},
    f"$JS.API.STREAM.CREATE.{LOG}": TRUSTED,
    f"$JS.API.STREAM.UPDATE.{LOG}": TRUSTED,
    f"$JS.API.STREAM.INFO.{REGISTRY}": who("ingress", "scheduler", "discovery"),
    f"$JS.API.CONSUMER.CREATE.{REGISTRY}": who("ingress", "scheduler", "discovery"),
    f"$JS.API.STREAM.CREATE.{REGISTRY}": who("discovery"),
    f"$JS.API.STREAM.UPDATE.{REGISTRY}": who("discovery"),
    f"$JS.API.STREAM.MSG.GET.{REGISTRY}": who("discovery"),
    **{
        f"$JS.API.{call}.{REGISTERED}": who("discovery")
        for call in ("STREAM.INFO", "STREAM.CREATE", "STREAM.UPDATE", "STREAM.MSG.GET", "CONSUMER.CREATE")
    },
    **{f"$JS.API.{call}.{CONFIGURED}": TRUSTED for call in ("STREAM.INFO", "CONSUMER.CREATE")},
    **{
        f"$JS.API.STREAM.{call}.{CONFIGURED}": who("ingress", "discovery", "mirror")
        for call in ("CREATE", "UPDATE", "MSG.GET")
    },
    f"$JS.API.CONSUMER.CREATE.{LOG}": frozenset({ARCHIVE}),
    f"$JS.API.CONSUMER.CREATE.{LOG}.warehouse": frozenset({ARCHIVE}),
    f"$JS.API.CONSUMER.MSG.NEXT.{LOG}.warehouse": frozenset({ARCHIVE}),
    f"$JS.ACK.{LOG}.warehouse.1.1.1.1.1": frozenset({ARCHIVE}),
    **{
        f"$JS.API.STREAM.{call}.{stream}": NOBODY
        for stream in (LOG, REGISTRY, REGISTERED, CONFIGURED, COPIES.name, LIMITS.name)
        for call in ("DELETE", "PURGE", "MSG.DELETE", "SNAPSHOT", "RESTORE")
    },
    "$JS.API.STREAM.CREATE.ANOTHER": NOBODY,
    "$JS.API.STREAM.LIST": NOBODY,
    # What the account has: the nats command asks before it makes a consumer.
    "$JS.API.INFO": frozenset({ARCHIVE}),
    "$SYS.REQ.SERVER.PING": NOBODY,
    "anything.else": NOBODY,
}  # fmt: skip

SUBSCRIBING: dict[str, frozenset[str]] = {
    SCHEDULE.request.name("0"): NOBODY,
    f"{SCHEDULE.request.name('0')} {SCHEDULE.request.queue_group}": who("scheduler"),
    f"{SCHEDULE.request.name('0')} others": NOBODY,
    SCHEDULE_BY.request.name("0", "replica"): who("scheduler"),
    DISCOVER.request.name(): who("discovery"),
    PLACED.pattern: who("scheduler"),
    SNAPSHOT.request.name("0", "replica"): who("scheduler"),
    LOAD.pattern: who("scheduler"),
    STATUS.pattern: who("scheduler") | {AUDITOR},
    MIRROR.pattern: NOBODY,
    f"{MIRROR.pattern} {MIRROR.queue_group}": NOBODY,
    MIRROR_PRIMARY.pattern: who("mirror"),
    LIMITS.subject(">"): NOBODY,
    HEARTBEAT.pattern: who("scheduler") | {AUDITOR},
    HEARTBEAT.name("scheduler"): who("scheduler", "ingress") | {AUDITOR},
    EVENTS.subjects[0]: frozenset({JOIN, AUDITOR, ARCHIVE}),
    event_filter(OUTCOME, "m"): frozenset({JOIN, AUDITOR, ARCHIVE}),
    INSTANCES.subject(">"): NOBODY,
    REGISTRATIONS.subject(">"): NOBODY,
    CONFIG.subject(">"): NOBODY,
    **{f"_INBOX.{service}.>": who(service) | {AUDITOR} for service in (*sorted(SERVICES), REGISTER)},
    "_INBOX.>": frozenset({JOIN, AUDITOR}),
    "$SRV.PING": TRUSTED,
    "$JS.API.>": NOBODY,
    "$JS.EVENT.>": NOBODY,
    "$SYS.>": NOBODY,
    ">": NOBODY,
    "*.>": NOBODY,
}  # fmt: skip


@pytest.fixture(scope="module")
def users() -> Iterator[UserServer]:
    with server_with_users() as users:
        yield users


@pytest.mark.parametrize("subject", PUBLISHING)
async def test_who_may_publish(users: UserServer, subject: str) -> None:
    # A reply address, so that a call that is permitted is also answered; the body is none that does anything.
    allowed = await permitted(users, lambda c: c.publish(subject, b"?", reply="_INBOX.nobody"))
    assert allowed == PUBLISHING[subject]


@pytest.mark.parametrize("interest", SUBSCRIBING)
async def test_who_may_subscribe(users: UserServer, interest: str) -> None:
    subject, _, queue = interest.partition(" ")
    assert await permitted(users, lambda c: c.subscribe(subject, queue=queue)) == SUBSCRIBING[interest]


async def permitted(users: UserServer, attempt: Attempt) -> set[str]:
    """The users whose attempt the server does not refuse."""
    allowed = set()
    for user in GRANTS:
        async with users.client(user) as guest:
            if not await guest.refused(attempt):
                allowed.add(user)
    return allowed


async def test_nobody_gets_in_without_a_password(users: UserServer) -> None:
    for address in ("", "ingress@", "ingress:wrong@", "join:@", f"auditor:{users.passwords['join']}@"):
        bus = NatsBus(
            BusSettings(nats_url=f"nats://{address}127.0.0.1:{users.server.port}"), "x/y", Metrics()
        )
        users.server.process.lines.clear()
        await bus.start()
        await eventually(lambda: users.server.process.find("authentication error"))
        assert not bus.connected, address
        await bus.close()


@pytest.fixture
async def log(users: UserServer) -> list[bytes]:
    """Three events that are in the log."""
    async with users.client(ALL) as guest:
        streams = guest.client.jetstream()
        if LOG not in {info.config.name for info in await streams.streams_info()}:
            await make_streams(users)
        await streams.purge_stream(LOG)
        payloads = [b"1", b"2", b"3"]
        for payload in payloads:
            await streams.publish(event_subject(OUTCOME, "m"), payload)
        return payloads


async def make_streams(users: UserServer) -> None:
    bus = await connected(users, "discovery")
    await bus.ensure_stream(EVENTS)
    await bus.ensure_bucket(INSTANCES)
    await bus.put(INSTANCES, "instance.i", b"{}")
    await bus.close()


async def connected(users: UserServer, user: str) -> NatsBus:
    bus = NatsBus(BusSettings(nats_url=users.url(user)), f"{user}/test", Metrics())
    await bus.start()
    await eventually(lambda: bus.connected)
    return bus


@pytest.mark.parametrize("user", [AUDITOR, JOIN])
async def test_the_log_can_be_followed_from_the_past_into_the_present(
    users: UserServer, log: list[bytes], user: str
) -> None:
    bus = await connected(users, user)
    async with (
        collecting(bus.follow(EVENTS, event_filter(), 3600)) as stored,
        users.client("ingress") as writer,
    ):
        await eventually(lambda: [message.payload for message in stored] == log)
        await writer.client.publish(event_subject(OUTCOME, "m"), b"4")
        await eventually(lambda: [message.payload for message in stored] == [*log, b"4"])
    await bus.close()


async def test_an_auditor_hears_events_live_with_any_client(users: UserServer, log: list[bytes]) -> None:
    heard: list[bytes] = []

    async def note(message: Msg) -> None:
        heard.append(message.data)

    async with users.client(AUDITOR) as auditor, users.client("ingress") as writer:
        await auditor.client.subscribe(EVENTS.subjects[0], cb=note)
        await auditor.client.flush()

        async def live() -> bool:
            # That somebody in another account listens reaches the writer's side after the flush.
            await writer.client.publish(event_subject(OUTCOME, "m"), b"live")
            await writer.client.flush()
            return b"live" in heard

        await eventually(live)


# What NATS sends to a reply address: a message, a page and its end, nothing (which is what deletes a stream).
READS = {
    "a message": {"seq": 1},
    "a page": {"seq": 1, "batch": 10},
    "not found": {"seq": 10**9},
    "not understood": "x",
}
DETOURS = (
    f"$JS.API.STREAM.DELETE.{LOG}",
    f"$JS.API.STREAM.PURGE.{LOG}",
    f"$JS.API.STREAM.DELETE.{REGISTRY}",
    f"$JS.API.STREAM.PURGE.{REGISTRY}",
    INSTANCES.subject("instance.i"),
    INSTANCES.subject("instance.forged"),
    event_subject(OUTCOME, "m"),
    SCHEDULE.request.name("0"),
    LOAD.name("i"),
    "$SRV.PING",
)


@pytest.mark.parametrize("read", READS)
async def test_answers_to_an_auditor_cannot_be_sent_where_an_auditor_may_not_write(
    users: UserServer, log: list[bytes], read: str
) -> None:
    async with users.client(ALL) as everything, users.client(AUDITOR) as auditor:
        before = await held(everything.client)
        heard: list[str] = []

        async def note(message: Msg) -> None:
            heard.append(message.subject)

        await everything.client.subscribe(">", cb=note)
        await everything.client.flush()
        for detour in DETOURS:
            await auditor.client.publish(READ_LOG, json.dumps(READS[read]).encode(), reply=detour)
        answer = await auditor.client.request(READ_LOG, b'{"seq": 1}')
        assert answer.headers is not None
        assert await held(everything.client) == before
        assert not set(heard) & set(DETOURS)


async def held(client: Client) -> dict[str, tuple[int, int]]:
    """Messages and last sequence of every stream."""
    infos = await client.jetstream().streams_info()
    return {str(info.config.name): (info.state.messages, info.state.last_seq) for info in infos}


async def test_every_inbox_of_a_process_lies_below_the_name_of_its_service(users: UserServer) -> None:
    await make_streams(users)
    inboxes: list[str] = []

    async def note(message: Msg) -> None:
        body = json.loads(message.data) if message.data else {}
        inboxes.extend((message.reply, body.get("config", {}).get("deliver_subject", message.reply)))

    async with users.client(ALL) as everything:
        await everything.client.subscribe("$JS.API.*.*.*", cb=note)
        await everything.client.flush()
        bus = await connected(users, "ingress")
        async with collecting(bus.watch(INSTANCES)) as events:
            await eventually(lambda: events and len(inboxes) >= 6)
        await bus.close()
    assert [inbox for inbox in inboxes if not inbox.startswith("_INBOX.ingress.test.")] == []
    assert users.server.process.find("Violation.*user:ingress.*_INBOX") is None


@pytest.mark.parametrize("user", ["ingress", "scheduler", "discovery"])
async def test_a_registry_too_large_to_be_sent_at_once_is_listed_all_the_same(
    users: UserServer, user: str
) -> None:
    """Past a few megabytes the server waits to be told that they were taken."""
    await make_streams(users)
    writer = await connected(users, "discovery")
    keys = [f"large.{number}" for number in range(200)]
    await asyncio.gather(*(writer.put(INSTANCES, key, bytes(60_000)) for key in keys))
    reader = await connected(users, user)
    async with users.client(ALL) as everything, collecting(reader.watch(INSTANCES)) as events:
        told = await everything.client.subscribe("$JS.FC.>")
        await eventually(lambda: events)
        assert isinstance(events[0], Listing)
        assert set(keys) <= events[0].entries.keys()
        await eventually(lambda: told.pending_msgs)
    await asyncio.gather(*(writer.delete(INSTANCES, key) for key in keys))
    for bus in (writer, reader):
        await bus.close()
    assert users.server.process.find(f'Violation.*user:{user}".*FC') is None
