"""HTTP/1.1 framing: strict heads (RFC 9112), chunked bodies. Sync, no I/O; bytes in, values out.

One regular expression accepts a whole head or refuses it: obs-fold, bare LF, spaces before a colon,
NUL and control bytes, and names that are not tokens all fail in that one match.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final, Generic, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from penstock.ingress.api_keys import Caller

from penstock.ingress.header_names import COMMON, ONCE, REQUEST_DROPPED, REQUEST_READ, RESPONSE_DROPPED
from penstock.ingress.openai import GENERATION
from penstock.ingress.owners import IN_QUERY, split_query
from penstock.ingress.wishes import NO_WISHES, Wishes

TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELDS: Final = rb"((?:" + TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n)*)"
_REQUEST: Final = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/1\.([01])\r\n" + _FIELDS)
_RESPONSE: Final = re.compile(
    rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?\r\n" + _FIELDS
)
MAX_LENGTH_DIGITS: Final = 18
# Longer heads are not remembered: an idle connection must not hold them.
_MEMO_BYTES: Final = 4096
_LENGTH: Final = re.compile(rb"[0-9]{1,%d}" % MAX_LENGTH_DIGITS)
# As programs write it; other spellings are parsed every time.
_LENGTH_LINES: Final = (b"\r\ncontent-length: ", b"\r\nContent-Length: ")
# What an engine, or a hosted endpoint, tells of limits of its own.
_LIMITS: Final = b"x-ratelimit-"
_LIMIT_LINES: Final = re.compile(rb"^x-ratelimit-[^\n]*\n", re.I | re.M)
UNTIL_CLOSE: Final = -1
CHUNKED: Final = -2
LAST_CHUNK: Final = b"0\r\n\r\n"


class BadFraming(Exception):
    """Bytes that are not the HTTP they should be."""


class RequestHead:
    """A request's head. `length` is the body's bytes, or CHUNKED; `block` the lines to pass on, each with
    its CRLF; `origin_form` path and query, of an absolute-form target too; `path` without the query,
    `path_text` for logs; `first_line` that of the request to an instance, up to its host; `caller` is whose
    API key it came with, None before that is known; `generates`: it asks for work of an engine; `wishes` are
    None until somebody has read them in `read`, which has something beside what nearly every request has."""

    __slots__ = (
        "block",
        "caller",
        "content_type",
        "first_line",
        "generates",
        "given_id",
        "keep_alive",
        "length",
        "method",
        "minor",
        "origin_form",
        "path",
        "path_text",
        "read",
        "target",
        "wishes",
    )

    def __init__(self, method: bytes, target: bytes, minor: int) -> None:
        self.method, self.target, self.minor = method, target, minor
        self.origin_form = target if target.startswith(b"/") else _origin_form(target)
        self.path = self.origin_form.partition(b"?")[0]
        self.path_text = self.path.decode("ascii", "replace")
        self.block = b""
        self.read: dict[bytes, bytes] = {}
        self.length = 0
        self.keep_alive = minor == 1
        self.caller: Caller | None = None
        self.wishes: Wishes | None = None
        self.content_type = ""
        self.first_line = b""
        self.generates = method == b"POST" and self.path in GENERATION
        self.given_id: bytes | None = None

    def header(self, name: bytes) -> str:
        """One of the headers the ingress reads, "" if absent; bytes beyond ASCII become U+FFFD."""
        value = self.read.get(name)
        return value.decode("utf-8", "replace") if value else ""

    def with_length(self, length: int) -> Self:
        """The same head before a body of `length` bytes."""
        head = type(self)(self.method, self.target, self.minor)
        head.origin_form, head.path, head.path_text = self.origin_form, self.path, self.path_text
        head.block, head.read, head.wishes = self.block, self.read, self.wishes
        head.first_line, head.content_type = self.first_line, self.content_type
        head.given_id, head.generates = self.given_id, self.generates
        head.length, head.keep_alive, head.caller = length, self.keep_alive, self.caller
        return head

    def of(self, caller: Caller, block: bytes) -> RequestHead:
        """The same head with its caller, and other lines to pass on."""
        head = self.with_length(self.length)
        head.caller, head.block, head.wishes = caller, block, None
        return head


class ResponseHead:
    """A response's head. `length` is the body's bytes, CHUNKED or UNTIL_CLOSE; `block` the lines to pass on,
    each with its CRLF; `encoded` says that the body is compressed: nothing readable can be added to it;
    `limited`, that lines of `block` tell of a limit of the sender's own."""

    __slots__ = ("block", "encoded", "event_stream", "keep_alive", "length", "limited", "reason", "status")

    def __init__(self, status: int, reason: bytes, minor: int) -> None:
        self.status, self.reason = status, reason
        self.block = b""
        self.length = UNTIL_CLOSE
        self.keep_alive = minor == 1
        self.event_stream = self.encoded = self.limited = False

    def with_length(self, length: int) -> Self:
        """The same head before a body of `length` bytes."""
        head = type(self)(self.status, self.reason, 1)
        head.block, head.length, head.limited = self.block, length, self.limited
        head.keep_alive, head.event_stream, head.encoded = self.keep_alive, self.event_stream, self.encoded
        return head

    def unlimited(self) -> Self:
        """The same head, less what it tells of limits of the sender's own."""
        head = self.with_length(self.length)
        head.block, head.limited = _LIMIT_LINES.sub(b"", self.block), False
        return head


