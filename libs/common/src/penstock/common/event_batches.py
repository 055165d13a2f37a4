"""What the routing log consists of: events as CloudEvents, in messages that are numbered and chained."""

from __future__ import annotations

import hashlib

import msgspec

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

# Subject, Unix seconds, data in JSON; and the data itself where something of it is still asked for.
Emitted = tuple[str, float, bytes, msgspec.Struct | None]


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


def chain(previous: str, payload: bytes) -> str:
    """The hash that a writer's next message carries: SHA-256 of this one's own and its payload, in hex."""
    return hashlib.sha256(previous.encode() + payload).hexdigest()
