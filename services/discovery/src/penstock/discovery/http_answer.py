"""An HTTP/1.1 answer to one GET, read piece by piece: only what is plainly well-formed and bounded passes."""

from __future__ import annotations

import re

MAX_ANSWER_BYTES = 1024 * 1024
MAX_HEAD_BYTES = 32 * 1024
# 100 Continue and its like before the answer proper.
MAX_INTERIM = 4

_STATUS = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: [^\x00\r\n]*)?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00\r\n]*?)[ \t]*")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[^\r\n]{0,256})?")
_END = b"\r\n\r\n"


class BadAnswer(Exception):
    """The peer does not speak HTTP, or says too much; `fault` is `malformed` or `too_large`."""

    def __init__(self, fault: str) -> None:
        self.fault = fault
        super().__init__(fault)


def _malformed() -> BadAnswer:
    return BadAnswer("malformed")


class Answer:
    """Feed it until `done`. `reusable` says whether the connection can carry another request after it."""

    def __init__(self) -> None:
        self.status = 0
        self.body = bytearray()
        self.done = False
        self.reusable = False
        self.begun = False
        self._rest = bytearray()
        self._interim = 0
        # Bytes of the body still to come; None: until the connection ends.
        self._left: int | None = 0
        self._chunked = False

    def feed(self, data: bytes) -> None:
        """Take what the connection delivered.

        Raises:
            BadAnswer: no part of it can be used.
        """
        self.begun = True
        self._rest += data
        while not self.status and self._head():
            pass
        if self.status and not self.done:
            if self._chunked:
                self._read_chunks()
            else:
                self._read_plain()
        if self.done and self._rest:
            raise _malformed()

    def end(self) -> None:
        """The connection ended. Raises BadAnswer unless that is how the answer ends."""
        if self.done:
            return
        if not self.status or self._chunked or self._left is not None:
            raise _malformed()
        self.done = True

    def _head(self) -> bool:
        """Read one head if it is there; whether to look for another one."""
        end = self._rest.find(_END)
        if end > MAX_HEAD_BYTES or (end < 0 and len(self._rest) > MAX_HEAD_BYTES):
            raise _malformed()
        first = self._rest.find(b"\r\n")
        status = _STATUS.fullmatch(self._rest[:first]) if first >= 0 else None
        if first >= 0 and status is None:
            raise _malformed()
        if end < 0 or status is None:
            return False
        version, code = status[1], int(status[2])
        fields = _fields(bytes(self._rest[first + 2 : end])) if end > first else {}
        del self._rest[: end + len(_END)]
        if code < 200:
            self._interim += 1
            if self._interim > MAX_INTERIM or code == 101:
                raise _malformed()
            return True
        self._frame(code, fields)
        closes = b"close" in fields.get(b"connection", b"").lower()
        self.reusable = version == b"1" and not closes and (self._chunked or self._left is not None)
        self.status = code
        return False

    def _frame(self, code: int, fields: dict[bytes, bytes]) -> None:
        if fields.get(b"content-encoding", b"identity").lower() != b"identity":
            raise _malformed()
        length, coding = fields.get(b"content-length"), fields.get(b"transfer-encoding")
        if coding is not None:
            if coding.lower() != b"chunked" or length is not None:
                raise _malformed()
            self._chunked = True
        elif code in (204, 304):
            self._left = 0
        elif length is None:
            self._left = None
        elif not length.isdigit() or len(length) > 12:
            raise _malformed()
        else:
            self._left = int(length)
            self._bound(self._left)

    def _read_plain(self) -> None:
        if self._left is None:
            self.body += self._rest
            self._rest.clear()
            self._bound(len(self.body))
            return
        wanted = self._left - len(self.body)
        self.body += self._rest[:wanted]
        del self._rest[:wanted]
        self.done = len(self.body) == self._left

    def _read_chunks(self) -> None:
        at = 0
        while (line_end := self._rest.find(b"\r\n", at)) >= 0:
            size_line = _CHUNK.fullmatch(self._rest[at:line_end])
            if size_line is None:
                raise _malformed()
            size, start = int(size_line[1], 16), line_end + 2
            self._bound(len(self.body) + size)
            if size == 0:
                # Trailers say nothing that is wanted; an answer that has them ends its connection.
                tail = self._rest[start : start + 2]
                if tail == b"\r\n"[: len(tail)]:
                    if len(tail) == 2:
                        self.done, at = True, start + 2
                else:
                    self.done, self.reusable, at = True, False, len(self._rest)
                break
            if len(self._rest) < start + size + 2:
                break
            if self._rest[start + size : start + size + 2] != b"\r\n":
                raise _malformed()
            self.body += self._rest[start : start + size]
            at = start + size + 2
        del self._rest[:at]
        if not self.done and len(self._rest) > MAX_ANSWER_BYTES + 512:
            raise _malformed()

    def _bound(self, size: int) -> None:
        if size > MAX_ANSWER_BYTES:
            raise BadAnswer("too_large")


def _fields(lines: bytes) -> dict[bytes, bytes]:
    """Header fields by lower-case name; of one that comes twice, both values joined."""
    fields: dict[bytes, bytes] = {}
    for line in lines.split(b"\r\n") if lines else ():
        field = _FIELD.fullmatch(line)
        if field is None:
            raise _malformed()
        name, value = field[1].lower(), field[2]
        held = fields.get(name)
        fields[name] = value if held in (None, value) else b"%s, %s" % (held, value)
    return fields