class _Head(Protocol):
    length: int

    def with_length(self, length: int) -> Self: ...


H = TypeVar("H", bound=_Head)
# The fields of a head, the keys that its key was looked up in, and the head as it goes on.
Admitted = tuple[Mapping[bytes, bytes], object, RequestHead]


class HeadMemo(Generic[H]):
    """Parses the heads of one connection. Peers repeat theirs but for the length of the body, and a
    repetition costs a tenth of parsing: 0.5 us instead of 5. Heads are values: nobody may change one."""

    __slots__ = (
        "_after",
        "_after_bytes",
        "_before",
        "_before_bytes",
        "_head",
        "_known",
        "_last_bytes",
        "_last_head",
        "_last_head_bytes",
        "_most_bytes",
        "_parse",
        "admitted",
    )

    def __init__(self, parse: Callable[[bytes], H], most_bytes: int = _MEMO_BYTES) -> None:
        """No head is remembered that could be longer than `most_bytes`, its empty line excluded, when it
        comes again."""
        self._parse: Callable[[bytes], H] = parse
        self._most_bytes = min(most_bytes, _MEMO_BYTES) - MAX_LENGTH_DIGITS
        self._known: H | None = None
        # All of a head without a length to find; or what stands around its length, and how long that is.
        self._head = self._before = self._after = b""
        self._before_bytes = self._after_bytes = 0
        # The head of the last whole message, and how long that message was: the next is often as long.
        self._last_head = b""
        self._last_head_bytes, self._last_bytes = 0, -1
        # What was found for the API key of the head that is remembered.
        self.admitted: Admitted | None = None

    def whole(self, data: bytes) -> tuple[H, bytes] | None:
        """Head and body, if `data` is a message that came in one piece with a head like the last one.

        The head is the last one itself: its `length` may be another."""
        known = self._known
        if known is None:
            return None
        if len(data) == self._last_bytes and data[: self._last_head_bytes] == self._last_head:
            return known, data[self._last_head_bytes :]
        start = self._before_bytes
        # A slice that is compared costs less than `startswith`, and looking for the head's end 0.2 us.
        if not start or data[:start] != self._before:
            return None
        stop = data.find(b"\r", start)
        digits, body_at = data[start:stop], stop + self._after_bytes
        if data[stop:body_at] != self._after or not digits.isdigit() or len(digits) > MAX_LENGTH_DIGITS:
            return None
        body = data[body_at:]
        if int(digits) != len(body):
            return None
        self._last_head, self._last_head_bytes, self._last_bytes = data[:body_at], body_at, len(data)
        return known, body

    @property
    def remembers(self) -> bool:
        """Whether a head like the last one is given out without parsing it."""
        return self._known is not None

    def parse(self, head: bytes) -> H:
        """As the parser that it was made with."""
        known = self._known
        if known is not None:
            before, after = self._before, self._after[:-2]
            if not before:
                if head == self._head:
                    return known
            elif head.startswith(before) and head.endswith(after):
                digits = head[len(before) : len(head) - len(after)]
                if digits.isdigit() and len(digits) <= MAX_LENGTH_DIGITS:
                    return known.with_length(int(digits))
        return self._learn(head)

    def _learn(self, head: bytes) -> H:
        known = self._parse(head)
        self._known, self._head, self._before, self._before_bytes = known, head, b"", 0
        self._last_head, self._last_head_bytes, self._last_bytes = b"", 0, -1
        if len(head) > self._most_bytes:
            self._known, self._head = None, b""
        elif known.length > 0:
            self._find_length(head)
        return known

    def _find_length(self, head: bytes) -> None:
        # The head is valid: what follows a CRLF in it is a field, and of this name there is only one.
        for name in _LENGTH_LINES:
            start = head.find(name) + len(name)
            if start >= len(name):
                stop = head.index(b"\r\n", start)
                if head[start:stop].isdigit():
                    self._head, self._before, self._after = b"", head[:start], head[stop:] + b"\r\n"
                    self._before_bytes, self._after_bytes = start, len(self._after)


