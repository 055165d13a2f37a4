"""The NATS client protocol: bytes in, operations out; no I/O (protocol as documented by the NATS project).

One line per operation, ended by CRLF; MSG and HMSG are followed by as many bytes as they say, and CRLF.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

MAX_LINE_BYTES: Final = 64 * 1024
MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
_HEADER_VERSION: Final = b"NATS/1.0"


class WireError(Exception):
    """Bytes that are not the NATS protocol."""


class Message:
    """One delivered message; headers are read when asked for."""

    __slots__ = ("_headers", "_raw_headers", "data", "reply", "subject")

    def __init__(self, subject: str, reply: str, data: bytes, raw_headers: bytes) -> None:
        self.subject, self.reply, self.data, self._raw_headers = subject, reply, data, raw_headers
        self._headers: dict[str, str] | None = None

    @property
    def headers(self) -> dict[str, str]:
        """Header fields; `Status` and `Description` for the server's own answers."""
        if self._headers is None:
            self._headers = parse_headers(self._raw_headers) if self._raw_headers else {}
        return self._headers

    @property
    def no_responders(self) -> bool:
        """Whether the server says that nobody listens."""
        return self._raw_headers.startswith(b"NATS/1.0 503")


def parse_headers(raw: bytes) -> dict[str, str]:
    """A header block. Of a repeated name the last value counts; a line that is none is passed over."""
    first, _, rest = raw.partition(b"\r\n")
    headers: dict[str, str] = {}
    status = first[len(_HEADER_VERSION) :].strip().decode("utf-8", "replace")
    if status:
        headers["Status"], _, description = status.partition(" ")
        headers["Description"] = description.strip()
    for line in rest.split(b"\r\n"):
        name, colon, value = line.partition(b":")
        if colon:
            headers[name.strip().decode("utf-8", "replace")] = value.strip().decode("utf-8", "replace")
    return headers


def encode_publish(
    subject: str, payload: bytes, reply: str = "", headers: Mapping[str, str] | None = None
) -> bytes:
    """PUB or HPUB. Raises ValueError for a subject or header that would end its line."""
    where = f"{subject} {reply}" if reply else subject
    if not where.isprintable() or where.count(" ") != bool(reply) or not subject:
        raise ValueError(f"not a subject: {where[:100]!r}")
    if not headers:
        return b"PUB %b %d\r\n%b\r\n" % (where.encode(), len(payload), payload)
    lines = ["NATS/1.0"]
    for name, value in headers.items():
        if "\r" in value or "\n" in value or not name.isprintable() or ":" in name:
            raise ValueError(f"not a header: {name[:100]!r}")
        lines.append(f"{name}: {value}")
    block = "\r\n".join(lines).encode() + b"\r\n\r\n"
    sizes = b"%d %d" % (len(block), len(block) + len(payload))
    return b"HPUB %b %b\r\n%b%b\r\n" % (where.encode(), sizes, block, payload)


class Parser:
    """Cuts the server's bytes into operations. `on_message` gets the subscription's number too;
    `on_line` gets every other operation, name in upper case and the rest of its line."""

    def __init__(
        self, on_message: Callable[[int, Message], None], on_line: Callable[[bytes, bytes], None]
    ) -> None:
        self._on_message, self._on_line = on_message, on_line
        self._buffer = b""

    def feed(self, data: bytes) -> None:
        """Raises WireError."""
        buffer = self._buffer + data if self._buffer else data
        position = 0
        while True:
            end = buffer.find(b"\r\n", position)
            if end < 0:
                if len(buffer) - position > MAX_LINE_BYTES:
                    raise WireError("a line that does not end")
                break
            head = buffer[position : position + 4]
            if head == b"MSG " or head == b"HMSG":
                after = self._message(buffer, buffer[position:end], end + 2)
                if not after:
                    break
                position = after
            else:
                name, _, rest = buffer[position:end].partition(b" ")
                position = end + 2
                self._on_line(name.upper(), rest)
        self._buffer = buffer[position:] if position else buffer

    def _message(self, buffer: bytes, line: bytes, start: int) -> int:
        """Where the message ends; 0 if it is not whole."""
        # At spaces only: what follows other white space in a subject would name another subscription.
        fields = line.split(b" ")
        with_headers = fields[0] == b"HMSG"
        try:
            total = int(fields[-1])
            header = int(fields[-2]) if with_headers else 0
            sid, names = int(fields[2]), fields[3 : -2 if with_headers else -1]
        except (ValueError, IndexError):
            raise WireError(f"not a message: {line[:100]!r}") from None
        if not 0 <= header <= total <= MAX_MESSAGE_BYTES or len(names) > 1:
            raise WireError(f"not a message: {line[:100]!r}")
        stop = start + total
        if len(buffer) < stop + 2:
            return 0
        if buffer[stop : stop + 2] != b"\r\n":
            raise WireError("a message that does not end where its size says")
        raw = buffer[start : start + header] if header else b""
        subject, reply = fields[1].decode("utf-8", "replace"), _reply(names[0]) if names else ""
        self._on_message(sid, Message(subject, reply, buffer[start + header : stop], raw))
        return stop + 2


def _reply(address: bytes) -> str:
    """Where to answer; nowhere if that could not be written as it came."""
    try:
        return address.decode()
    except UnicodeDecodeError:
        return ""
