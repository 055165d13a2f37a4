"""Heads of requests and responses are accepted whole or refused, and stripped of what ends at this hop."""

from collections.abc import Callable

import pytest

from penstock.ingress.http_wire import (
    CHUNKED,
    UNTIL_CLOSE,
    BadFraming,
    RequestHead,
    ResponseHead,
    parse_request,
    parse_response,
)

POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\n"
OK = b"HTTP/1.1 200 OK\r\n"


def request(fields: bytes = b"", line: bytes = b"POST /v1/completions HTTP/1.1") -> RequestHead:
    return parse_request(line + b"\r\nhost: gateway\r\n" + fields)


# -- request heads -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        (b"", 0),
        (b"content-length: 0\r\n", 0),
        (b"content-length: 5\r\n", 5),
        (b"Content-Length:5\r\n", 5),
        (b"CONTENT-LENGTH: \t 5 \t\r\n", 5),
        (b"content-length: 000000000000000005\r\n", 5),
        (b"content-length: 999999999999999999\r\n", 10**18 - 1),
        (b"transfer-encoding: chunked\r\n", CHUNKED),
        (b"Transfer-Encoding:  Chunked \r\n", CHUNKED),
    ],
)
def test_the_length_of_a_request_is_read_from_its_one_framing_field(fields: bytes, length: int) -> None:
    assert request(fields).length == length


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(b"content-length: 5\r\ncontent-length: 5\r\n", id="equal lengths"),
        pytest.param(b"content-length: 5\r\nContent-Length: 6\r\n", id="different lengths"),
        pytest.param(b"content-length: 5,5\r\n", id="list"),
        pytest.param(b"content-length: +5\r\n", id="plus"),
        pytest.param(b"content-length: -5\r\n", id="minus"),
        pytest.param(b"content-length: 0x5\r\n", id="hexadecimal"),
        pytest.param(b"content-length: 5.0\r\n", id="fraction"),
        pytest.param(b"content-length: 1_0\r\n", id="underscore"),
        pytest.param(b"content-length: 5 5\r\n", id="inner space"),
        pytest.param("content-length: \u0665\r\n".encode(), id="Arabic digit"),
        pytest.param(b"content-length: \xb2\r\n", id="superscript digit"),
        pytest.param(b"content-length:\r\n", id="empty length"),
        pytest.param(b"content-length: 9999999999999999999\r\n", id="nineteen digits"),
        pytest.param(b"content-length: " + b"9" * 5000 + b"\r\n", id="five thousand digits"),
        pytest.param(b"content-length: 5\r\ntransfer-encoding: chunked\r\n", id="length, then coding"),
        pytest.param(b"transfer-encoding: chunked\r\ncontent-length: 5\r\n", id="coding, then length"),
        pytest.param(b"transfer-encoding: gzip, chunked\r\n", id="gzip, chunked"),
        pytest.param(b"transfer-encoding: chunked, gzip\r\n", id="chunked, gzip"),
        pytest.param(b"transfer-encoding: chunked, chunked\r\n", id="chunked, chunked"),
        pytest.param(b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", id="chunked twice"),
        pytest.param(b"transfer-encoding: identity\r\n", id="identity"),
        pytest.param(b"transfer-encoding: xchunked\r\n", id="xchunked"),
        pytest.param(b"transfer-encoding: \x0bchunked\r\n", id="vertical tab"),
        pytest.param(b"transfer-encoding: chunked;q=1\r\n", id="parameter"),
        pytest.param(b"transfer-encoding:\r\n", id="empty coding"),
    ],
)
def test_a_request_whose_body_could_end_in_two_places_is_refused(fields: bytes) -> None:
    with pytest.raises(BadFraming):
        request(fields)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(POST + b"a: b\r\n c\r\n", id="obsolete folding"),
        pytest.param(POST + b"a: b\r\n\tc\r\n", id="obsolete folding by tab"),
        pytest.param(POST + b" a: b\r\n", id="space before the first name"),
        pytest.param(POST + b"a : b\r\n", id="space before the colon"),
        pytest.param(POST + b"a\t: b\r\n", id="tab before the colon"),
        pytest.param(POST + b"a: b\n", id="bare LF at the end"),
        pytest.param(POST + b"a: b\nc: d\r\n", id="bare LF"),
        pytest.param(POST + b"a: b\rc: d\r\n", id="bare CR"),
        pytest.param(POST + b"a: b\r\r\n", id="CR CR LF"),
        pytest.param(POST + b"a: b\0c\r\n", id="NUL in a value"),
        pytest.param(POST + b"a\0: b\r\n", id="NUL in a name"),
        pytest.param(POST + b"a: b\x7f\r\n", id="DEL in a value"),
        pytest.param(POST + b"a: b\x0b\r\n", id="vertical tab in a value"),
        pytest.param(POST + b": b\r\n", id="empty name"),
        pytest.param(POST + b"a b: c\r\n", id="space in a name"),
        pytest.param(POST + b"a(: b\r\n", id="parenthesis in a name"),
        pytest.param(POST + b"n\xc3\xa4me: b\r\n", id="letters beyond ASCII in a name"),
        pytest.param(POST + b"no colon\r\n", id="no colon"),
        pytest.param(POST + b"\r\n", id="empty line inside"),
        pytest.param(POST[:-2], id="last line not ended"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"\r\n", id="an empty line"),
        pytest.param(b"POST / HTTP/1.1\r\n", id="no Host"),
        pytest.param(POST + b"Host: gateway\r\n", id="two Hosts"),
        pytest.param(POST + b"host: evil\r\n", id="two different Hosts"),
        pytest.param(b"PRI * HTTP/2.0\r\n", id="HTTP/2 preface"),
        pytest.param(b"POST / HTTP/1.2\r\nhost: a\r\n", id="HTTP/1.2"),
        pytest.param(b"POST / HTTP/1.10\r\nhost: a\r\n", id="HTTP/1.10"),
        pytest.param(b"POST / http/1.1\r\nhost: a\r\n", id="lower-case version"),
        pytest.param(b"POST / HTTP/0.9\r\nhost: a\r\n", id="HTTP/0.9"),
        pytest.param(b"GET /\r\n", id="no version"),
        pytest.param(b"POST  / HTTP/1.1\r\nhost: a\r\n", id="two spaces"),
        pytest.param(b"POST\t/\tHTTP/1.1\r\nhost: a\r\n", id="tabs"),
        pytest.param(b"POST / HTTP/1.1 \r\nhost: a\r\n", id="space after the version"),
        pytest.param(b" POST / HTTP/1.1\r\nhost: a\r\n", id="space before the method"),
        pytest.param(b"PO(T / HTTP/1.1\r\nhost: a\r\n", id="method that is no token"),
        pytest.param(b"POST /a b HTTP/1.1\r\nhost: a\r\n", id="space in the target"),
        pytest.param(b"POST /\x01 HTTP/1.1\r\nhost: a\r\n", id="control byte in the target"),
        pytest.param("POST /ä HTTP/1.1\r\nhost: a\r\n".encode(), id="letters beyond ASCII in the target"),
        pytest.param(b"POST / HTTP/1.0\r\ntransfer-encoding: chunked\r\n", id="chunked in HTTP/1.0"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\r\n", id="TLS hello"),
    ],
)
def test_a_request_head_that_is_not_strict_http_is_refused(head: bytes) -> None:
    with pytest.raises(BadFraming):
        parse_request(head)


