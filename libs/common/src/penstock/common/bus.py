"""The bus port. Two adapters fulfil it, NATS and memory, and one behaviour suite holds both to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from penstock.common.errors import BusError
from penstock.common.subjects import Bucket, Counters, Service, Stream, Subject

M = TypeVar("M", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)


class Position(msgspec.Struct, frozen=True):
    """A place in a bucket's history: which incarnation of the bucket, and the sequence within it."""

    incarnation: str
    sequence: int


class Entry(msgspec.Struct, frozen=True):
    """One key of a bucket: its bytes and the revision they were written at."""

    value: bytes
    revision: int


class Listing(msgspec.Struct, frozen=True):
    """Everything the bucket held at `position`."""

    position: Position
    entries: Mapping[str, Entry]


class Change(msgspec.Struct, frozen=True):
    """One key written, or deleted when `entry` is None."""

    position: Position
    key: str
    entry: Entry | None


class Lost(msgspec.Struct, frozen=True):
    """The watch cannot vouch for what was delivered; the last state stays valid until a Listing."""

    cause: str


WatchEvent = Listing | Change | Lost


class Stored(msgspec.Struct, frozen=True):
    """One message of a stream; `time_s` is the server's clock, Unix seconds."""

    subject: str
    sequence: int
    time_s: float
    headers: Mapping[str, str]
    payload: bytes


@dataclass(frozen=True, slots=True)
class Taken(Generic[M]):
    """A message that nobody else is given; `left` counts those that went from the stream untaken (it was
    full, or they were too old) since its queue group was made, the same number for every process."""

    message: M
    left: int


class Subscription(Protocol):
    """Interest in a subject."""

    async def close(self) -> None:
        """End it; messages already delivered are still handled."""


class Bus(Protocol):
    """What services need of a message bus.

    Handlers are plain functions, called on the loop, one message at a time and in order per
    subscription. A message that cannot be decoded, or whose handler raises, is counted and dropped;
    the subscription lives on. Everything below survives the loss of the connection: subscriptions
    and watches come back by themselves.
    """

    @property
    def connected(self) -> bool:
        """Whether the bus answers, as far as is known."""

    def on_connection(self, listener: Callable[[bool], None]) -> None:
        """Call `listener` at every change of `connected`."""

    def publish(self, subject: Subject[M], message: M, *tokens: str) -> bool:
        """Send without waiting, at most once; a stream that covers the subject stores it. False if it was
        dropped (and counted): no connection, or the subject's bound of unsent bytes.

        Raises:
            MessageTooLarge: over the subject's bound.
        """

    async def request(self, service: Service[M, R], message: M, *tokens: str, deadline_s: float) -> R:
        """Ask one member of the service's queue group.

        Raises:
            BusUnavailable: no connection, or no member.
            BusTimeout: no valid answer within the deadline.
            MessageTooLarge: over the subject's bound.
        """

    def call(
        self,
        service: Service[M, R],
        message: M,
        *tokens: str,
        deadline_s: float,
        settled: Callable[[R | BusError], None],
    ) -> None:
        """`request` without a task, for the hot path: `settled` is called once, with the answer,
        BusUnavailable or BusTimeout, and perhaps before this returns.

        Raises:
            MessageTooLarge: over the subject's bound.
        """

    async def subscribe(
        self,
        subject: Subject[M],
        handler: Callable[[M], None],
        *tokens: str,
        skip: Callable[[bytes], bool] | None = None,
    ) -> Subscription:
        """Deliver every message; without tokens, of all names of the subject. Those for whose bytes `skip`
        says True are not decoded, nor handed on."""

    async def serve(
        self,
        service: Service[M, R],
        handler: Callable[[M], R | None],
        *tokens: str,
        then: Callable[[], None] | None = None,
    ) -> Subscription:
        """Answer requests as a member of the queue group; None sends no answer. `then` is called once the
        answers to one or several messages are on their way, for what nobody has to wait for."""

    async def ensure_stream(self, stream: Stream) -> None:
        """Create the stream unless it exists; its settings are brought up to date.

        Raises:
            BusError: the bus cannot be asked, or refused.
        """

    def append(self, subject: str, payload: bytes, headers: Mapping[str, str]) -> asyncio.Future[int]:
        """Store a message in the stream that covers `subject`; the future gives its sequence, or
        BusError when it is not known to be stored. A repeated `Nats-Msg-Id` is stored once."""

    def follow(self, stream: Stream, subject: str, since_s: float | None) -> AsyncGenerator[Stored, None]:
        """Messages stored under the filter `subject`: those of the last `since_s` seconds (None: of none),
        then every one to come, across reconnects."""

    def read(
        self, stream: Stream, subject: str, since_s: float | None, after: int = 0
    ) -> AsyncGenerator[Stored, None]:
        """What the stream holds under the filter `subject`, oldest first, up to its end: of the last
        `since_s` seconds, or (None) of those with a sequence above `after`.

        Raises:
            BusError: it cannot be read, or not on.
        """

    def take(self, stream: Stream, subject: Subject[M]) -> AsyncGenerator[Taken[M], None]:
        """Messages of `subject` out of the stream that holds them, each to one process of the subject's queue
        group, at most once, oldest first. The next one is asked for when this is advanced: what nobody has
        hands for stays in the stream, within its bounds. The stream is made, and made anew, as needed."""

    async def ensure_counters(self, counters: Counters) -> float:
        """Create them unless they exist; the server's clock, Unix seconds.

        Raises:
            BusError: the bus cannot be asked, or refused.
        """

    def add(self, counters: Counters, deltas: Sequence[tuple[str, int]]) -> asyncio.Future[list[int]]:
        """Add to numbers by key, each 0 until it is added to first, which is created with it. The future
        gives the sums, or BusError when one of them is not known to be added; nothing is added twice."""

    async def ensure_bucket(self, bucket: Bucket) -> bool:
        """Create the bucket unless it exists; True if it was created. Raises BusError."""

    async def put(self, bucket: Bucket, key: str, value: bytes, *, expected: int | None = None) -> int:
        """Write a key and return its revision. `expected` is the revision it must have (0: none yet).

        Raises:
            RevisionConflict: it has another one.
            BusError: not known to be written.
        """

    async def delete(self, bucket: Bucket, key: str, *, expected: int | None = None) -> None:
        """Delete a key; raises as `put` does."""

    def watch(self, bucket: Bucket) -> AsyncGenerator[WatchEvent, None]:
        """A Listing, then every Change after it. Whenever the watch can no longer vouch for being
        complete (connection lost, bucket re-created, a sequence missed) it says Lost and later lists
        again. It waits for a bucket that does not exist."""

    async def register(self, service: str, instance: str, version: str, metadata: Mapping[str, str]) -> None:
        """Appear in the bus's directory of services for as long as the process lives."""

    async def close(self) -> None:
        """Send what is buffered, then disconnect; at most a few seconds."""
