"""What the bench's load generator and responder say to each other, byte by byte."""

import json
import random
from itertools import islice

import msgspec
import pytest

from penstock.cli.bench.dechunk import MAX_HELD_BYTES, Dechunker, NotChunked
from penstock.cli.bench.shapes import BODY_BYTES, SHAPES
from penstock.cli.bench.wire import (
    DONE,
    EVENT_BYTES,
    NO_NONCE,
    SESSIONS,
    STAMP,
    STREAM_END,
    Requests,
    answer,
    answer_body,
    chunk,
    event,
    plan_in,
)

NONCE, STAMP_TEXT = b"0123456789abcdef", b"00000000075bcd15"


def requests(body_bytes: int = 1024, **options: int) -> list[tuple[bytes, bytes]]:
    return list(islice(Requests(random.Random(7), body_bytes, "x-more: 1\r\n", **options), 2 * SESSIONS))


def prompt(request: bytes) -> str:
    text = json.loads(request.partition(b"\r\n\r\n")[2])["messages"][0]["content"]
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("size", [1024, 16 * 1024])
def test_a_request_is_of_exactly_the_size_that_was_asked_for(size: int) -> None:
    head, _, body = requests(size)[0][0].partition(b"\r\n\r\n")
    assert len(body) == size
    assert head.endswith(b"\r\nx-more: 1\r\ncontent-length: %d" % size)


def test_the_order_is_found_in_the_body_as_it_is_and_as_another_gateway_may_write_it() -> None:
    request, nonce = requests(chunks=200, pace_ms=20)[0]
    body = request.partition(b"\r\n\r\n")[2]
    again = json.dumps(dict(sorted(json.loads(body).items())) | {"user": "someone"}, indent=1).encode()
    assert plan_in(body) == plan_in(again) == (nonce, 200, 20)
    assert plan_in(b'{"messages":[]}') == (NO_NONCE, 0, 0)


def test_no_two_requests_have_the_same_nonce_and_sessions_begin_alike() -> None:
    made = requests()
    assert len({nonce for _, nonce in made}) == len(made)
    first, again, other = prompt(made[0][0]), prompt(made[SESSIONS][0]), prompt(made[1][0])
    shared = next(at for at, (a, b) in enumerate(zip(first, again, strict=True)) if a != b)
    assert 0.5 < shared / len(first) < 0.7
    assert first[:32] != other[:32]


def test_only_a_request_for_chunks_asks_for_a_stream() -> None:
    assert b'"stream":true' in requests(chunks=1)[0][0]
    assert b"stream" not in requests()[0][0]


def test_an_answer_is_json_of_the_length_that_its_head_says() -> None:
    head, _, body = answer(NONCE).partition(b"\r\n\r\n")
    assert body == answer_body(NONCE)
    assert b"\r\ncontent-length: %d\r\n" % len(body) in head
    assert json.loads(body)["id"].endswith(NONCE.decode())


def test_every_event_has_one_length_and_its_stamp_in_one_place() -> None:
    made = event(NONCE, 999_999, STAMP_TEXT)
    assert len(made) == EVENT_BYTES
    assert made[STAMP] == STAMP_TEXT
    assert json.loads(made.removeprefix(b"data: "))["choices"][0]["delta"] == {"content": "token 999999"}


@pytest.mark.parametrize("step", [1, 2, 7, 100, 10_000])
def test_a_chunked_body_is_followed_in_any_pieces(step: int) -> None:
    body = b"".join(chunk(NONCE, number, STAMP_TEXT) for number in range(5)) + STREAM_END
    dechunker, payload = Dechunker(), b""
    for at in range(0, len(body), step):
        assert not dechunker.done
        payload += dechunker.feed(body[at : at + step])
    assert dechunker.done
    assert payload == b"".join(event(NONCE, number, STAMP_TEXT) for number in range(5)) + DONE


@pytest.mark.parametrize(
    "body",
    [
        b"5\r\nfour\r\n",
        b"3\r\nfour\r\n",
        b"x\r\nfour\r\n",
        b"\r\nfour\r\n",
        b"4\r\nfour\r\n0\r\n\r\nmore",
        b"0\r\n\r\n4\r\nfour\r\n",
        b"4" * (MAX_HELD_BYTES + 1),
    ],
)
def test_what_is_no_chunked_body_is_refused(body: bytes) -> None:
    with pytest.raises(NotChunked):
        Dechunker().feed(body)


def test_bytes_after_the_last_chunk_are_refused() -> None:
    dechunker = Dechunker()
    dechunker.feed(b"0\r\n\r\n")
    with pytest.raises(NotChunked):
        dechunker.feed(b"x")


@pytest.mark.parametrize("name", SHAPES)
def test_a_hostile_body_is_as_large_as_the_gateway_takes_and_closes_what_it_opens(name: str) -> None:
    body = SHAPES[name]()
    assert BODY_BYTES - 256 < len(body) <= BODY_BYTES
    assert body.startswith(b'{"model":"bench-model",')
    assert body.count(b"[") == body.count(b"]")
    assert body.count(b"{") == body.count(b"}")
    if name not in ("nested", "utf8"):
        assert msgspec.json.decode(body)["messages"]