def test_values_beyond_ascii_pass_as_they_are() -> None:
    line = "x-name: Zoë\tB".encode() + b"\xff"
    assert request(line + b"\r\n").block == line + b"\r\n"


@pytest.mark.parametrize(
    ("line", "origin_form", "path"),
    [
        (b"GET /v1/models HTTP/1.1", b"/v1/models", b"/v1/models"),
        (b"GET /v1/models?a=/b?c HTTP/1.1", b"/v1/models?a=/b?c", b"/v1/models"),
        (b"GET http://evil/v1/models?a=b HTTP/1.1", b"/v1/models?a=b", b"/v1/models"),
        (b"GET HTTP://evil HTTP/1.1", b"/", b"/"),
        (b"GET http://evil?/v1/models HTTP/1.1", b"/v1/models", b"/v1/models"),
        (b"OPTIONS * HTTP/1.1", b"/", b"/"),
        (b"CONNECT evil:443 HTTP/1.1", b"/", b"/"),
        (b"GET v1/models HTTP/1.1", b"/", b"/"),
        (b"GET //v1/models HTTP/1.1", b"//v1/models", b"//v1/models"),
    ],
)
def test_a_target_is_reduced_to_path_and_query(line: bytes, origin_form: bytes, path: bytes) -> None:
    head = request(line=line)
    assert (head.origin_form, head.path) == (origin_form, path)


