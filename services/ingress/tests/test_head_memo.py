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


# By an instance: machine code has no __slots__.
NAMES = {
    type(head): [name for name in dir(head) if name[0] != "_" and not callable(getattr(head, name))]
    for head in (parse_request(b"GET / HTTP/1.1\r\nhost: g\r\n"), parse_response(b"HTTP/1.1 200\r\n"))
}


def seen(parse: Callable[[bytes], RequestHead | ResponseHead], head: bytes) -> dict[str, object] | None:
    """Every attribute of a head; None if it is refused."""
    try:
        parsed = parse(head)
    except BadFraming:
        return None
    return {name: getattr(parsed, name) for name in NAMES[type(parsed)]}


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


def whole_of(
    parse: Callable[[bytes], RequestHead | ResponseHead], data: bytes
) -> tuple[dict[str, object], bytes] | None:
    """Head and body of a message that has all its announced body and nothing else, parsed anew."""
    head, end, body = data.partition(b"\r\n\r\n")
    found = seen(parse, head + b"\r\n") if end else None
    if found is None or found.pop("length") != len(body) or not body:
        return None
    return found, body


MESSAGE = REQUEST_LINES[0] + b"content-length: 5\r\nx-a: 1\r\n\r\nabcde"
TWISTS: list[Callable[[bytes], bytes]] = [
    lambda data: data,
    lambda data: data[:-1],
    lambda data: data + b"f",
    lambda data: b"\r\n" + data,
    lambda data: data.replace(b": 5", b": 0005"),
    lambda data: data.replace(b": 5", b": 5 "),
    lambda data: data.replace(b": 5", b": +5"),
    lambda data: data.replace(b": 5\r\n", b": 5\n"),
    lambda data: data.replace(b": 5\r\n", b": 5\r\r\n"),
    lambda data: data.replace(b": 5", b": \xb2"),
    lambda data: data.replace(b": 5", b": 0000000000000000005"),
    lambda data: data.replace(b"\r\n\r\n", b"\r\nx: 1\r\n\r\n"),
    lambda data: data.replace(b"x-a: 1", b"x-a: 2"),
    lambda data: data.replace(b"5", b"12").replace(b"abcde", b"x" * 12),
    lambda data: data.replace(b"5", b"1").replace(b"abcde", b"\r"),
    lambda data: data + data,
]


@given(st.lists(st.sampled_from(TWISTS), max_size=8), st.lists(st.sampled_from(TWISTS), max_size=2))
def test_a_message_taken_in_one_piece_is_what_its_head_says(
    sent: list[Callable[[bytes], bytes]], twice: list[Callable[[bytes], bytes]]
) -> None:
    memo = HeadMemo(parse_request)
    memo.parse(MESSAGE.partition(b"\r\n\r\n")[0] + b"\r\n")
    for twist in sent:
        data = twist(MESSAGE)
        for further in twice:
            data = further(data)
        taken = memo.whole(data)
        if taken is None:
            continue
        head, body = taken
        shown = {name: getattr(head, name) for name in NAMES[RequestHead] if name != "length"}
        assert (shown, body) == whole_of(parse_request, data)


def test_a_message_like_the_last_one_is_taken_in_one_piece() -> None:
    memo = HeadMemo(parse_request)
    assert memo.whole(MESSAGE) is None
    memo.parse(MESSAGE.partition(b"\r\n\r\n")[0] + b"\r\n")
    for body in (b"abcde", b"x", b"y" * 1234):
        taken = memo.whole(MESSAGE.replace(b"5", b"%d" % len(body)).replace(b"abcde", body))
        assert taken is not None
        assert taken[1] == body


def test_a_head_that_could_become_too_long_is_not_remembered() -> None:
    head = MESSAGE.partition(b"\r\n\r\n")[0] + b"\r\n"
    memo = HeadMemo(parse_request, most_bytes=len(head) + 4)
    memo.parse(head)
    assert memo.whole(MESSAGE) is None
