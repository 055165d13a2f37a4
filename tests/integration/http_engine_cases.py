"""How engines break HTTP, and what the gateway's client gets."""

from __future__ import annotations

from typing import NamedTuple

from integration.raw_http import Behaviour, ok

END = b"\r\n\r\n"
LINE = b"HTTP/1.1 200 OK\r\n"
TE = b"Transfer-Encoding: chunked" + END
SSE = LINE + b"Content-Type: text/event-stream\r\n"
EVENT = b"data: {}\n\n"
# What must never reach the client that comes next.
SMUGGLED = ok(b'{"nonce":"smuggled"}')


class EngineCase(NamedTuple):
    """`status` and `body` that the client gets, `code` if the error is the gateway's; `broken` if the
    response ends early, with the connection; `last` is what a broken stream's last event holds."""

    name: str
    behaviour: Behaviour
    status: int = 502
    code: str | None = "upstream_unreachable"
    body: bytes | None = None
    broken: bool = False
    last: bytes = b""


def refused(name: str, *pieces: bytes, close: bool = False) -> EngineCase:
    """Not HTTP, before anything was passed on: an error of the gateway."""
    return EngineCase(name, Behaviour(pieces, close))


def relayed(
    name: str,
    *pieces: bytes,
    body: bytes = b"{}",
    close: bool = False,
    status: int = 200,
    early: bool = False,
    afterwards: bytes = b"",
) -> EngineCase:
    """Passed on, as one whole response."""
    return EngineCase(name, Behaviour(pieces, close, early, afterwards), status, None, body)


def broken(name: str, *pieces: bytes, close: bool = False) -> EngineCase:
    """The head is passed on, then the connection ends."""
    return EngineCase(name, Behaviour(pieces, close), 200, None, broken=True)


def stream(
    name: str, *pieces: bytes, close: bool = False, last: bytes = b"upstream_unreachable"
) -> EngineCase:
    """A stream whose last event is the error."""
    return EngineCase(name, Behaviour(pieces, close), 200, None, last=last)


def sized(value: bytes, body: bytes = b"{}") -> bytes:
    """A response with this Content-Length."""
    return LINE + b"Content-Length:" + value + END + body


def field(line: bytes) -> bytes:
    """A response with this header line."""
    return ok(b"{}", line)


def status(line: bytes) -> bytes:
    """A response with this status line."""
    return line + b"\r\nContent-Length: 2" + END + b"{}"


