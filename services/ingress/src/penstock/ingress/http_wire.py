"""HTTP/1.1 framing: strict heads (RFC 9112), chunked bodies. Sync, no I/O; bytes in, values out.

One regular expression accepts a whole head or refuses it: obs-fold, bare LF, spaces before a colon,
NUL and control bytes, and names that are not tokens all fail in that one match.
"""

from __future__ import annotations

import re

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELDS = rb"((?:" + TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n)*)"
_REQUEST = re.compile(rb"(" + TOKEN + rb") ([!-~]+) HTTP/1\.([01])\r\n" + _FIELDS)
_RESPONSE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?\r\n" + _FIELDS)
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_FIELD_LINE = re.compile(TOKEN + rb":[\t\x20-\x7e\x80-\xff]*\r\n")
# RFC 9110 6.5.1: what frames a message must not come after it.
_FRAMING_LINE = re.compile(rb"(?:content-length|transfer-encoding):", re.IGNORECASE)
_SIZE, _DATA, _AFTER, _TRAILER = range(4)
_MAX_CHUNK_LINE = 256
_MAX_TRAILER_BYTES = 8192
# Each chunk costs about a microsecond, whatever it holds: 4 MiB in chunks of one byte would be 4 s.
_FREE_CHUNKS = 4096
_MIN_CHUNK_BYTES = 64

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-connection",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"upgrade",
        b"transfer-encoding",
        b"content-length",
    }
)
# Set by this gateway, or naming a target: never taken from outside (DESIGN 3.2).
_ROUTING = frozenset(
    {
        b"target-pod",
        b"target-pod-ip",
        b"prefill-target-pod",
        b"prefill-target-pod-ip",
        b"x-request-id",
    }
)
_REQUEST_DROPPED = _HOP_BY_HOP | _ROUTING | {b"host", b"expect", b"http2-settings"}
_RESPONSE_DROPPED = _HOP_BY_HOP | _ROUTING | {b"routing-strategy"}
_REQUEST_READ = frozenset(
    {
        b"routing-strategy",
        b"config-profile",
        b"user",
        b"x-owned-by",
        b"x-session-id",
        b"x-priority",
        b"content-type",
        b"x-request-id",
        b"expect",
        b"host",
    }
)
# Of two of them, the gateway and the instance could each read another one.
_ONCE = frozenset({b"host", b"content-type"})
UNTIL_CLOSE = -1
CHUNKED = -2
LAST_CHUNK = b"0\r\n\r\n"


class BadFraming(Exception):
    """Bytes that are not the HTTP they should be."""


class RequestHead:
    """A request's head. `length` is the body's bytes, or CHUNKED; `fields` the lines to pass on."""

    __slots__ = ("fields", "keep_alive", "length", "method", "minor", "read", "target")

    def __init__(self, method: bytes, target: bytes, minor: int) -> None:
        self.method, self.target, self.minor = method, target, minor
        self.fields: list[bytes] = []
        self.read: dict[bytes, bytes] = {}
        self.length = 0
        self.keep_alive = minor == 1

    def header(self, name: bytes) -> str:
        """One of the headers the ingress reads, "" if absent; bytes beyond ASCII become U+FFFD."""
        value = self.read.get(name)
        return value.decode("utf-8", "replace") if value else ""

    @property
    def origin_form(self) -> bytes:
        """Path and query, of an absolute-form target too."""
        if self.target.startswith(b"/"):
            return self.target
        rest = self.target.partition(b"://")[2]
        slash = rest.find(b"/")
        return rest[slash:] if slash >= 0 else b"/"

    @property
    def path(self) -> bytes:
        """The target's path, without the query."""
        return self.origin_form.split(b"?", 1)[0]


class ResponseHead:
    """A response's head. `length` is the body's bytes, CHUNKED or UNTIL_CLOSE."""

    __slots__ = ("event_stream", "fields", "keep_alive", "length", "reason", "status")

    def __init__(self, status: int, reason: bytes, minor: int) -> None:
        self.status, self.reason = status, reason
        self.fields: list[bytes] = []
        self.length = UNTIL_CLOSE
        self.keep_alive = minor == 1
        self.event_stream = False

    @property
    def encoded(self) -> bool:
        """Whether the body is compressed: nothing readable can be added to it."""
        return any(line[:17].lower() == b"content-encoding:" for line in self.fields)


def parse_request(head: bytes) -> RequestHead:
    """`head` ends with the CRLF of its last line, the empty line excluded. Raises BadFraming."""
    match = _REQUEST.fullmatch(head)
    if match is None:
        raise BadFraming("the request's head is not valid HTTP/1.1")
    method, target, minor, block = match.groups()
    request = RequestHead(method, target, int(minor))
    read = request.read
    lengths: list[bytes] = []
    codings: list[bytes] = []
    connection: list[bytes] = []
    for line in block.split(b"\r\n")[:-1]:
        name, _, value = line.partition(b":")
        name = name.lower()
        if name in _REQUEST_READ:
            if name in read and name in _ONCE:
                raise BadFraming(f"more than one {name.decode()} header")
            read[name] = value.strip(b" \t")
        elif name == b"content-length":
            lengths.append(value.strip(b" \t"))
        elif name == b"transfer-encoding":
            codings.append(value.strip(b" \t").lower())
        elif name == b"connection":
            connection.append(value)
        if name not in _REQUEST_DROPPED:
            request.fields.append(line)
    if b"host" not in read and minor == b"1":
        raise BadFraming("a Host header is required")
    request.length = _framing(lengths, codings, 0)
    if request.length == CHUNKED and minor == b"0":
        raise BadFraming("Transfer-Encoding does not exist in HTTP/1.0")
    if connection:
        request.keep_alive &= _apply_connection(connection, request.fields)
    return request


