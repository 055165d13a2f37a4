"""Children's log lines become one readable log."""

from datetime import UTC, datetime

import pytest

from penstock.cli.log_lines import Record, as_json, as_text, from_json, from_nats

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


def clock(moment: datetime) -> str:
    return f"{moment.astimezone():%H:%M:%S}"


def test_a_json_line_becomes_time_service_message_and_fields() -> None:
    raw = (
        b'{"time":"2030-01-02T01:00:00.250Z","level":"info","service":"x",'
        b'"message":"done","status":200,"path":"/v1/models","note":"two words","ok":true}'
    )
    then = datetime(2030, 1, 2, 1, 0, 0, tzinfo=UTC)
    text = as_text(from_json("scheduler-2", raw, NOW), colour=False)
    assert text == f'{clock(then)} scheduler-2 done status=200 path=/v1/models note="two words" ok=true'


@pytest.mark.parametrize("level", ["warning", "error"])
def test_what_is_worse_than_info_says_so(level: str) -> None:
    raw = f'{{"message":"m","level":"{level}"}}'.encode()
    assert as_text(from_json("ingress", raw, NOW), colour=False) == f"{clock(NOW)} ingress     {level}: m"


def test_a_traceback_follows_its_line_indented() -> None:
    raw = rb'{"message":"loop failed","level":"info","error":"Traceback:\n  File \"x\"\nValueError"}'
    lines = as_text(from_json("mirror", raw, NOW), colour=False).splitlines()
    assert lines == [
        f"{clock(NOW)} mirror      loop failed",
        "    Traceback:",
        '      File "x"',
        "    ValueError",
    ]


@pytest.mark.parametrize(
    "raw", [b"Traceback (most recent call last):", b"[1, 2]", b"\xff\xfe", b'{"a": ', b"[" * 5000]
)
def test_a_line_that_is_no_json_object_is_shown_as_it_is(raw: bytes) -> None:
    record = from_json("sim", raw, NOW)
    assert (record.message, record.time) == (raw.decode("utf-8", "replace"), NOW)


@pytest.mark.parametrize("stamp", ['"yesterday"', "12", "null", '"2030-13-40"'])
def test_a_time_that_is_none_becomes_the_present(stamp: str) -> None:
    assert from_json("sim", f'{{"time":{stamp},"message":"m"}}'.encode(), NOW).time == NOW


def test_others_words_cannot_steer_the_terminal() -> None:
    raw = rb'{"message":"\u001b[2Jcleared\r\u009b","path":"\u001b]0;x\u0007"}'
    text = as_text(from_json("ingress", raw, NOW), colour=False)
    assert all(character.isprintable() for character in text)


def test_colour_adds_nothing_but_colour() -> None:
    record = Record(NOW, "up", "ready", "warning", {"a": 1})
    coloured = as_text(record, colour=True)
    for code in ("90", "34", "33"):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured.replace("\x1b[0m", "") == as_text(record, colour=False)


@pytest.mark.parametrize(
    ("raw", "level", "message"),
    [
        (b"[12] 2030/01/02 03:04:05.0 [WRN] disk is slow", "warning", "disk is slow"),
        (b"[12] 2030/01/02 03:04:05.0 [ERR] no [INF] here", "error", "no [INF] here"),
        (b"[12] 2030/01/02 03:04:05.0 [FTL] gone", "error", "gone"),
        (b"nats-server: cannot read", "", "nats-server: cannot read"),
    ],
)
def test_nats_is_heard_when_something_is_wrong(raw: bytes, level: str, message: str) -> None:
    record = from_nats("nats", raw, NOW)
    assert record is not None
    assert (record.level, record.message) == (level, message)


@pytest.mark.parametrize(
    "raw",
    [
        b"[12] 2030/01/02 03:04:05.0 [INF] Server is ready",
        b"[12] 2030/01/02 03:04:05.0 [WRN] Plaintext passwords detected, use nkeys or bcrypt",
    ],
)
def test_nats_is_silent_otherwise(raw: bytes) -> None:
    assert from_nats("nats", raw, NOW) is None


def test_the_json_form_reads_back_as_the_same_record() -> None:
    record = Record(NOW, "up", "nats ready", "info", {"port": 4222})
    assert from_json("up", as_json(record).encode(), datetime.now(UTC)) == record
