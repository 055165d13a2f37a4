"""The usage chunk is taken out of streams, however they are cut, and nothing else is."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.ingress.chunked_body import ChunkedBody
from penstock.ingress.openai import asking_usage
from penstock.ingress.usage_filter import MAX_HELD_BYTES, UsageFilter

TOKEN = b'data: {"choices":[{"delta":{"content":"\\"usage\\" data:"}}],"usage":null}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def payload(wire: bytes) -> bytes:
    body = ChunkedBody(collect=True)
    body.feed(wire)
    assert body.done
    return bytes(body.data)


@given(cuts=st.lists(st.integers(0, 400), max_size=8), crlf=st.booleans())
def test_however_it_is_cut(cuts: list[int], crlf: bool) -> None:
    stream = b": hello\n\n" + TOKEN + TOKEN + USAGE + DONE
    if crlf:
        stream = stream.replace(b"\n", b"\r\n")
    wire = b"".join(chunked(stream[i : i + 50]) for i in range(0, len(stream), 50)) + b"0\r\n\r\n"
    edges = [0, *sorted(min(cut, len(wire)) for cut in cuts), len(wire)]
    usage_filter = UsageFilter(hide=True, chunked_in=True, chunked_out=True)
    out = b"".join(usage_filter.feed(wire[a:b]) for a, b in pairwise(edges))
    shown = payload(out + usage_filter.end())
    assert shown == stream.replace(b"\r\n", b"\n").replace(USAGE, b"").replace(
        b"\n", b"\r\n" if crlf else b"\n"
    )
    assert b'"prompt_tokens":3' in usage_filter.hidden


def test_what_only_looks_like_a_usage_chunk_passes() -> None:
    stream = b"".join(
        (
            b'data: {"choices":[],"usage":null}\n\n',
            b'data: {"choices":[{"delta":{}}],"usage":{"prompt_tokens":3}}\n\n',
            b'data: {"choices":[],"usage":{"prompt_tokens":3}\n\n',
            b'data: "usage"\n\n',
            b'event: "usage"\n\n',
            b'data: {"usage":{"prompt_tokens":3}}\n\n',
            b'data: \xff"usage"\n\n',
            b"data: " + b"[" * 5000 + b'"usage"\n\n',
            b"no end",
        )
    )
    usage_filter = UsageFilter(hide=True, chunked_in=False, chunked_out=False)
    assert usage_filter.feed(stream) + usage_filter.end() == stream


def test_an_event_without_end_is_not_kept_for_ever() -> None:
    usage_filter = UsageFilter(hide=True, chunked_in=False, chunked_out=False)
    piece = b"x" * 1000
    held = sent = 0
    for _ in range(100):
        held += len(piece)
        sent += len(usage_filter.feed(piece))
        assert held - sent <= MAX_HELD_BYTES
    assert sent + len(usage_filter.end()) == held


def test_events_are_counted() -> None:
    for hide in (True, False):
        usage_filter = UsageFilter(hide=hide, chunked_in=False, chunked_out=False)
        usage_filter.feed(b"data: 1\n\ndata: 2\n\n")
        usage_filter.feed(USAGE)
        assert usage_filter.events == (2 if hide else 3)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"m","stream":true}',
        b' \n{"model":"m","stream_options":{"include_usage":false,"x":[1]}}',
        b'{"model":"m","stream_options":null}',
        b'{"model":"m","stream_options":{}}',
        b'{"model":"m","messages":[{"content":"\\"stream_options\\":"}]}',
        b'{"model":"m","messages":[{"stream_options":1}]}',
    ],
)
def test_a_body_that_does_not_ask_is_made_to(body: bytes) -> None:
    for given_body in (body, bytearray(body)):
        asking = asking_usage(given_body)
        assert asking is not None
        before, after = json.loads(body), json.loads(asking)
        assert after.pop("stream_options")["include_usage"] is True
        before.pop("stream_options", None)
        assert after == before


@pytest.mark.parametrize("options", [b'{"include_usage":true}', b"7", b'"text"', b"[]"])
def test_a_body_that_asks_or_is_wrong_stays(options: bytes) -> None:
    assert asking_usage(b'{"model":"m","stream_options":%b}' % options) is None
