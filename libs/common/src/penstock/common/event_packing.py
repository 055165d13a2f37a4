"""Events become messages of the routing log: numbered, encoded, chained (`penstock.common.event_batches`)."""

from __future__ import annotations

import time
from typing import Final

import msgspec

from penstock.common.event_batches import (
    BATCH_TYPE,
    INCARNATION,
    MAX_BATCH_BYTES,
    MESSAGE_ID,
    PREVIOUS,
    SEQUENCE,
    WRITER,
    Emitted,
    Message,
    Witnessed,
    chain,
)
from penstock.common.routing_events import type_of
from penstock.common.subjects import event_subject

_encode: Final = msgspec.json.Encoder().encode
# What stands around and between the parts of an event.
ROUND_BYTES: Final = 48


def emitted(subject: str, moment: float, data: msgspec.Struct, *, keep: bool) -> Emitted:
    """An event as it waits for its message, with its data if that is to be kept.

    In JSON it is one object: its parts would have left the processor's cache by then, and each would have to
    come back to be told, and again to be freed."""
    if type(data) is Witnessed:
        return subject, moment, _encode(data.data), data
    return subject, moment, _encode(data), data if keep else None


class Batches:
    """One writer's numbers and its chain."""

    def __init__(self, writer: str, incarnation: str) -> None:
        """`writer` is service and id, as in `scheduler/7f3a`."""
        self._writer, self._incarnation = writer, incarnation
        self.sequence = 0
        self._message_number = 0
        self._previous = ""
        # What all events begin with, and what those of a kind share after their number.
        self._head: bytes = b'{"specversion":"1.0","id":' + _encode(f"{writer}/{incarnation}/")[:-1]
        self._shared: dict[str, bytes] = {}
        self._moment_ms, self._moment = 0, b""
        # Numbers of events that no stream would take, for whoever says so in the log.
        self.oversize: list[int] = []

    def close(self, kind: str, model: str, batch: list[Emitted]) -> list[Message]:
        """The messages of a batch. Sequences are given here, so that those of a message are consecutive."""
        first, pieces, size = self.sequence + 1, list[bytes](), 0
        messages: list[Message] = []
        for subject, moment, told, data in batch:
            self.sequence += 1
            ms = int(moment * 1000)
            if ms != self._moment_ms:
                self._moment_ms, self._moment = ms, b',"time":"%b","data":' % rfc3339(ms)
            if type(data) is Witnessed:
                known = self._witnessed(kind, data, subject)
            else:
                known = self._known(kind, subject)
            length = len(known) + len(told) + ROUND_BYTES
            if pieces and size + length > MAX_BATCH_BYTES:
                messages.append(self._enclose(kind, model, first, self.sequence - 1, pieces))
                first, pieces, size = self.sequence, [], 0
            if length > MAX_BATCH_BYTES:
                # The stream would refuse it for ever; the gap in the sequences says that it is missing.
                self.oversize.append(self.sequence)
                first = self.sequence + 1
                continue
            # Joined once for all of a message: an event put together by itself costs 0.5 us more.
            pieces.append(b"," if pieces else b"[")
            pieces.append(known)
            pieces.append(self._moment)
            pieces.append(told)
            pieces.append(b"}")
            size += length
        if pieces:
            messages.append(self._enclose(kind, model, first, self.sequence, pieces))
        return messages

    def _known(self, kind: str, subject: str) -> bytes:
        """An `Event` up to its time. What all of a kind share is encoded once."""
        shared = self._shared.get(kind)
        if shared is None:
            source, type_ = _encode(f"/penstock/{self._writer}"), _encode(type_of(kind))
            shared = self._shared[kind] = b'","source":%b,"type":%b,"subject":' % (source, type_)
        return b"%b%d%b%b" % (self._head, self.sequence, shared, _encode(subject))

    def _witnessed(self, kind: str, data: Witnessed, subject: str) -> bytes:
        said = [_encode(text) for text in (data.id, data.source, type_of(kind), subject)]
        return b'{"specversion":"1.0","id":%b,"source":%b,"type":%b,"subject":%b' % tuple(said)

    def _enclose(self, kind: str, model: str, first: int, last: int, pieces: list[bytes]) -> Message:
        pieces.append(b"]")
        payload = b"".join(pieces)
        self._message_number += 1
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


_seconds, _text = 0, b""


def rfc3339(unix_ms: int) -> bytes:
    """A moment as events have it, UTC."""
    global _seconds, _text
    seconds, ms = divmod(unix_ms, 1000)
    if seconds != _seconds:
        # 2 us, which at a thousand events a second each of them would pay.
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)).encode()
        _seconds, _text = seconds, text
    return b"%b.%03dZ" % (_text, ms)
