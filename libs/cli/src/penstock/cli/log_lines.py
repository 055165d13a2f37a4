"""Log lines of the children as one readable log."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec

from penstock.cli.terminal import BLUE, GREY, RED, YELLOW, paint, plain

_NATS = re.compile(rb"\[(DBG|TRC|INF|WRN|ERR|FTL)\] (.*)")
_NATS_LEVELS = {b"WRN": "warning", b"ERR": "error", b"FTL": "error"}
# The file with the password is readable by its owner only, and the password dies with the stack.
_NATS_EXPECTED = b"Plaintext passwords detected"
_LEVEL_COLOURS = {"warning": YELLOW, "error": RED, "critical": RED, "debug": GREY}
_SERVICE_WIDTH = 11
_NOT_FIELDS = frozenset({"time", "level", "service", "message"})


@dataclass(frozen=True)
class Record:
    """One log line; `time` is aware."""

    time: datetime
    service: str
    message: str
    level: str = "info"
    fields: Mapping[str, Any] = field(default_factory=dict)


def from_json(service: str, raw: bytes, now: datetime) -> Record:
    """A service's line; one that is not JSON (a traceback, a print) is a message of its own."""
    try:
        line = msgspec.json.decode(raw, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return Record(now, service, raw.decode("utf-8", "replace"), "")
    fields = {key: value for key, value in line.items() if key not in _NOT_FIELDS}
    message, level = str(line.get("message", "")), str(line.get("level", "info"))
    return Record(_moment(line.get("time"), now), service, message, level, fields)


def from_nats(service: str, raw: bytes, now: datetime) -> Record | None:
    """A line of nats-server, if it is a warning or worse, or none that nats-server formats."""
    match = _NATS.search(raw)
    if match is None:
        return Record(now, service, raw.decode("utf-8", "replace"), "")
    level = _NATS_LEVELS.get(match[1])
    if level is None or match[2].startswith(_NATS_EXPECTED):
        return None
    return Record(now, service, match[2].decode("utf-8", "replace"), level)


def as_text(record: Record, colour: bool) -> str:
    """`HH:MM:SS service  message key=value`, local time; values with line breaks follow, indented."""
    blocks = {key: v for key, v in record.fields.items() if isinstance(v, str) and "\n" in v}
    pairs = (f"{plain(key)}={_value(v)}" for key, v in record.fields.items() if key not in blocks)
    mark = f"{record.level}: " if record.level in ("warning", "error", "critical") else ""
    shown = _LEVEL_COLOURS.get(record.level, "") if colour else ""
    head = " ".join(
        [
            paint(f"{record.time.astimezone():%H:%M:%S}", GREY if colour else ""),
            paint(f"{record.service:<{_SERVICE_WIDTH}}", BLUE if colour else ""),
            paint(mark + plain(record.message), shown),
        ]
    )
    tail = " ".join(pairs)
    lines = [f"{head} {paint(tail, GREY if colour else '')}" if tail else head]
    lines += (f"    {plain(line)}" for block in blocks.values() for line in block.splitlines())
    return "\n".join(lines)


def as_json(record: Record) -> str:
    """The form in which services log."""
    stamp = f"{record.time.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
    line = {"time": stamp, "level": record.level or "info", "service": record.service}
    return msgspec.json.encode({**line, "message": record.message, **record.fields}).decode()


def _moment(stamp: Any, now: datetime) -> datetime:
    try:
        moment = datetime.fromisoformat(stamp)
    except (TypeError, ValueError):
        return now
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _value(value: Any) -> str:
    if isinstance(value, str):
        quoted = not value or any(c.isspace() or c in '"=' for c in value)
        return msgspec.json.encode(value).decode() if quoted else plain(value)
    return plain(msgspec.json.encode(value).decode())