def _origin_form(target: bytes) -> bytes:
    rest = target.partition(b"://")[2]
    slash = rest.find(b"/")
    return rest[slash:] if slash >= 0 else b"/"


def parse_request(head: bytes) -> RequestHead:
    """`head` ends with the CRLF of its last line, the empty line excluded. Raises BadFraming."""
    match = _REQUEST.fullmatch(head)
    if match is None:
        raise BadFraming("the request's head is not valid HTTP/1.1")
    method, target, minor, block = match.groups()
    request = RequestHead(method, target, int(minor))
    read = request.read
    fields: list[bytes] = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    connection: list[bytes] = []
    for line in block.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name in REQUEST_READ:
            if name in read and name in ONCE:
                raise BadFraming(f"more than one {name.decode()} header")
            read[name] = value.strip(b" \t")
        elif name == b"content-length":
            lengths.append(value.strip(b" \t"))
        elif name == b"transfer-encoding":
            codings.append(value.strip(b" \t").lower())
        elif name == b"connection":
            connection.append(value)
        if name not in REQUEST_DROPPED:
            fields.append(line)
    if b"host" not in read and minor == b"1":
        raise BadFraming("a Host header is required")
    request.length = _framing(lengths, codings, 0)
    if request.length == CHUNKED and minor == b"0":
        raise BadFraming("Transfer-Encoding does not exist in HTTP/1.0")
    if connection:
        request.keep_alive &= _apply_connection(connection, fields)
    if b"?" in target and request.path.startswith(b"/v1/"):
        owner, request.origin_form = split_query(request.origin_form)
        if owner:
            read[IN_QUERY] = owner
    request.block = _block(fields)
    request.content_type, request.given_id = request.header(b"content-type"), read.get(b"x-request-id")
    request.first_line = b"%b %b HTTP/1.1\r\nhost: " % (method, request.origin_form)
    if COMMON.issuperset(read):
        request.wishes = NO_WISHES
    return request


def parse_response(head: bytes) -> ResponseHead:
    """`head` as in `parse_request`. Raises BadFraming."""
    match = _RESPONSE.fullmatch(head)
    if match is None:
        raise BadFraming("the response's head is not valid HTTP/1.1")
    minor, status, reason, block = match.groups()
    response = ResponseHead(int(status), reason or b"", int(minor))
    fields: list[bytes] = []
    lengths: list[bytes] = []
    codings: list[bytes] = []
    connection: list[bytes] = []
    for line in block.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name == b"content-length":
            lengths.append(value.strip(b" \t"))
        elif name == b"transfer-encoding":
            codings.append(value.strip(b" \t").lower())
        elif name == b"connection":
            connection.append(value)
        elif name not in RESPONSE_DROPPED:
            if name == b"content-type":
                response.event_stream = b"text/event-stream" in value.lower()
            elif name == b"content-encoding":
                response.encoded = True
            elif name.startswith(_LIMITS):
                response.limited = True
            fields.append(line)
    response.length = _framing(lengths, codings, UNTIL_CLOSE)
    if connection:
        response.keep_alive &= _apply_connection(connection, fields)
    response.block = _block(fields)
    if response.status in (204, 304):
        # A body announced all the same may follow, and must not become the next exchange's response.
        response.keep_alive &= response.length in (0, UNTIL_CLOSE)
        response.length = 0
    elif response.length == UNTIL_CLOSE:
        response.keep_alive = False
    return response


def _framing(lengths: list[bytes], codings: list[bytes], default: int) -> int:
    if codings:
        if lengths:
            raise BadFraming("Content-Length and Transfer-Encoding exclude each other")
        if codings != [b"chunked"]:
            raise BadFraming("the only Transfer-Encoding understood is chunked")
        return CHUNKED
    if not lengths:
        return default
    if len(lengths) > 1 or not _LENGTH.fullmatch(lengths[0]):
        raise BadFraming("Content-Length must be one decimal number")
    return int(lengths[0])


def _block(fields: list[bytes]) -> bytes:
    return b"\r\n".join((*fields, b"")) if fields else b""


def _apply_connection(values: list[bytes], fields: list[bytes]) -> bool:
    """Drop the fields that Connection names, in place; False if it says close."""
    options = {option.strip(b" \t").lower() for value in values for option in value.split(b",")}
    named = options - {b"close", b"keep-alive", b""}
    if named:
        fields[:] = [line for line in fields if line.partition(b":")[0].lower() not in named]
    return b"close" not in options
