"""Who is traced, what is read of clients' headers, and bounds of what waits."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.codec import DecodeError, decode, encode
from penstock.common.telemetry import Metrics
from penstock.common.tracing import Context, Ids, Sampler, Span, Spans, read_traceparent, unpack

TRACE = bytes.fromhex("0af7651916cd43dd8448eb211c80319c")
HEADER = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
CONTEXT = Context(TRACE, 0xB7AD6B7169203331)


def sampler(ratio: float, inbound_per_s: float = 0, seed: int = 1) -> Sampler:
    return Sampler(ratio, inbound_per_s, random.Random(seed).random, lambda: now[0])


now = [0.0]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (HEADER, (CONTEXT, True)),
        (HEADER[:-1] + b"0", (CONTEXT, False)),
        # Other flags say nothing to us; a later version may be longer.
        (HEADER[:-2] + b"03", (CONTEXT, True)),
        (b"cc" + HEADER[2:] + b"-what-comes", (CONTEXT, True)),
        (HEADER + b"-more", None),
        (b"ff" + HEADER[2:], None),
        (HEADER.upper(), None),
        (HEADER[:-1], None),
        (b"00-" + b"0" * 32 + HEADER[35:], None),
        (HEADER[:36] + b"0" * 16 + b"-01", None),
        (b"", None),
        (b"00-" + b"g" * 32 + HEADER[35:], None),
        (HEADER + b"\x00", None),
        (b"cc" + HEADER[2:] + b"-" + b"x" * 100_000, (CONTEXT, True)),
    ],
)
def test_a_clients_header_is_read_by_the_letter(header: bytes, expected: tuple[Context, bool] | None) -> None:
    assert read_traceparent(header) == expected


@given(st.binary(max_size=80))
def test_any_header_is_read_or_is_none(header: bytes) -> None:
    read = read_traceparent(header)
    if read is not None:
        assert read_traceparent(read[0].traceparent()) == (read[0], True)


@given(st.binary(min_size=16, max_size=16), st.integers(min_value=1, max_value=2**64 - 1))
def test_a_context_comes_out_of_the_message_as_it_went_in(trace_id: bytes, span_id: int) -> None:
    context = Context(trace_id, span_id)
    assert unpack(context.pack()) == (context if any(trace_id) else None)


@pytest.mark.parametrize(
    "packed", [b"", b"\x01" * 23, b"\x01" * 25, TRACE + bytes(8), bytes(16) + b"\x01" * 8]
)
def test_what_is_no_context_is_none(packed: bytes) -> None:
    assert unpack(packed) is None


@pytest.mark.parametrize("ratio", [0.01, 0.2, 0.9])
def test_about_as_many_are_sampled_as_asked_for(ratio: float) -> None:
    one = sampler(ratio)
    gaps = [one.gap() for _ in range(2000)]
    assert min(gaps) >= 1
    assert 0.9 / ratio < sum(gaps) / len(gaps) < 1.1 / ratio


def test_none_and_all() -> None:
    assert sampler(0).gap() == float("inf")
    assert {sampler(1).gap() for _ in range(10)} == {1}


def test_a_clients_trace_is_continued_within_limits() -> None:
    one = sampler(0, inbound_per_s=2)
    assert [one.continues(HEADER) for _ in range(3)] == [(True, CONTEXT), (True, CONTEXT), (None, CONTEXT)]
    now[0] += 0.5
    assert [one.continues(HEADER)[0] for _ in range(2)] == [True, None]
    now[0] += 3600
    # What was not used is not saved up.
    assert [one.continues(HEADER)[0] for _ in range(3)] == [True, True, None]
    assert one.continues(HEADER[:-1] + b"0") == (False, None)


def test_chance_decides_where_there_is_nothing_to_continue() -> None:
    assert sampler(0, 0).continues(HEADER) == (None, CONTEXT)
    assert sampler(1, 5).continues(b"nonsense") == (None, None)
    # Not sampled by its client: not by us either.
    assert sampler(1, 5).continues(HEADER[:-1] + b"0") == (False, None)


def span(number: int = 1) -> Span:
    return Span("a", "client", TRACE, number, 0, 1, 2, {"text": "x", "number": 1, "share": 0.5, "yes": True})


def test_more_spans_than_may_wait_are_dropped_and_counted() -> None:
    metrics = Metrics()
    spans = Spans(metrics, most=2)
    for number in range(1, 4):
        spans.add(span(number))
    assert [one.span_id for one in spans.take(10)] == [1, 2]
    assert spans.take(10) == []
    (family,) = metrics.snapshot()
    assert {s.labels[0]: s.value for s in family.samples} == {"ended": 3, "dropped": 1}


def test_spans_cross_the_channel_of_a_worker() -> None:
    sent = span(2**64 - 1)
    assert decode(Span, encode(sent)) == sent
    with pytest.raises(DecodeError):
        decode(Span, encode(Span("a", "else", TRACE, 1, 0, 1)))  # type: ignore[arg-type]  # what it is about


def test_ids_are_never_zero_and_do_not_repeat() -> None:
    ids = Ids()
    assert len({ids.trace() for _ in range(1000)}) == 1000
    assert 0 not in {ids.span() for _ in range(1000)}
