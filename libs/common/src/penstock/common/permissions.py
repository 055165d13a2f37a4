"""Who may do what on the bus (DESIGN D13), worked out from the table of the wire.

The services share one NATS account, in which each has a user that may do its own work. Auditors have an
account apart, into which nothing crosses but the routing events and the one call that reads them (whoever
copies the log elsewhere and needs a consumer that lasts is trusted as a service is, and is of theirs): NATS
answers a call to whatever reply address it names and asks for no permission on that, so within the
services' account anybody who may ask JetStream for a message may have its "not found", which is empty,
sent to the address that deletes a stream (seen with NATS 2.15; nats-io/nats-server#8274 is of the kind).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from penstock.common.routing_events import (
    ADMITTED,
    BREAKER,
    COMPARISON,
    CONFIG_CHANGE,
    DEGRADED,
    FALLBACK,
    GAP,
    INSTANCE,
    MIRRORED,
    OUTCOME,
    PLACEMENT,
    QUEUED,
    REJECTION,
    RETRY,
    ROUTED,
    WRITER_CHANGE,
)
from penstock.common.subjects import (
    CONFIG,
    COPIES,
    DISCOVER,
    EVENTS,
    EXPLAIN,
    EXPLAIN_NOW,
    HEARTBEAT,
    INSTANCES,
    KV,
    LIMITS,
    LOAD,
    MIRROR,
    MIRROR_PRIMARY,
    PLACED,
    PLACEMENTS,
    REGISTRATIONS,
    SCHEDULE,
    SCHEDULE_BY,
    SNAPSHOT,
    STATUS,
    Bucket,
    Counters,
    Stream,
    event_filter,
)

SERVICES_ACCOUNT, AUDITORS_ACCOUNT = "PENSTOCK", "PENSTOCK_AUDITORS"
REGISTER, JOIN, AUDITOR, ARCHIVE = "register", "join", "auditor", "archive"

# Reads messages of the log by sequence, time and subject, and can do nothing else.
_READ_LOG = f"$JS.API.DIRECT.GET.{EVENTS.name}"
# Tools ask from `_INBOX.<random>` or `_INBOX.<random>.<random>`, services from deeper down: who may answer
# tools can therefore not answer in the place of another service.
_INBOX = "_INBOX"
_TOOLS = f"{_INBOX}.*", f"{_INBOX}.*.*"
# The tool that asks schedulers why; its inboxes are as deep as those of services.
EXPLAINS = "explain"
_ANSWERS = "*.*.answers.*"
_DIRECTORY = "$SRV.>"


@dataclass(frozen=True)
class Grant:
    """Subjects that a user may publish to and subscribe to; `a b` is subject a within queue group b only."""

    publish: tuple[str, ...] = ()
    subscribe: tuple[str, ...] = ()

    def __add__(self, other: Grant) -> Grant:
        """Both, each subject once."""
        publish, subscribe = (*self.publish, *other.publish), (*self.subscribe, *other.subscribe)
        return Grant(tuple(dict.fromkeys(publish)), tuple(dict.fromkeys(subscribe)))


def _process(service: str, *events: str) -> Grant:
    """What every process does: hear its answers, be listed, send heartbeats, write events of these types."""
    log = (f"$JS.API.STREAM.{call}.{EVENTS.name}" for call in ("INFO", "CREATE", "UPDATE"))
    types = (event_filter(event) for event in (*events, DEGRADED, GAP, WRITER_CHANGE))
    return Grant(
        (HEARTBEAT.name(service), *types, *log, *_TOOLS),
        (f"{_INBOX}.{service}.>", _DIRECTORY),
    )


def _watching(bucket: Bucket) -> Grant:
    """Listing and following; the last is how a consumer is told that its messages are taken."""
    stream = bucket.stream
    return Grant((f"$JS.API.STREAM.INFO.{stream}", f"$JS.API.CONSUMER.CREATE.{stream}", f"$JS.FC.{stream}.>"))


def _keeping(bucket: Bucket) -> Grant:
    """Making the bucket and writing its records."""
    calls = ("STREAM.CREATE", "STREAM.UPDATE", "STREAM.MSG.GET")
    return Grant((bucket.subject(">"), *(f"$JS.API.{call}.{bucket.stream}" for call in calls)))


def _sharing(stream: Stream, group: str) -> Grant:
    """Making the stream, and taking from it as one of a queue group."""
    calls = (f"STREAM.{call}.{stream.name}" for call in ("INFO", "CREATE", "UPDATE"))
    takes = (f"CONSUMER.{call}.{stream.name}.{group}" for call in ("CREATE", "MSG.NEXT"))
    return Grant(tuple(f"$JS.API.{call}" for call in (*calls, *takes)))


def _replaying(stream: Stream) -> Grant:
    """Making the stream, whose messages are published as if there were none, and reading it."""
    calls = (f"STREAM.{call}.{stream.name}" for call in ("INFO", "CREATE", "UPDATE"))
    return Grant(tuple(f"$JS.API.{call}" for call in (*calls, f"DIRECT.GET.{stream.name}")))


def _adding(counters: Counters) -> Grant:
    """Making the counters and adding to them; reading none but in the answer to that."""
    calls = (f"$JS.API.STREAM.{call}.{counters.name}" for call in ("INFO", "CREATE", "UPDATE"))
    return Grant((counters.subject(">"), *calls))


# Besides the log, which processes live and how loaded engines are: `penstock top` needs no more. Neither says
# anything of a request.
_WATCHED = STATUS.pattern, HEARTBEAT.pattern
_READING = Grant((_READ_LOG,), (*EVENTS.subjects, *_WATCHED))


def _consuming(stream: Stream) -> Grant:
    """Making pull consumers on a stream, durable ones too, and taking from them."""
    calls = "CREATE", "DURABLE.CREATE", "INFO", "MSG.NEXT", "DELETE"
    consumers = (f"$JS.API.CONSUMER.{call}.{stream.name}.>" for call in calls)
    lists = (f"$JS.API.CONSUMER.{call}.{stream.name}" for call in ("CREATE", "NAMES", "LIST"))
    # The nats command asks what the account has before it makes a consumer.
    asked = "$JS.API.INFO", f"$JS.API.STREAM.INFO.{stream.name}"
    return Grant(
        (*asked, *consumers, *lists, f"$JS.ACK.{stream.name}.>"),
        (f"{_INBOX}.{ARCHIVE}.>",),
    )


SERVICES: Mapping[str, Grant] = {
    "ingress": _process(
        "ingress",
        *(ADMITTED, PLACEMENT, REJECTION, OUTCOME, CONFIG_CHANGE, MIRRORED),
        *(ROUTED, RETRY, FALLBACK, QUEUED, BREAKER),
    )
    + _watching(INSTANCES)
    + _watching(CONFIG)
    + _keeping(CONFIG)
    + Grant(
        (SCHEDULE.request.pattern, SCHEDULE_BY.request.pattern, LOAD.pattern, DISCOVER.request.pattern),
        (HEARTBEAT.name("scheduler"),),
    )
    + _adding(LIMITS)
    + Grant((MIRROR.pattern, MIRROR_PRIMARY.pattern, EXPLAIN.request.pattern, EXPLAIN_NOW.request.pattern)),
    "scheduler": _process("scheduler", PLACEMENT, REJECTION, OUTCOME, CONFIG_CHANGE)
    + _watching(INSTANCES)
    + _watching(CONFIG)
    + _replaying(PLACEMENTS)
    + Grant(
        (
            PLACED.pattern,
            SNAPSHOT.request.pattern,
            *(f"{_INBOX}.{service}.{_ANSWERS}" for service in ("ingress", "scheduler", EXPLAINS)),
        ),
        (
            *(f"{one.request.pattern} {one.request.queue_group}" for one in (SCHEDULE, EXPLAIN_NOW)),
            *(
                subject.pattern
                for subject in (
                    SCHEDULE_BY.request,
                    SNAPSHOT.request,
                    EXPLAIN.request,
                    PLACED,
                    LOAD,
                    STATUS,
                    KV,
                    HEARTBEAT,
                )
            ),
        ),
    ),
    "discovery": _process("discovery", INSTANCE, CONFIG_CHANGE)
    + _watching(INSTANCES)
    + _keeping(INSTANCES)
    + _watching(REGISTRATIONS)
    + _keeping(REGISTRATIONS)
    + _watching(CONFIG)
    + _keeping(CONFIG)
    + Grant((STATUS.pattern, KV.pattern, f"{_INBOX}.ingress.{_ANSWERS}"), (DISCOVER.request.pattern,)),
    "mirror": _process("mirror", CONFIG_CHANGE, MIRRORED, COMPARISON)
    + _watching(CONFIG)
    + _keeping(CONFIG)
    + _sharing(COPIES, MIRROR.queue_group)
    + Grant((), (MIRROR_PRIMARY.pattern,)),
}

# The sidecar beside an engine writes registrations, hears that they are written, and nothing else.
_SIDECAR = Grant((REGISTRATIONS.subject(">"),), (f"{_INBOX}.{REGISTER}.>",))

# A process that joins may be any of them, or a tool; its inboxes are anywhere.
GRANTS: Mapping[str, Grant] = {
    **SERVICES,
    REGISTER: _SIDECAR,
    JOIN: sum(SERVICES.values(), _SIDECAR) + _READING + Grant((_DIRECTORY,), (f"{_INBOX}.>",)),
    AUDITOR: _READING + Grant((), (f"{_INBOX}.>",)),
    ARCHIVE: Grant((_READ_LOG,), EVENTS.subjects) + _consuming(EVENTS),
}


def accounts(passwords: Mapping[str, str]) -> dict[str, Any]:
    """The `accounts` of a NATS server's configuration in plain JSON types; `passwords` by names of GRANTS."""
    crossing = [{"stream": subject} for subject in (EVENTS.subjects[0], *_WATCHED)]
    return {
        SERVICES_ACCOUNT: {
            "jetstream": True,
            "users": [_user(name, passwords[name]) for name in (*SERVICES, REGISTER, JOIN, ARCHIVE)],
            "exports": [
                *({**one, "accounts": [AUDITORS_ACCOUNT]} for one in crossing),
                {"service": _READ_LOG, "accounts": [AUDITORS_ACCOUNT], "response_type": "stream"},
            ],
        },
        AUDITORS_ACCOUNT: {
            "users": [_user(AUDITOR, passwords[AUDITOR])],
            "imports": [
                {kind: {"account": SERVICES_ACCOUNT, "subject": subject}}
                for one in (*crossing, {"service": _READ_LOG})
                for kind, subject in one.items()
            ],
        },
    }


def _user(name: str, password: str) -> dict[str, Any]:
    grant = GRANTS[name]
    permissions = {"publish": {"allow": grant.publish}, "subscribe": {"allow": grant.subscribe}}
    return {"user": name, "password": password, "permissions": permissions}
