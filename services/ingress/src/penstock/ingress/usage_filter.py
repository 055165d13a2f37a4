"""The usage chunk that the gateway asked for, taken out of a stream again; and events counted."""

from __future__ import annotations

import re

import msgspec

from penstock.ingress.chunked_body import ChunkedBody
from penstock.ingress.http_wire import LAST_CHUNK

# A longer part of an event passes as it is: no engine sends such a usage chunk.
MAX_HELD_BYTES = 16 * 1024
_END = re.compile(rb"\n\r?\n")


class _Chunk(msgspec.Struct):
    choices: list[msgspec.Raw]
    usage: msgspec.Raw


_decode = msgspec.json.Decoder(_Chunk).decode


class UsageFilter:
    """Follows one event stream. `events` is the number of its data events so far, `hidden` the usage chunk
    that was taken out. With `hide` the stream is framed anew: whole events go out, as chunks if
    `chunked_out`. Without, pieces go out as they come."""

    __slots__ = ("_chunked_out", "_held", "_wire", "events", "hidden", "hides")

    def __init__(self, *, hide: bool, chunked_in: bool, chunked_out: bool) -> None:
        self.hides, self._chunked_out = hide, chunked_out
        self._wire = ChunkedBody(collect=True) if chunked_in else None
        self._held = self.hidden = b""
        self.events = 0

    def feed(self, data: bytes) -> bytes:
        """What goes on of a piece, b"" for nothing."""
        if not self.hides:
            self.events += data.count(b"data:")
            return data
        if self._wire is not None:
            self._wire.feed(data)
            data = bytes(self._wire.data)
            self._wire.data.clear()
        return self._framed(self._shown(data))

    def end(self) -> bytes:
        """What is left when the stream is complete."""
        if not self.hides:
            return b""
        held, self._held = self._held, b""
        return self._framed(held) + (LAST_CHUNK if self._chunked_out else b"")

    def _shown(self, data: bytes) -> bytes:
        if self._held:
            data = self._held + data
        end = _last_end(data)
        if len(data) - end > MAX_HELD_BYTES:
            end = len(data)
        whole, self._held = data[:end], data[end:]
        self.events += whole.count(b"data:")
        if b'"usage"' not in whole:
            return whole
        return b"".join(event for event in _events(whole) if not self._takes(event))

    def _takes(self, event: bytes) -> bool:
        if b'"usage"' not in event:
            return False
        lines = event.replace(b"\r\n", b"\n").split(b"\n")
        text = b"\n".join(line[5:] for line in lines if line.startswith(b"data:"))
        try:
            chunk = _decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return False
        if chunk.choices or not bytes(chunk.usage).startswith(b"{"):
            return False
        self.hidden = event
        self.events -= 1
        return True

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if data and self._chunked_out else data


def _last_end(data: bytes) -> int:
    """Where the last whole event ends; 0 if none does."""
    return max(
        (at + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if (at := data.rfind(mark)) >= 0), default=0
    )


def _events(data: bytes) -> list[bytes]:
    """Events with the empty line that ends each; what is after the last is one more."""
    events, start = [], 0
    for end in _END.finditer(data):
        events.append(data[start : end.end()])
        start = end.end()
    events.append(data[start:])
    return events
