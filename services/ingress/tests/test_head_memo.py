"""A remembered head reads as if it were parsed anew, whatever came before it on the connection."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.ingress.http_wire import (
    BadFraming,
    HeadMemo,
    RequestHead,
    ResponseHead,
    parse_request,
    parse_response,
)

REQUEST_LINES = [
    b"POST /v1/completions HTTP/1.1\r\nhost: g\r\n",
    b"POST /v1/completions HTTP/1.0\r\nhost: g\r\n",
]
STATUS_LINES = [
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 204 No Content\r\n",
    b"HTTP/1.1 304\r\n",
    b"HTTP/1.0 500 x\r\n",
]
FIELDS = [
    b"content-length: 5\r\n",
    b"content-length: 0\r\n",
    b"Content-Length: 71\r\n",
    b"Content-Length: 123456789012345678\r\n",
    b"Content-Length: 1234567890123456789\r\n",
    b"content-length:  5\r\n",
    b"content-length: 5 \r\n",
    b"content-length: +5\r\n",
    b"content-length: \r\n",
    b"CONTENT-LENGTH: 9\r\n",
    b"x-content-length: 5\r\n",
    b"transfer-encoding: chunked\r\n",
    b"connection: close\r\n",
    b"connection: x-a\r\n",
    b"x-a: 1\r\n",
    b"x-a: 2\r\n",
    b"x-a: " + b"a" * 5000 + b"\r\n",
    b"content-type: text/event-stream\r\n",
    b"content-encoding: gzip\r\n",
    b"x-session-id: s\r\n",
    b"bad field\r\n",
]


def seen(parse: Callable[[bytes], RequestHead | ResponseHead], head: bytes) -> dict[str, object] | None:
    """Every attribute of a head; None if it is refused."""
    try:
        parsed = parse(head)
    except BadFraming:
        return None
    return {name: getattr(parsed, name) for name in type(parsed).__slots__}


def heads(starts: list[bytes]) -> st.SearchStrategy[list[bytes]]:
    one = st.tuples(st.sampled_from(starts), st.lists(st.sampled_from(FIELDS), max_size=4))
    return st.lists(one.map(lambda parts: parts[0] + b"".join(parts[1])), min_size=1, max_size=6)


@given(heads(REQUEST_LINES))
def test_requests_of_a_connection_read_as_if_each_were_the_first(sent: list[bytes]) -> None:
    memo = HeadMemo(parse_request)
    for head in sent:
        assert seen(memo.parse, head) == seen(parse_request, head)


@given(heads(STATUS_LINES))
def test_responses_of_a_connection_read_as_if_each_were_the_first(sent: list[bytes]) -> None:
    memo = HeadMemo(parse_response)
    for head in sent:
        assert seen(memo.parse, head) == seen(parse_response, head)


@pytest.mark.parametrize("spelling", [b"content-length", b"Content-Length"])
def test_a_head_that_differs_in_its_length_alone_is_not_parsed_again(spelling: bytes) -> None:
    parsed: list[bytes] = []

    def parse(head: bytes) -> RequestHead:
        parsed.append(head)
        return parse_request(head)

    memo = HeadMemo(parse)
    lengths = [
        memo.parse(REQUEST_LINES[0] + spelling + b": %d\r\nx-a: 1\r\n" % n).length for n in (5, 70, 123)
    ]
    assert lengths == [5, 70, 123]
    assert len(parsed) == 1


def test_a_long_head_is_not_kept() -> None:
    parsed: list[bytes] = []

    def parse(head: bytes) -> RequestHead:
        parsed.append(head)
        return parse_request(head)

    memo, head = HeadMemo(parse), REQUEST_LINES[0] + FIELDS[16]
    assert memo.parse(head).block == memo.parse(head).block
    assert len(parsed) == 2
