"""What a client asks of the gateway in its headers (DESIGN 3.2), checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from penstock.ingress.failures import GatewayError
from penstock.ingress.owners import said_in_head

MAX_HEADER_TEXT = 512
MAX_PRIORITY = 100
_PRIORITY = re.compile(rb"[+-]?[0-9]{1,3}")


class Wishes(NamedTuple):
    """Empty and 0 for nothing."""

    owner: str = ""
    strategy: str = ""
    profile: str = ""
    session: str = ""
    user: str = ""
    priority: int = 0


NO_WISHES = Wishes()


def read_wishes(read: Mapping[bytes, bytes]) -> Wishes:
    """By the headers of a request. Raises GatewayError for a text that is too long, and for no priority."""
    return Wishes(
        said_in_head(read),
        _text(read, b"routing-strategy"),
        _text(read, b"config-profile"),
        _text(read, b"x-session-id"),
        _text(read, b"user"),
        _priority(read.get(b"x-priority")),
    )


def _text(read: Mapping[bytes, bytes], name: bytes) -> str:
    value = read.get(name)
    if not value:
        return ""
    if len(value) > MAX_HEADER_TEXT:
        text = f"header {name.decode()} has {len(value)} bytes, at most {MAX_HEADER_TEXT} are taken"
        raise GatewayError("invalid_request", text, param=name.decode())
    return value.decode("utf-8", "replace")


def _priority(value: bytes | None) -> int:
    if value is None:
        return 0
    if not _PRIORITY.fullmatch(value) or abs(priority := int(value)) > MAX_PRIORITY:
        text = f"header x-priority takes an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}, higher goes first"
        raise GatewayError("invalid_request", text, param="x-priority")
    return priority