HEADS = [
    refused("garbage", b"\x00\x01garbage" * 50 + END),
    refused("a hang-up without a word", close=True),
    refused("half a head", LINE + b"Content-", close=True),
    refused("headers without end", LINE + b"X-A: b\r\n" * 20_000),
    refused("a header too large", LINE + b"X-A: " + b"b" * 70_000 + END),
    refused("a status line too long", b"HTTP/1.1 200 " + b"x" * 70_000 + END),
    refused("HTTP/2.0", status(b"HTTP/2 200 OK")),
    refused("HTTP/0.9", b"{}", close=True),
    refused("ICY", status(b"ICY 200 OK")),
    refused("status of two digits", status(b"HTTP/1.1 20 OK")),
    refused("status of four digits", status(b"HTTP/1.1 2000 OK")),
    refused("status 600", status(b"HTTP/1.1 600 Odd")),
    refused("status 099", status(b"HTTP/1.1 099 Odd")),
    refused("status negative", status(b"HTTP/1.1 -20 Odd")),
    refused("lower-case version", status(b"http/1.1 200 OK")),
    refused("NUL in the reason", status(b"HTTP/1.1 200 O\0K")),
    refused("CR in the reason", status(b"HTTP/1.1 200 O\rK")),
    refused("an empty line first", b"\r\n" + ok(b"{}")),
    refused("bare LF lines", ok(b"{}").replace(b"\r\n", b"\n"), close=True),
    refused("obs-fold", field(b"X-A: b\r\n c")),
    refused("bare LF in a value", field(b"X-A: b\nSet-Cookie: c")),
    refused("bare CR in a value", field(b"X-A: b\rSet-Cookie: c")),
    refused("NUL in a value", field(b"X-A: \0")),
    refused("space before the colon", field(b"X-A : b")),
    refused("name empty", field(b": b")),
    refused("no colon", field(b"nonsense")),
    refused("a request", b"GET / HTTP/1.1\r\nHost: x" + END),
]
FRAMING = [
    refused("two lengths, different", LINE + b"Content-Length: 2\r\nContent-Length: 3" + END + b"{}"),
    refused("two lengths, equal", LINE + b"Content-Length: 2\r\nContent-Length: 2" + END + b"{}"),
    refused("length as a list", sized(b" 2, 2")),
    refused("length negative", sized(b" -2")),
    refused("length with plus", sized(b" +2")),
    refused("length hexadecimal", sized(b" 0x2")),
    refused("length empty", sized(b"")),
    refused("length of forty digits", sized(b"9" * 40)),
    refused("length and chunked", LINE + b"Content-Length: 2\r\n" + TE + b"2\r\n{}\r\n0" + END),
    refused("coding gzip", LINE + b"Transfer-Encoding: gzip" + END + b"{}"),
    refused("coding identity", LINE + b"Transfer-Encoding: identity" + END + b"{}"),
    refused("coding chunked, chunked", LINE + b"Transfer-Encoding: chunked, chunked" + END + b"0" + END),
    refused("coding xchunked", LINE + b"Transfer-Encoding: xchunked" + END + b"0" + END),
    broken("body shorter than its length", sized(b" 9"), close=True),
    broken("chunk size not a number", LINE + TE + b"zz\r\n"),
    broken("chunk size negative", LINE + TE + b"-1\r\n"),
    broken("chunk size beyond 64 bits", LINE + TE + b"f" * 17 + b"\r\n"),
    broken("chunk size line too long", LINE + TE + b"1;" + b"x" * 300),
    broken("chunk longer than its size", LINE + TE + b"1\r\n{}\r\n"),
    broken("chunk ended by LF", LINE + TE + b"2\n{}\n0\n\n"),
    broken("chunks without the last", LINE + TE + b"2\r\n{}\r\n", close=True),
    broken("half a chunk", LINE + TE + b"9\r\n{}", close=True),
    broken("trailer that is no header", LINE + TE + b"2\r\n{}\r\n0\r\nnonsense" + END),
    broken("trailer with a length", LINE + TE + b"2\r\n{}\r\n0\r\nContent-Length: 2" + END),
    broken("trailer without end", LINE + TE + b"2\r\n{}\r\n0\r\n" + b"a: b\r\n" * 3000),
    relayed("chunks with extensions and a trailer", LINE + TE + b"02;a=b\r\n{}\r\n0\r\nA: b" + END),
    relayed("length with leading zeros", sized(b" 0002")),
    relayed("length of zero", sized(b" 0", b""), body=b""),
    relayed("no body but chunks", LINE + TE + b"0" + END, body=b""),
    relayed("byte by byte", *(bytes([byte]) for byte in ok(b"{}"))),
    relayed("chunks byte by byte", *(bytes([byte]) for byte in LINE + TE + b"2\r\n{}\r\n0" + END)),
    relayed("chunks of one byte", LINE + TE + b"1\r\nx\r\n" * 50_000 + b"0" + END, body=b"x" * 50_000),
    relayed("no length, until the end", LINE + END[2:] + b"{}", close=True),
    relayed("HTTP/1.0, until the end", b"HTTP/1.0 200 OK" + END + b"{}", close=True),
    relayed("connection close with a length", field(b"Connection: close"), close=True),
    relayed("connection close, kept open", field(b"Connection: close")),
    relayed("no reason", status(b"HTTP/1.1 200")),
    relayed("204 with a body", status(b"HTTP/1.1 204 No Content"), status=204, body=b""),
    relayed("204 in chunks", b"HTTP/1.1 204 No\r\n" + TE + b"2\r\n{}\r\n0" + END, status=204, body=b""),
    relayed(
        "304 with a length, as for HEAD", b"HTTP/1.1 304 No\r\nContent-Length: 9" + END, status=304, body=b""
    ),
    relayed("an error of its own", ok(b"{}").replace(b"200 OK", b"418 Teapot"), status=418),
    relayed("a redirect", ok(b"{}", b"Location: http://x/").replace(b"200 OK", b"302 Found"), status=302),
]
INTERIM = [
    relayed("100 first", b"HTTP/1.1 100 Continue" + END + ok(b"{}")),
    relayed("103 with headers", b"HTTP/1.1 103 Early Hints\r\nLink: x" + END, ok(b"{}")),
    refused("101", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x" + END + b"whatever"),
    refused("a flood of 100", b"HTTP/1.1 100 Continue" + (END + b"HTTP/1.1 100 Continue") * 100_000),
    refused("100 and a hang-up", b"HTTP/1.1 100 Continue" + END, close=True),
    refused(
        "100 with a length and a body", b"HTTP/1.1 100 Continue\r\nContent-Length: 2" + END + b"{}" + ok(b"")
    ),
]
SMUGGLING = [
    relayed("a second response in one write", ok(b"{}") + SMUGGLED),
    relayed("a second response behind chunks", LINE + TE + b"2\r\n{}\r\n0" + END + SMUGGLED),
    relayed("a second response behind 204", b"HTTP/1.1 204 No" + END + SMUGGLED, status=204, body=b""),
    relayed("a second response behind 304", b"HTTP/1.1 304 No" + END + SMUGGLED, status=304, body=b""),
    relayed("a second response later", ok(b"{}"), afterwards=SMUGGLED),
    relayed("half a second response", ok(b"{}") + SMUGGLED[:30]),
    relayed("a body longer than its length", sized(b" 2", b"{}{}")),
    relayed("a CRLF too many", ok(b"{}") + b"\r\n"),
    relayed("an answer before the request's body", ok(b"{}"), early=True, close=True),
    relayed("headers that are the gateway's", ok(b"{}", b"X-Request-Id: forged", b"Target-Pod-Ip: forged")),
    relayed(
        "hop-by-hop headers", ok(b"{}", b"Connection: x-secret", b"X-Secret: forged", b"Keep-Alive: forged")
    ),
    relayed("the framing named as hop-by-hop", field(b"Connection: content-length")),
]
STREAMS = [
    stream("a stream that ends early", SSE + TE + b"a\r\n" + EVENT + b"\r\n", close=True),
    stream("a stream that breaks its framing", SSE + TE + b"a\r\n" + EVENT + b"\r\n", b"zz\r\n"),
    stream("a stream that falls silent", SSE + TE + b"a\r\n" + EVENT + b"\r\n", last=b"upstream_timeout"),
    broken("a stream that ends within an event", SSE + TE + b"5\r\ndata:\r\n", close=True),
    broken("a stream that ends within a chunk", SSE + TE + b"a\r\ndata:", close=True),
    broken("a compressed stream that ends early", SSE + b"Content-Encoding: gzip\r\n" + TE, close=True),
]
TIMEOUTS = [
    EngineCase("silence", Behaviour(()), 504, "upstream_timeout"),
    EngineCase("half a head and silence", Behaviour((LINE,)), 504, "upstream_timeout"),
    EngineCase(
        "interim responses and silence", Behaviour((b"HTTP/1.1 100 C" + END,)), 504, "upstream_timeout"
    ),
    broken("half a body and silence", sized(b" 9")),
    broken("half a chunk and silence", LINE + TE + b"9\r\n{}"),
]
ENGINE_CASES = [*HEADS, *FRAMING, *INTERIM, *SMUGGLING, *STREAMS]
