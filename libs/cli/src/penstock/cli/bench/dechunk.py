"""Chunked bodies whose chunks hold no CRLF, as those of event streams: one split finds all framing."""

from __future__ import annotations

# Far more than any chunk that an event stream is made of.
MAX_HELD_BYTES = 1024 * 1024


class NotChunked(Exception):
    """Bytes that are not the chunks they should be."""


class Dechunker:
    """Takes a body in any pieces; `done` after the last chunk.

    A proxy may cut and join chunks as it likes. A few hundred chunks in one piece cost about as much as
    one, so that following a stream is never what limits it.
    """

    def __init__(self) -> None:
        self._held = b""
        self.done = False

    def feed(self, data: bytes) -> bytes:
        """The payload of the chunks that are whole. Raises NotChunked."""
        if self.done:
            raise NotChunked(f"bytes after the last chunk: {data[:80]!r}")
        tokens = (self._held + data).split(b"\r\n")
        self._held = tokens.pop()
        if len(tokens) % 2:
            self._held = b"%b\r\n%b" % (tokens.pop(), self._held)
        sizes, payloads = tokens[::2], tokens[1::2]
        if len(self._held) > MAX_HELD_BYTES:
            raise NotChunked(f"a chunk of more than {MAX_HELD_BYTES} bytes: {self._held[:80]!r}")
        try:
            right = [int(size, 16) for size in sizes] == [len(payload) for payload in payloads]
        except ValueError:
            right = False
        if not right:
            raise NotChunked(f"a chunk is not as long as its size says: {data[:80]!r}")
        if b"" in payloads:
            if payloads.index(b"") != len(payloads) - 1 or self._held:
                raise NotChunked(f"bytes after the last chunk: {data[:80]!r}")
            self.done = True
        return b"".join(payloads)
