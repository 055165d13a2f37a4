"""Names on the bus: any text becomes one legal token, and every subject carries its message."""

from __future__ import annotations

import re

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.common.codec import encode
from penstock.common.messages import MAX_BATCH, MAX_BLOCKS, ScheduleBatch, ScheduleRequest
from penstock.common.subjects import (
    BUCKETS,
    COUNTERS,
    EVENTS,
    MIRROR,
    PLACED,
    SCHEDULE,
    SCHEDULE_BY,
    STREAMS,
    SUBJECTS,
    Subject,
    event_filter,
    event_subject,
    token,
)

# What a NATS key may hold, less "." and "/": a token is one part of a key and of a subject.
LEGAL = re.compile(r"[-_=A-Za-z0-9]{1,128}")

TEXTS = st.text() | st.text(alphabet="=AB0.*> /", max_size=8) | st.text(min_size=100, max_size=400)


@given(TEXTS)
@example("")
@example("meta-llama/Llama-3.1-8B-Instruct")
@example("*")
@example(">")
@example("a.b c\r\n\0")
@example("🦙" * 200)
@example("\ud800")
def test_any_text_becomes_one_legal_token(text: str) -> None:
    assert LEGAL.fullmatch(token(text))


@given(TEXTS, TEXTS)
@example("\ud800", "?")
@example("=2F", "/")
@example("", "=")
@example("a" * 200, "a" * 201)
@example("é" * 60 + "x", "é" * 60 + "y")
def test_different_texts_have_different_tokens(one: str, other: str) -> None:
    assert (token(one) == token(other)) == (one == other)


@given(st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True))
def test_a_plain_name_stays_readable(name: str) -> None:
    assert token(name) == name


@pytest.mark.parametrize(
    ("text", "expected"),
    [("model/a", "model=2Fa"), ("", "="), ("=", "=3D"), ("v1.2", "v1=2E2"), ("ü", "=C3=BC")],
)
def test_other_bytes_are_escaped(text: str, expected: str) -> None:
    assert token(text) == expected


def test_a_long_name_is_cut_and_stays_distinct() -> None:
    tokens = {token("x" * 127 + "/" + str(n)) for n in range(1000)}
    assert len(tokens) == 1000
    assert {t[:100] for t in tokens} == {"x" * 100}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.pattern)
def test_a_name_fits_its_pattern_and_takes_as_many_tokens(subject: Subject[msgspec.Struct]) -> None:
    stars = subject.pattern.count("*")
    name = subject.name(*["a.b*"] * stars)
    assert re.fullmatch(subject.pattern.replace(".", r"\.").replace("*", r"[^.*> ]+"), name)
    for wrong in {stars - 1, stars + 1} - {-1}:
        with pytest.raises(ValueError, match="tokens"):
            subject.name(*["a"] * wrong)


def test_every_subject_carries_one_kind_of_message_within_a_bound() -> None:
    assert len({subject.pattern for subject in SUBJECTS}) == len(SUBJECTS)
    # A batch is asked of the queue group or of one replica; every other message has one way to go.
    assert len({subject.message for subject in SUBJECTS} | {SCHEDULE_BY}) == len(SUBJECTS)
    for subject in SUBJECTS:
        assert issubclass(subject.message, msgspec.Struct)
        # NATS's default payload limit is 1 MiB.
        assert 0 < subject.max_bytes <= 512 * 1024
        assert 0 < subject.pending_messages <= 65_536


def covers(pattern: str, other: str) -> bool:
    """Whether NATS delivers messages of `other` to `pattern` (a `*` is one token, `>` the rest)."""
    tokens, others = pattern.split("."), other.split(".")
    if tokens[-1] == ">":
        others = others[: len(tokens) - 1]
        tokens = tokens[:-1]
    return len(tokens) == len(others) and all(a in ("*", b) for a, b in zip(tokens, others, strict=True))


def test_no_subject_but_copies_and_placements_is_covered_by_another_or_by_a_stream() -> None:
    patterns = [subject.pattern for subject in SUBJECTS if subject not in (MIRROR, PLACED)]
    patterns += [pattern for stream in STREAMS for pattern in stream.subjects]
    patterns += [counters.subject(">") for counters in COUNTERS]
    assert len(set(patterns)) == len(patterns)
    assert not [(a, b) for a in patterns for b in patterns if a != b and covers(a, b)]


def test_names_of_buckets_and_streams_are_legal() -> None:
    names = [bucket.stream for bucket in BUCKETS] + [stream.name for stream in (*STREAMS, *COUNTERS)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) for name in names)


def test_the_largest_batch_without_a_tokenizer_fits_its_subject() -> None:
    """512 hashes each, names of usual length; a batch of longer ones is refused with its bound named."""
    request = ScheduleRequest("d" * 32, "r" * 36, "m" * 64, block_hashes=b"\xff" * 8 * 512)
    batch = ScheduleBatch("i" * 8, "r" * 8, 50.0, (request,) * MAX_BATCH)
    assert len(encode(batch)) <= SCHEDULE.request.max_bytes
    assert SCHEDULE.request.max_bytes >= 8 * MAX_BLOCKS


def test_events_are_found_by_type_by_model_and_by_both() -> None:
    subject = event_subject("placement", "org/model")
    assert subject.startswith(EVENTS.subjects[0].removesuffix(">"))
    head = subject.rsplit(".", 2)[0]
    assert event_filter("placement", "org/model") == subject
    assert event_filter("placement") == f"{head}.placement.*"
    assert event_filter(model="org/model") == f"{head}.*.org=2Fmodel"
    assert event_filter() == f"{head}.*.*"
    assert event_subject("instance", "").endswith(".instance.-")
