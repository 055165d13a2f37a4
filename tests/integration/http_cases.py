"""What hostile and unusual clients send, and what they get."""

from __future__ import annotations

from typing import NamedTuple

from integration.raw_http import BODY, CHAT, chunk, chunked, request, sized

OK = (200,)
BAD = (400,)
GET = b"GET /v1/models HTTP/1.1"
MIB = 1024 * 1024


class Case(NamedTuple):
    """`sent` in one write each; `statuses` of the answers in turn; whether the connection serves on."""

    name: str
    sent: tuple[bytes, ...]
    statuses: tuple[int, ...]
    kept: bool = False
    code: str = "bad_framing"
    bodiless: bool = False


def good(name: str, *sent: bytes, statuses: tuple[int, ...] = OK) -> Case:
    """Answered, and the connection is kept."""
    return Case(name, sent, statuses, kept=True)


def bad(name: str, *sent: bytes, statuses: tuple[int, ...] = BAD) -> Case:
    """Refused as no HTTP, and the connection ends."""
    return Case(name, sent, statuses)


def body(name: str, content: bytes, *, status: int = 400, code: str = "invalid_request") -> Case:
    """A well framed body that is answered with an error; the connection is kept."""
    return Case(name, (sized(body=content),), (status,), kept=True, code=code)


def length(value: bytes, content: bytes = BODY) -> bytes:
    """A chat with this Content-Length."""
    return request(b"Content-Length:" + value, body=content)


def coding(*lines: bytes) -> bytes:
    """A chat in chunks under these lines."""
    return request(*lines, body=chunk() + b"0\r\n\r\n")


def trailer(block: bytes) -> bytes:
    """A chat in chunks with this trailer."""
    return chunked(chunk(), end=b"0\r\n" + block + b"\r\n")


def line(start: bytes) -> bytes:
    """A bodiless request with this request line."""
    return request(start=start, body=b"")


