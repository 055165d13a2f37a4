"""Events become messages of the routing log: numbered, encoded as CloudEvents, chained."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from functools import lru_cache

import msgspec

from penstock.common.routing_events import type_of
from penstock.common.subjects import event_subject

BATCH_TYPE = "application/cloudevents-batch+json"
MAX_BATCH_EVENTS = 64
MAX_BATCH_BYTES = 256 * 1024
# What a kept message takes beside its payload: headers, subject, its place in the table.
MESSAGE_BYTES = 1024

WRITER, INCARNATION, SEQUENCE, PREVIOUS = (
    "Penstock-Writer",
    "Penstock-Incarnation",
    "Penstock-Sequence",
    "Penstock-Previous",
)
MESSAGE_ID = "Nats-Msg-Id"

# Subject, Unix seconds, data.
Emitted = tuple[str, float, msgspec.Struct]


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """CloudEvents 1.0 attributes in JSON; `id` is writer, incarnation and sequence, unique for good."""

    specversion: str
    id: str
    source: str
    type: str
    subject: str
    time: str
    data: msgspec.Struct
    datacontenttype: str = "application/json"


class Witnessed(msgspec.Struct, frozen=True):
    """What was to be said by somebody who no longer can: whoever says it says it under the same id."""

    id: str
    source: str
    data: msgspec.Struct


class Place(msgspec.Struct, frozen=True):
    """Where a message is on disk."""

    segment: int
    offset: int
    length: int


class SpooledMessage(msgspec.Struct, frozen=True, array_like=True, tag="message"):
    """One message as it is on disk, and as it is sent."""

    number: int
    subject: str
    headers: dict[str, str]
    payload: bytes
    first: int
    last: int


class Message(msgspec.Struct):
    """One message of the log; without `headers` it is on disk alone, at `place`."""

    number: int
    subject: str
    headers: dict[str, str]
    payload: bytes
    first: int
    last: int
    packed: bool = False
    # Bytes of it under way; 0 while it is not.
    sent: int = 0
    place: Place | None = None

    @property
    def events(self) -> int:
        """How many it holds."""
        return self.last - self.first + 1

    @property
    def held_bytes(self) -> int:
        """What it takes in memory, about."""
        return len(self.payload) + MESSAGE_BYTES if self.headers else 0


class Batches:
    """One writer's numbers and its chain."""

    def __init__(self, writer: str, incarnation: str) -> None:
        """`writer` is service and id, as in `scheduler/7f3a`."""
        self._writer, self._incarnation = writer, incarnation
        self.sequence = 0
        self._message_number = 0
        self._previous = ""
        self._encode = msgspec.json.Encoder().encode
        self._identity = self._encode(f"{writer}/{incarnation}/")[:-1]
        # Numbers of events that no stream would take, for whoever says so in the log.
        self.oversize: list[int] = []

    def close(self, kind: str, model: str, batch: list[Emitted]) -> Iterator[Message]:
        """The messages of a batch. Sequences are given here, so that those of a message are consecutive."""
        first, parts, size = self.sequence + 1, list[bytes](), 0
        for encoded in self._encoded(kind, batch):
            if parts and size + len(encoded) > MAX_BATCH_BYTES:
                yield self._enclose(kind, model, first, parts)
                first, parts, size = first + len(parts), [], 0
            if len(encoded) > MAX_BATCH_BYTES:
                # The stream would refuse it for ever; the gap in the sequences says that it is missing.
                self.oversize.append(first)
                first += 1
                continue
            parts.append(encoded)
            size += len(encoded)
        if parts:
            yield self._enclose(kind, model, first, parts)

    def _encoded(self, kind: str, batch: list[Emitted]) -> Iterator[bytes]:
        """`Event`s as JSON, the part that all of a batch share encoded once: 0.9 us an event, not 2.1."""
        encode, identity = self._encode, self._identity
        constants = b'","source":%b,"type":%b,"subject":' % (
            encode(f"/penstock/{self._writer}"),
            encode(type_of(kind)),
        )
        last_ms, stamp = 0, b""
        for subject, moment, data in batch:
            self.sequence += 1
            if (ms := int(moment * 1000)) != last_ms:
                last_ms, stamp = ms, rfc3339(ms)
            if type(data) is Witnessed:
                yield (
                    b'{"specversion":"1.0","id":%b,"source":%b,"type":%b,"subject":%b,"time":"%b","data":%b}'
                    % (
                        *map(encode, (data.id, data.source, type_of(kind), subject)),
                        stamp,
                        encode(data.data),
                    )
                )
                continue
            yield b'{"specversion":"1.0","id":%b%d%b%b,"time":"%b","data":%b}' % (
                identity,
                self.sequence,
                constants,
                encode(subject),
                stamp,
                encode(data),
            )

    def _enclose(self, kind: str, model: str, first: int, parts: list[bytes]) -> Message:
        payload = b"[" + b",".join(parts) + b"]"
        self._message_number += 1
        last = first + len(parts) - 1
        headers = {
            MESSAGE_ID: f"{self._writer}/{self._incarnation}/{self._message_number}",
            "content-type": BATCH_TYPE,
            WRITER: self._writer,
            INCARNATION: self._incarnation,
            SEQUENCE: f"{first}-{last}",
            PREVIOUS: self._previous,
        }
        self._previous = chain(self._previous, payload)
        return Message(self._message_number, event_subject(kind, model), headers, payload, first, last)


def chain(previous: str, payload: bytes) -> str:
    """The hash that a writer's next message carries: SHA-256 of this one's own and its payload, in hex."""
    return hashlib.sha256(previous.encode() + payload).hexdigest()


def rfc3339(unix_ms: int) -> bytes:
    """A moment as events have it, UTC."""
    seconds, ms = divmod(unix_ms, 1000)
    return b"%b.%03dZ" % (_second(seconds), ms)


@lru_cache(4)
def _second(seconds: int) -> bytes:
    # 2 us, which at a thousand events a second each of them would pay.
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode()