def parse_response(head: bytes) -> ResponseHead:
    """`head` as in `parse_request`. Raises BadFraming."""
    match = _RESPONSE.fullmatch(head)
    if match is None:
        raise BadFraming("the response's head is not valid HTTP/1.1")
    minor, status, reason, block = match.groups()
    response = ResponseHead(int(status), reason or b"", int(minor))
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
        elif name not in _RESPONSE_DROPPED:
            if name == b"content-type":
                response.event_stream = b"text/event-stream" in value.lower()
            response.fields.append(line)
    response.length = _framing(lengths, codings, UNTIL_CLOSE)
    if connection:
        response.keep_alive &= _apply_connection(connection, response.fields)
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


def _apply_connection(values: list[bytes], fields: list[bytes]) -> bool:
    """Drop the fields that Connection names, in place; False if it says close."""
    options = {option.strip(b" \t").lower() for value in values for option in value.split(b",")}
    named = options - {b"close", b"keep-alive", b""}
    if named:
        fields[:] = [line for line in fields if line.partition(b":")[0].lower() not in named]
    return b"close" not in options


class ChunkedBody:
    """Follows a chunked body through the pieces it comes in.

    `feed` returns the bytes of whole, valid chunk lines and data that may be passed on as they are;
    the last chunk and the trailer are not among them (write LAST_CHUNK instead: nothing downstream
    asked for trailers). Once `done`, `rest` holds what follows the body. With `collect`, `data`
    gathers the payload; with `refuse_tiny`, thousands of tiny chunks are BadFraming.
    """

    __slots__ = (
        "_chunks",
        "_collect",
        "_held",
        "_refuse_tiny",
        "_remaining",
        "_state",
        "_trailer_bytes",
        "data",
        "done",
        "rest",
        "size",
    )

    def __init__(self, collect: bool = False, *, refuse_tiny: bool = False) -> None:
        self._state = _SIZE
        self._held = b""
        self._remaining = 0
        self._trailer_bytes = self._chunks = 0
        self._collect, self._refuse_tiny = collect, refuse_tiny
        # One buffer: a list would hold forty bytes for each of a hostile body's one-byte chunks.
        self.data = bytearray()
        self.size = 0
        self.done = False
        self.rest = b""

    @property
    def between_chunks(self) -> bool:
        """Whether what was passed on ends with a whole chunk."""
        return self._state == _SIZE

    def feed(self, piece: bytes) -> bytes:
        """Raises BadFraming; what came before the fault in the piece is lost with it."""
        if self._held:
            piece, self._held = self._held + piece, b""
        position, end = 0, len(piece)
        while position < end:
            if self._state == _DATA:
                take = min(self._remaining, end - position)
                if self._collect:
                    self.data += piece[position : position + take]
                self.size += take
                self._remaining -= take
                position += take
                if not self._remaining:
                    self._state = _AFTER
            elif self._state == _AFTER:
                if not b"\r\n".startswith(piece[position : position + 2]):
                    raise BadFraming("a chunk does not end where its size says")
                if end - position < 2:
                    break
                position += 2
                self._state = _SIZE
            elif self._state == _SIZE:
                after = self._size_line(piece, position)
                if not after:
                    break
                if self._state == _TRAILER:
                    self._trailer(piece[after:])
                    return piece[:position]
                position = after
                stop = after + self._remaining
                if piece[stop : stop + 2] == b"\r\n":
                    # A whole chunk at hand, as most are, needs no further turns: 2.0 -> 1.2 us.
                    if self._collect:
                        self.data += piece[after:stop]
                    self.size += self._remaining
                    self._remaining = 0
                    self._state = _SIZE
                    position = stop + 2
            else:
                self._trailer(piece)
                return b""
        if position == end:
            return piece
        self._held = piece[position:]
        return piece[:position]

    def _size_line(self, piece: bytes, position: int) -> int:
        """Where the data begins; 0 if the line is not whole."""
        newline = piece.find(b"\n", position, position + _MAX_CHUNK_LINE)
        if newline < 0:
            if len(piece) - position >= _MAX_CHUNK_LINE:
                raise BadFraming("a chunk's size line is too long")
            return 0
        match = _CHUNK_SIZE.fullmatch(piece, position, newline + 1)
        if match is None:
            raise BadFraming("a chunk's size is not a hexadecimal number")
        self._remaining = int(match[1], 16)
        self._chunks += 1
        if self._refuse_tiny and self._chunks > max(_FREE_CHUNKS, self.size // _MIN_CHUNK_BYTES):
            raise BadFraming(f"chunks of less than {_MIN_CHUNK_BYTES} bytes on average")
        self._state = _DATA if self._remaining else _TRAILER
        return newline + 1

    def _trailer(self, piece: bytes) -> None:
        position = 0
        while (newline := piece.find(b"\n", position)) >= 0:
            line = piece[position : newline + 1]
            position = newline + 1
            if line == b"\r\n":
                self.done, self.rest = True, piece[position:]
                return
            if not _FIELD_LINE.fullmatch(line) or _FRAMING_LINE.match(line):
                raise BadFraming("the trailer is not valid")
            self._trailer_bytes += len(line)
            if self._trailer_bytes > _MAX_TRAILER_BYTES:
                raise BadFraming("the trailer is too long")
        self._held = piece[position:]
        # One byte more, the CR of the empty line, so that the pieces a body comes in make no difference.
        if self._trailer_bytes + len(self._held) > _MAX_TRAILER_BYTES + 1:
            raise BadFraming("the trailer is too long")