N = b"%d" % len(BODY)
LENGTHS = [
    good("length", sized()),
    good("length with leading zeros", length(b" 000" + N)),
    good("length without a space", length(N)),
    good("length between tabs", length(b"\t" + N + b"\t ")),
    good("length in two pieces", sized()[:-20], sized()[-20:]),
    good("length byte by byte", *(bytes([byte]) for byte in sized())),
    good("a body where none is needed", sized(start=b"GET /health HTTP/1.1", body=b"xyz")),
    bad("length twice, equal", request(b"Content-Length: " + N, b"Content-Length: " + N)),
    bad("length twice, different", request(b"Content-Length: " + N, b"Content-Length: 3")),
    bad("length as a list", length(b" " + N + b", " + N)),
    bad("length with plus", length(b" +" + N)),
    bad("length negative", length(b" -1")),
    bad("length hexadecimal", length(b" 0x10")),
    bad("length with an underscore", length(b" 1_0")),
    bad("length with a fraction", length(b" 10.0")),
    bad("length with an exponent", length(b" 1e2")),
    bad("length with a space inside", length(b" 1 0")),
    bad("length empty", length(b"")),
    bad("length in foreign digits", length(" ١٢".encode())),
    bad("length beyond any integer", length(b" " + b"9" * 40)),
    Case("length over the limit", (length(b" %d" % (4 * MIB + 1), b""),), (413,), code="request_too_large"),
    Case("length of eighteen digits", (length(b" " + b"9" * 18),), (413,), code="request_too_large"),
]
CODINGS = [
    good("chunked", chunked(chunk())),
    good("chunked, upper case", coding(b"TRANSFER-ENCODING: CHUNKED")),
    good("chunked byte by byte", *(bytes([byte]) for byte in chunked(chunk()))),
    good("chunks of one byte", chunked(*(chunk(bytes([byte])) for byte in BODY))),
    good("chunk sizes in upper case, zeros first", chunked(b"00%X\r\n%b\r\n" % (len(BODY), BODY))),
    good("chunk extension", chunked(chunk(extension=b';name="value";flag'))),
    good("trailer", trailer(b"X-Sum: 1\r\n")),
    good("trailer that looks like a header is dropped", trailer(b"Host: x\r\nX-Request-Id: x\r\n")),
    bad("trailer with a length", trailer(b"content-length: 3\r\n")),
    bad("trailer with a coding", trailer(b"Transfer-Encoding: chunked\r\n")),
    bad("length and chunked", coding(b"Content-Length: 5", b"Transfer-Encoding: chunked")),
    bad("chunked and length", coding(b"Transfer-Encoding: chunked", b"Content-Length: 5")),
    bad("coding gzip", coding(b"Transfer-Encoding: gzip")),
    bad("coding identity", coding(b"Transfer-Encoding: identity")),
    bad("coding gzip, chunked", coding(b"Transfer-Encoding: gzip, chunked")),
    bad("coding chunked, chunked", coding(b"Transfer-Encoding: chunked, chunked")),
    bad("coding chunked twice", coding(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked")),
    bad("coding chunked, identity", coding(b"Transfer-Encoding: chunked, identity")),
    bad("coding xchunked", coding(b"Transfer-Encoding: xchunked")),
    bad("coding with a parameter", coding(b"Transfer-Encoding: chunked;q=1")),
    bad("coding in quotes", coding(b'Transfer-Encoding: "chunked"')),
    bad("coding empty", coding(b"Transfer-Encoding:")),
    bad("coding after a vertical tab", coding(b"Transfer-Encoding: \x0bchunked")),
    bad("coding with a space before the colon", coding(b"Transfer-Encoding : chunked")),
    bad("coding folded", coding(b"Transfer-Encoding:\r\n chunked")),
    bad("chunked in HTTP/1.0", chunked(chunk()).replace(b"HTTP/1.1", b"HTTP/1.0")),
    bad("thousands of tiny chunks", chunked(*(chunk(b" ") for _ in range(5000)), chunk())),
    bad("chunk size negative", chunked(b"-1\r\nx\r\n")),
    bad("chunk size with plus", chunked(b"+1\r\nx\r\n")),
    bad("chunk size with 0x", chunked(b"0x1\r\nx\r\n")),
    bad("chunk size with a space first", chunked(b" 1\r\nx\r\n")),
    bad("chunk size empty", chunked(b"\r\nx\r\n")),
    bad("chunk size not a number", chunked(b"zz\r\nx\r\n")),
    bad("chunk size beyond 64 bits", chunked(b"f" * 17 + b"\r\nx\r\n")),
    bad("chunk size that wraps to one", chunked(b"1" + b"0" * 15 + b"1\r\nx\r\n")),
    bad("chunk extension without end", chunked(b"1;" + b"a" * 300)),
    bad("chunk extension with a bare CR", chunked(b"1;a\rb\r\nx\r\n")),
    bad("chunk size ended by LF", chunked(b"1\nx\r\n")),
    bad("chunk longer than its size", chunked(b"1\r\nxy\r\n")),
    bad("chunk without its CRLF", chunked(b"1\r\nx1\r\ny\r\n")),
    bad("chunk ended by LF", chunked(b"1\r\nx\n")),
    bad("chunk ended by CR and something", chunked(b"1\r\nx\rz")),
    bad("trailer without a colon", trailer(b"nonsense\r\n")),
    bad("trailer folded", trailer(b"a: b\r\n c\r\n")),
    bad("trailer ended by LF", trailer(b"a: b\n")),
    bad("trailer with NUL", trailer(b"a: \0\r\n")),
    bad("trailer too long", trailer(b"a: b\r\n" * 2000)),
    bad("trailer line too long", trailer(b"a: " + b"b" * 9000 + b"\r\n")),
    Case(
        "chunks over the limit",
        (chunked(*(chunk(b"x" * 65536) for _ in range(65))),),
        (413,),
        code="request_too_large",
    ),
]
FIELDS = [
    good("value empty", sized(b"X-Empty:")),
    good("value beyond ASCII", sized("X-Name: Zoë".encode(), b"X-Latin: \xe9")),
    good("two thousand headers", sized(*(b"X-%d: y" % n for n in range(2000)))),
    bad("obs-fold", sized(b"X-A: b\r\n c")),
    bad("obs-fold in the first field", request(b" X-A: b")),
    bad("bare LF between fields", sized(b"X-A: b\nX-C: d")),
    bad("bare CR in a value", sized(b"X-A: b\rX-C: d")),
    bad("NUL in a value", sized(b"X-A: b\0c")),
    bad("NUL in a name", sized(b"X-\0A: b")),
    bad("DEL in a value", sized(b"X-A: b\x7f")),
    bad("control byte in a value", sized(b"X-A: \x01")),
    bad("space before the colon", sized(b"X-A : b")),
    bad("tab before the colon", sized(b"X-A\t: b")),
    bad("name empty", sized(b": b")),
    bad("name with a slash", sized(b"X/A: b")),
    bad("name in brackets", sized(b"[X]: b")),
    bad("name beyond ASCII", sized("X-Zoë: b".encode())),
    bad("no colon", sized(b"nonsense")),
    bad("content type twice", sized(b"Content-Type: a/b", b"Content-Type: c/d")),
    Case("header too large", (sized(b"X-A: " + b"b" * 70_000),), (431,), code="headers_too_large"),
    Case("headers too many", (sized(*([b"X-A: b"] * 9000)),), (431,), code="headers_too_large"),
    Case(
        "target too long", (line(b"GET /" + b"a" * 70_000 + b" HTTP/1.1"),), (431,), code="headers_too_large"
    ),
    Case("headers without end", (b"X" * 70_000,), (431,), code="headers_too_large"),
    good("id kept", sized(b"X-Request-Id: abc")),
    good("id made if it is not sane", sized(b"X-Request-Id: a b<script>")),
    good("header that names a target is not passed on", sized(b"Target-Pod-Ip: 1.2.3.4:5")),
    Case(
        "strategy too long",
        (sized(b"Routing-Strategy: " + b"x" * 1000),),
        BAD,
        kept=True,
        code="invalid_request",
    ),
]
HOSTS = [
    bad("no host", sized(host=False)),
    bad("host twice", sized(b"Host: gateway")),
    bad("host twice, different", sized(b"Host: other")),
    good("host empty", sized(b"Host:", host=False)),
    good("host with a path is never used", sized(b"Host: gateway/admin", host=False)),
    Case("no host in HTTP/1.0", (sized(host=False).replace(b"/1.1", b"/1.0"),), OK),
]
LINES = [
    good("empty line first", b"\r\n" + sized()),
    good("a thousand empty lines first", b"\r\n" * 1000 + sized()),
    good("query", sized(start=CHAT.replace(b" HTTP", b"?a=b HTTP"))),
    good("absolute form", sized(start=b"POST http://other/v1/chat/completions HTTP/1.1")),
    Case("absolute form without a path", (line(b"GET http://gateway HTTP/1.1"),), (404,), True, "not_found"),
    Case("authority form", (line(b"GET gateway:80 HTTP/1.1"),), (404,), True, "not_found"),
    Case("connect", (line(b"CONNECT gateway:80 HTTP/1.1"),), (404,), True, "not_found"),
    Case("options of everything", (line(b"OPTIONS * HTTP/1.1"),), (404,), True, "not_found"),
    Case("dots are not resolved", (line(b"GET /x/../health HTTP/1.1"),), (404,), True, "not_found"),
    Case("escapes are not resolved", (line(b"GET /%68ealth HTTP/1.1"),), (404,), True, "not_found"),
    Case("double slash", (line(b"GET //health HTTP/1.1"),), (404,), True, "not_found"),
    Case("fragment", (sized(start=CHAT.replace(b" HTTP", b"#x HTTP")),), (404,), True, "not_found"),
    bad("LF first", b"\n" + sized()),
    bad("method not a token", line(b"GE(T / HTTP/1.1")),
    bad("no method", line(b" / HTTP/1.1")),
    bad("no version", line(b"GET /")),
    bad("no target", line(b"GET HTTP/1.1")),
    bad("HTTP/0.9", b"GET /\r\n\r\n"),
    bad("HTTP/1.2", line(b"GET / HTTP/1.2")),
    bad("HTTP/2.0", line(b"GET / HTTP/2.0")),
    bad("HTTP/1.10", line(b"GET / HTTP/1.10")),
    bad("http/1.1 in lower case", line(b"GET / http/1.1")),
    bad("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    bad("double space after the method", line(b"GET  / HTTP/1.1")),
    bad("double space before the version", line(b"GET /  HTTP/1.1")),
    bad("tabs between", line(b"GET\t/\tHTTP/1.1")),
    bad("space at the end", line(b"GET / HTTP/1.1 ")),
    bad("space in the target", line(b"GET /a b HTTP/1.1")),
    bad("NUL in the target", line(b"GET /\0 HTTP/1.1")),
    bad("target beyond ASCII", line("GET /é HTTP/1.1".encode())),
    bad("a line ended by LF", sized().replace(b"HTTP/1.1\r\n", b"HTTP/1.1\n")),
    bad("TLS hello", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"),
]
METHODS = [
    Case("head of models", (line(GET.replace(b"GET", b"HEAD")),), OK, True, bodiless=True),
    Case("head of a chat", (line(CHAT.replace(b"POST", b"HEAD")),), (405,), True, bodiless=True),
    *(
        Case(
            f"{method.decode()} of a chat", (sized(start=CHAT.replace(b"POST", method)),), (405,), True, code
        )
        for method in (b"GET", b"OPTIONS", b"PUT", b"DELETE", b"PATCH", b"TRACE", b"FROB", b"post")
        for code in ("method_not_allowed",)
    ),
    Case("post of models", (sized(start=GET.replace(b"GET", b"POST")),), (405,), True, "method_not_allowed"),
    Case("lower-case get", (line(GET.replace(b"GET", b"get")),), (405,), True, "method_not_allowed"),
    Case("unknown path", (line(b"GET /admin HTTP/1.1"),), (404,), True, "not_found"),
]
CONNECTIONS = [
    good("expect with the body at once", sized(b"Expect: 100-continue")),
    good("expect something else is ignored", sized(b"Expect: 200-maybe")),
    Case(
        "expect with a length over the limit",
        (request(b"Expect: 100-continue", b"Content-Length: 9999999", body=b""),),
        (413,),
        code="request_too_large",
    ),
    good("upgrade to h2c is ignored", sized(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c")),
    good("upgrade to websocket is ignored", sized(b"Connection: Upgrade", b"Upgrade: websocket")),
    *(
        good(f"connection names {name.decode()}", sized(b"Connection: " + name, b"Authorization: x"))
        for name in (
            b"content-length",
            b"host",
            b"authorization",
            b"transfer-encoding",
            b"x-foo, ,keep-alive",
        )
    ),
    Case("connection close", (sized(b"Connection: x, Close"),), OK),
    Case("HTTP/1.0", (sized().replace(b"/1.1", b"/1.0"),), OK),
    Case("HTTP/1.0 with keep-alive", (sized(b"Connection: keep-alive").replace(b"/1.1", b"/1.0"),), OK),
    good("pipelining", sized() + line(GET) + sized(), statuses=(200, 200, 200)),
    good("a hundred at once", line(GET) * 100, statuses=OK * 100),
    bad("the second is broken", sized() + b"nonsense\r\n\r\n", statuses=(200, 400)),
    bad("a body longer than its length", length(b" 5", b"hello" + BODY + b"\r\n\r\n"), statuses=(400, 400)),
    good("a request inside a body", sized(body=sized()), statuses=BAD)._replace(code="invalid_request"),
    Case("after close nothing is read", (sized(b"Connection: close") + sized(),), OK),
]
MODEL = b'"model":"sim-model",'
JSON = [
    body("empty", b""),
    body("whitespace only", b" \r\n\t "),
    body("not an object", b"[1]"),
    body("cut off", BODY[:-1]),
    body("trailing data", BODY + b"x"),
    body("two documents", BODY + BODY),
    body("byte order mark", b"\xef\xbb\xbf" + BODY),
    body("UTF-16", BODY.decode().encode("utf-16")),
    body("gzip", b"\x1f\x8b\x08\0\0\0\0\0\0\x03")._replace(
        sent=(sized(b"Content-Encoding: gzip", body=b"\x1f\x8b\x08\0\0\0\0\0\0\x03"),)
    ),
    body("nesting of 100,000", b'{"messages":' + b"[" * 100_000),
    body("nesting of 100,000 that closes", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"," + BODY[1:]),
    body("NaN", b"{" + MODEL + b'"max_tokens":NaN,"messages":[1]}'),
    body("NaN in the prompt", b"{" + MODEL + b'"messages":[NaN]}'),
    body("number beyond a float", b"{" + MODEL + b'"max_tokens":1e999,"messages":[1]}'),
    body("number of 100,000 digits", b"{" + MODEL + b'"max_tokens":' + b"9" * 100_000 + b',"messages":[1]}'),
    body("model with invalid UTF-8", b'{"model":"\xff","messages":[1]}'),
    body("model with a lone surrogate", b'{"model":"\\ud800","messages":[1]}'),
    body("model missing", b'{"messages":[1]}'),
    body("model no string", b'{"model":{"a":1},"messages":[1]}'),
    body("model too long", b'{"model":"' + b"x" * 1000 + b'","messages":[1]}'),
    body("messages missing", b'{"model":"sim-model"}'),
    body("messages no array", b"{" + MODEL + b'"messages":"x"}'),
    body("a key twice: the last counts", BODY[:-1] + b',"model":"x"}', status=404, code="model_not_found"),
    body("a key in escapes", BODY[:-1] + b',"mod\\u0065l":"x"}', status=404, code="model_not_found"),
    body("model with NUL", b'{"model":"a\\u0000b","messages":[1]}', status=404, code="model_not_found"),
    good("600,000 keys", sized(body=b'{"a":1' + b',"a":1' * 600_000 + b"," + BODY[1:])),
    good("negative max_tokens", sized(body=b"{" + MODEL + b'"max_tokens":-5,"messages":[1]}')),
    good("a prompt of 4 MiB", sized(body=b"{" + MODEL + b'"messages":["' + b"x" * (4 * MIB - 60) + b'"]}')),
]
AUDIO = b"POST /v1/audio/transcriptions HTTP/1.1"
PART = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nsim-model\r\n'


def form(name: str, content: bytes, kind: bytes = b"multipart/form-data; boundary=b") -> Case:
    """A form that is refused."""
    sent = sized(b"Content-Type: " + kind, start=AUDIO, body=content)
    return Case(name, (sent,), BAD, kept=True, code="invalid_request")


FORMS = [
    form("a form", PART + b"--b--\r\n")._replace(statuses=OK),
    form("form without a boundary", PART, b"multipart/form-data"),
    form("form that is JSON", BODY, b"application/json"),
    form("form without an end", b"--b\r\n"),
    form("form of delimiters only", b"--b\r\n" * 100_000),
    form("form with a model of 1 MiB", PART.replace(b"sim-model", b"x" * MIB) + b"--b--"),
    form("form with endless part headers", b"--b\r\n" + b"a: b\r\n" * 100_000),
    form("form with the model behind a thousand parts", PART.replace(b"model", b"x") * 1000 + PART),
    form("form with another boundary", PART, b"multipart/form-data; boundary=c"),
]
CASES = [*LENGTHS, *CODINGS, *FIELDS, *HOSTS, *LINES, *METHODS, *CONNECTIONS, *JSON, *FORMS]

# Nothing more follows: ended by the header timeout, or in silence by the idle timeout.
SLOW = [
    *(
        Case(name, sent, (408,), code="request_timeout")
        for name, *sent_ in (
            ("part of a request line", b"POS"),
            ("a head without its end", request(body=b"")[:-2]),
            ("HTTP/0.9 in one line", b"GET /\r\n"),
            ("half a body", sized()[:-9]),
            ("no body", request(b"Content-Length: 9", body=b"")),
            ("half a chunk", chunked(b"5\r\nab", end=b"")),
            ("half a chunk size", chunked(b"5", end=b"")),
            ("chunks without the last", chunked(chunk(), end=b"")),
            ("half a trailer", chunked(chunk(), end=b"0\r\na: b\r\n")),
        )
        for sent in (tuple(sent_),)
    ),
    Case("half a request behind a whole one", (sized(), b"GET / HT"), (200, 408), code="request_timeout"),
    Case("silence", (), ()),
    Case("an empty line", (b"\r\n",), ()),
    Case("silence after an answer", (sized(),), OK),
]
