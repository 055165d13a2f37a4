"""The whole wire on one screen: every subject, bucket and stream with its message and bounds."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Literal, TypeVar

import msgspec

from penstock.common import messages

M = TypeVar("M", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)

KIB, MIB = 1024, 1024 * 1024
_ROOT = "penstock.v1"
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,128}")
_SPECIAL = re.compile(r"[^A-Za-z0-9_-]")


@lru_cache(4096)
def token(text: str) -> str:
    """`text` as one subject token and KV key part: `=XX` for every other byte, long ones cut and hashed."""
    if _PLAIN.fullmatch(text):
        return text
    escaped = _SPECIAL.sub(lambda m: "".join(f"={byte:02X}" for byte in _bytes(m[0])), text)
    if len(escaped) > 128:
        digest = hashlib.sha256(_bytes(text)).hexdigest()[:16]
        escaped = f"{escaped[:100]}=={digest}"
    return escaped or "="


def _bytes(text: str) -> bytes:
    """UTF-8, with lone surrogates kept apart."""
    return text.encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Subject(Generic[M]):
    """One kind of message: `pattern` ends in one `*` per token that `name` takes.

    Over `max_bytes` a message is not sent, and while more than `unsent_bytes` of any kind wait to be sent
    it is dropped and counted; a subscriber holds at most `pending_messages` undecoded ones and drops and
    counts what comes on top.
    """

    pattern: str
    message: type[M]
    queue_group: str = ""
    max_bytes: int = 256 * KIB
    pending_messages: int = 8192
    unsent_bytes: int = 8 * MIB

    def name(self, *tokens: str) -> str:
        """The concrete subject; tokens are escaped."""
        head, stars = self.pattern.split(".*", 1)[0], self.pattern.count("*")
        if len(tokens) != stars:
            raise ValueError(f"{self.pattern} takes {stars} tokens, got {len(tokens)}")
        return ".".join((head, *map(token, tokens)))


@dataclass(frozen=True)
class Service(Generic[M, R]):
    """A subject that is answered."""

    request: Subject[M]
    reply: type[R]


@dataclass(frozen=True)
class Bucket:
    """A KV bucket: file storage, history 1. Keys, and marks of deleted ones, that were not written for
    `max_age_s` leave it without a word to its watches; 0 keeps them. Marks of deleted keys leave it after
    `marks_max_age_s` (a second at least); 0: as any key. Watches that are not there then list anew anyway."""

    name: str
    max_value_bytes: int
    max_bytes: int = 256 * MIB
    max_age_s: float = 0.0
    marks_max_age_s: int = 0

    @property
    def stream(self) -> str:
        """The stream that holds it."""
        return f"KV_{self.name}"

    def subject(self, key: str) -> str:
        """The subject of one key."""
        return f"$KV.{self.name}.{key}"


@dataclass(frozen=True)
class Stream:
    """A stream; at either bound the oldest messages go. One in `memory` ends with its server."""

    name: str
    subjects: tuple[str, ...]
    max_bytes: int
    max_age_s: float
    max_message_bytes: int
    storage: Literal["file", "memory"] = "file"


@dataclass(frozen=True)
class Counters:
    """Numbers that are added to, one per key: a stream of message counters (NATS's ADR-49), the last value of
    each kept in memory for `max_age_s` after it was last added to; at `max_bytes` the oldest go."""

    name: str
    prefix: str
    max_bytes: int
    max_age_s: float

    def subject(self, key: str) -> str:
        """The subject of one number; `key` is one token or several."""
        return f"{self.prefix}.{key}"


SCHEDULE = Service(
    Subject(f"{_ROOT}.schedule.*", messages.ScheduleBatch, queue_group="scheduler", pending_messages=1024),
    messages.ScheduleReply,
)
# The same, asked of one replica by its id (shard, id).
SCHEDULE_BY = Service(
    Subject(f"{_ROOT}.schedule.*.*", messages.ScheduleBatch, pending_messages=1024),
    messages.ScheduleReply,
)
# What a scheduler knows, piece by piece, asked of one replica by its id (shard, id).
SNAPSHOT = Service(
    Subject(f"{_ROOT}.snapshot.*.*", messages.SnapshotRequest, max_bytes=4 * KIB, pending_messages=16),
    messages.SnapshotPiece,
)
# Every replica of discovery lists again and answers; who asks takes the first answer.
DISCOVER = Service(
    Subject(f"{_ROOT}.discover", messages.DiscoverRequest, max_bytes=4 * KIB, pending_messages=64),
    messages.DiscoverReply,
)
# Asked of every replica: the one that decided it answers.
EXPLAIN = Service(
    Subject(f"{_ROOT}.explain.*", messages.ExplainRequest, max_bytes=4 * KIB, pending_messages=64),
    messages.ExplainReply,
)
# Where a request would go now; nothing is placed.
EXPLAIN_NOW = Service(
    Subject(f"{_ROOT}.explain-now.*", messages.ScheduleRequest, queue_group="scheduler", pending_messages=64),
    messages.ExplainReply,
)
PLACED = Subject(f"{_ROOT}.placed.*", messages.PlacedFeed)
LOAD = Subject(f"{_ROOT}.load.*", messages.LoadReport, max_bytes=512 * KIB)
STATUS = Subject(f"{_ROOT}.status.*", messages.EngineStatus, max_bytes=4 * KIB)
# Hashes of 8 changes take 128 KiB.
KV = Subject(f"{_ROOT}.kv.*", messages.KvEvents)
HEARTBEAT = Subject(f"{_ROOT}.heartbeat.*", messages.Heartbeat, max_bytes=4 * KIB)
# Copies of requests, the one place where prompts are on the bus; and how the requests themselves ended. What
# schedules must not wait behind them: they are dropped while a sixteenth of other messages' bound is unsent.
MIRROR = Subject(
    f"{_ROOT}.mirror.*",
    messages.MirrorCopy,
    queue_group="mirror",
    max_bytes=512 * KIB,
    unsent_bytes=512 * KIB,
)
MIRROR_PRIMARY = Subject(
    f"{_ROOT}.mirror-primary.*", messages.MirrorPrimary, max_bytes=4 * KIB, unsent_bytes=512 * KIB
)

# Instances come and go under ever other names; their marks would stay for ever.
INSTANCES = Bucket("penstock-v1-instances", max_value_bytes=64 * KIB, marks_max_age_s=600)
# What `penstock register` says of its engines, again and again: a source of discovery like any other store.
REGISTRATIONS = Bucket(
    "penstock-v1-registrations", max_value_bytes=64 * KIB, max_bytes=128 * MIB, max_age_s=86_400
)
# What people change while everything runs (penstock.common.live_config).
CONFIG = Bucket("penstock-v1-config", max_value_bytes=256 * KIB, max_bytes=64 * MIB)

EVENTS = Stream(
    "PENSTOCK_ROUTING",
    (f"{_ROOT}.events.>",),
    max_bytes=1024 * MIB,
    max_age_s=7 * 86400,
    max_message_bytes=512 * KIB,
)
# In memory: prompts are never on the server's disk.
COPIES = Stream(
    "PENSTOCK_MIRROR",
    (MIRROR.pattern,),
    max_bytes=64 * MIB,
    max_age_s=60,
    max_message_bytes=512 * KIB,
    storage="memory",
)
# What was placed lately, for a scheduler that starts without a sibling: some 50,000 placements.
PLACEMENTS = Stream(
    "PENSTOCK_PLACED",
    (PLACED.pattern,),
    max_bytes=32 * MIB,
    max_age_s=3600,
    max_message_bytes=256 * KIB,
    storage="memory",
)
# What users asked for in a window of time (penstock.ingress.bus_limit_store). Keys are hashes.
LIMITS = Counters("PENSTOCK_LIMITS", f"{_ROOT}.limits", max_bytes=128 * MIB, max_age_s=150)

_EXPLAINED = EXPLAIN.request, EXPLAIN_NOW.request
_ANSWERED = SCHEDULE.request, SCHEDULE_BY.request, SNAPSHOT.request, DISCOVER.request, *_EXPLAINED
_MESSAGES = *_ANSWERED, PLACED, LOAD, STATUS, KV, HEARTBEAT, MIRROR, MIRROR_PRIMARY
SUBJECTS: tuple[Subject[msgspec.Struct], ...] = _MESSAGES  # type: ignore[assignment]  # Subject is invariant; the table only lists
BUCKETS = (INSTANCES, REGISTRATIONS, CONFIG)
STREAMS = (EVENTS, COPIES, PLACEMENTS)
COUNTERS = (LIMITS,)

# The one shard there is by default; models travel inside the message (DESIGN D3).
DEFAULT_SHARD = "0"


def event_subject(event_type: str, model: str) -> str:
    """Where events of one type and model go; `-` stands for no model."""
    return f"{_ROOT}.events.{token(event_type)}.{token(model or '-')}"


def event_filter(event_type: str = "", model: str = "") -> str:
    """A filter over the event subjects; empty means any."""
    return f"{_ROOT}.events.{token(event_type) if event_type else '*'}.{token(model) if model else '*'}"