def test_the_method_is_kept_as_it_came() -> None:
    assert request(line=b"post / HTTP/1.1").method == b"post"


@pytest.mark.parametrize(
    ("line", "fields", "keep_alive"),
    [
        (b"GET / HTTP/1.1", b"", True),
        (b"GET / HTTP/1.1", b"connection: keep-alive\r\n", True),
        (b"GET / HTTP/1.1", b"Connection: Close\r\n", False),
        (b"GET / HTTP/1.1", b"connection: x, close ,y\r\n", False),
        (b"GET / HTTP/1.1", b"connection: x\r\nconnection: close\r\n", False),
        (b"GET / HTTP/1.1", b"connection: closed\r\n", True),
        (b"GET / HTTP/1.0", b"", False),
        (b"GET / HTTP/1.0", b"connection: keep-alive\r\n", False),
    ],
)
def test_a_connection_is_kept_by_http_1_1_unless_it_says_close(
    line: bytes, fields: bytes, keep_alive: bool
) -> None:
    assert request(fields, line).keep_alive is keep_alive


def test_http_1_0_needs_no_host() -> None:
    assert parse_request(b"GET / HTTP/1.0\r\n").minor == 0


HOP_BY_HOP = (
    b"connection: x",
    b"Keep-Alive: timeout=5",
    b"proxy-connection: keep-alive",
    b"proxy-authenticate: Basic",
    b"proxy-authorization: Basic eA==",
    b"te: trailers",
    b"trailer: x",
    b"upgrade: h2c",
    b"content-length: 3",
)
ROUTING = (
    b"target-pod: a",
    b"Target-Pod-IP: a",
    b"prefill-target-pod: a",
    b"prefill-target-pod-ip: a",
    b"X-Request-ID: a",
)
REQUEST_ONLY = (b"expect: 100-continue", b"http2-settings: AAMAAABkAAQCAAAAAAIAAAAA")


@pytest.mark.parametrize("line", HOP_BY_HOP + ROUTING + REQUEST_ONLY)
def test_what_ends_at_this_hop_or_names_a_target_is_not_passed_to_an_instance(line: bytes) -> None:
    head = request(b"accept: */*\r\n" + line + b"\r\nAuthorization: Bearer k\r\n")
    assert head.block == b"accept: */*\r\nAuthorization: Bearer k\r\n"


@pytest.mark.parametrize(("parse", "start"), [(parse_request, POST), (parse_response, OK)])
def test_fields_that_connection_names_end_at_this_hop(
    parse: Callable[[bytes], RequestHead | ResponseHead], start: bytes
) -> None:
    fields = b"connection: Secret, x-a\r\nsecret: 1\r\nX-A: 2\r\nx-b: 3\r\nconnection: x-c\r\nX-C: 4\r\n"
    assert parse(start + fields).block == b"x-b: 3\r\n"


def test_headers_that_the_ingress_reads_are_found_in_any_case() -> None:
    head = request(b"X-Session-ID:  s 1 \r\nRouting-Strategy: random\r\nuser: \xff\r\n")
    assert (head.header(b"x-session-id"), head.header(b"routing-strategy")) == ("s 1", "random")
    assert (head.header(b"user"), head.header(b"x-owned-by")) == ("\ufffd", "")


@pytest.mark.parametrize(
    "name",
    ["X-Owned-By", "x-engine", "X-INFERENCE-SERVER", "Routing-Strategy", "config-profile", "X-Priority"],
)
def test_what_steers_this_gateway_ends_here_and_who_asks_is_passed_on(name: str) -> None:
    kept = b"User: u\r\nx-session-id: s\r\n"
    head = request(b"User: u\r\n%b: 1\r\nx-session-id: s\r\n" % name.encode())
    assert (head.block, head.header(name.lower().encode()), head.wishes) == (kept, "1", None)


# -- response heads ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "status", "length", "keep_alive"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n", 200, 5, True),
        (b"HTTP/1.1 200\r\ncontent-length: 0\r\n", 200, 0, True),
        (b"HTTP/1.1 200 \r\nContent-Length: 5\r\nconnection: close\r\n", 200, 5, False),
        (b"HTTP/1.1 429 Too Many\r\ntransfer-encoding: Chunked\r\n", 429, CHUNKED, True),
        (b"HTTP/1.1 200 OK\r\n", 200, UNTIL_CLOSE, False),
        (b"HTTP/1.1 200 OK\r\nconnection: keep-alive\r\n", 200, UNTIL_CLOSE, False),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 5\r\nconnection: keep-alive\r\n", 200, 5, False),
        (b"HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n", 200, CHUNKED, False),
        (b"HTTP/1.1 204 No Content\r\n", 204, 0, True),
        (b"HTTP/1.1 304 Not Modified\r\n", 304, 0, True),
        (b"HTTP/1.1 100 Continue\r\n", 100, UNTIL_CLOSE, False),
        (b"HTTP/1.1 599 \xe4\xf6\r\ncontent-length: 1\r\n", 599, 1, True),
    ],
)
def test_a_response_head_says_how_its_body_ends(
    head: bytes, status: int, length: int, keep_alive: bool
) -> None:
    response = parse_response(head)
    assert (response.status, response.length, response.keep_alive) == (status, length, keep_alive)


@pytest.mark.parametrize("framing", [b"content-length: 5", b"transfer-encoding: chunked"])
@pytest.mark.parametrize("status", [b"204", b"304"])
def test_a_connection_is_not_kept_after_a_body_where_there_can_be_none(status: bytes, framing: bytes) -> None:
    response = parse_response(b"HTTP/1.1 " + status + b" x\r\n" + framing + b"\r\n")
    assert (response.length, response.keep_alive) == (0, False)


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(OK + b"a: b\r\n c\r\n", id="obsolete folding"),
        pytest.param(OK + b"a : b\r\n", id="space before the colon"),
        pytest.param(OK + b"a: b\nc: d\r\n", id="bare LF"),
        pytest.param(OK + b"a: b\0\r\n", id="NUL"),
        pytest.param(OK + b"a: b\rset-cookie: c\r\n", id="bare CR"),
        pytest.param(OK + b"content-length: 5\r\ncontent-length: 5\r\n", id="two lengths"),
        pytest.param(OK + b"content-length: 5,5\r\n", id="list of lengths"),
        pytest.param(OK + b"content-length: +5\r\n", id="plus"),
        pytest.param(OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n", id="length and coding"),
        pytest.param(OK + b"transfer-encoding: gzip, chunked\r\n", id="gzip, chunked"),
        pytest.param(OK + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", id="coding twice"),
        pytest.param(b"HTTP/1.1 200 O\0K\r\n", id="NUL in the reason"),
        pytest.param(b"HTTP/1.1 200 a\rb\r\n", id="CR in the reason"),
        pytest.param(b"HTTP/2.0 200 OK\r\n", id="HTTP/2.0"),
        pytest.param(b"HTTP/1.1 20 OK\r\n", id="two digits"),
        pytest.param(b"HTTP/1.1 2000 OK\r\n", id="four digits"),
        pytest.param(b"HTTP/1.1 600 OK\r\n", id="status over 599"),
        pytest.param(b"HTTP/1.1 099 OK\r\n", id="status under 100"),
        pytest.param(b"HTTP/1.1  200 OK\r\n", id="two spaces"),
        pytest.param(b"ICY 200 OK\r\n", id="another protocol"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_a_response_head_that_is_not_strict_http_is_refused(head: bytes) -> None:
    with pytest.raises(BadFraming):
        parse_response(head)


@pytest.mark.parametrize("line", [*HOP_BY_HOP, *ROUTING, b"Routing-Strategy: x"])
def test_what_an_instance_says_for_this_hop_or_about_routing_is_not_passed_to_clients(line: bytes) -> None:
    response = parse_response(OK + b"date: x\r\n" + line + b"\r\nServer: y\r\n")
    assert response.block == b"date: x\r\nServer: y\r\n"


@pytest.mark.parametrize(
    ("content_type", "event_stream"),
    [
        (b"text/event-stream", True),
        (b"Text/Event-Stream; charset=utf-8", True),
        (b"application/json", False),
    ],
)
def test_a_response_is_known_as_an_event_stream_in_any_case(content_type: bytes, event_stream: bool) -> None:
    assert parse_response(OK + b"Content-Type: " + content_type + b"\r\n").event_stream is event_stream
