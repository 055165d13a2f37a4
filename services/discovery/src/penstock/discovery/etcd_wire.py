"""What is read of etcd's answers, as its JSON gateway writes them: base64, and 64-bit numbers as text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

# Twice what etcd takes as one request by default, in base64.
MAX_ANSWER_BYTES = 4 * 1024 * 1024

# gRPC codes of answers that do not depend on the member: invalid argument, not found, permission denied,
# failed precondition, out of range, unauthenticated.
OUT_OF_RANGE = 11
COMMON_TO_ALL = frozenset({3, 5, 7, 9, OUT_OF_RANGE, 16})
# A token that ended, or was given before users or rights changed.
AUTH_LOST = re.compile(r"invalid auth token|revision of auth store|user name is empty")


class Header(msgspec.Struct, frozen=True):
    """`revision` counts the changes of the whole store."""

    cluster_id: int = 0
    revision: int = 0


class KeyValue(msgspec.Struct, frozen=True):
    """One key; `mod_revision` is that of its last change, `lease` 0 if it has none,
    `value` None if it was not read."""

    key: bytes = b""
    value: bytes | None = b""
    mod_revision: int = 0
    lease: int = 0


class RangeAnswer(msgspec.Struct, frozen=True):
    """`count` is that of all keys in the range, `more` says that `kvs` are not all."""

    header: Header = Header()
    kvs: tuple[KeyValue, ...] = ()
    more: bool = False
    count: int = 0


class KeyChange(msgspec.Struct, frozen=True):
    """A put, or a deletion: then `kv` has no value."""

    kv: KeyValue = KeyValue()
    type: str = "PUT"

    @property
    def deleted(self) -> bool:
        """Whether the key is gone; the end of its lease is a deletion too."""
        return self.type == "DELETE"


class WatchAnswer(msgspec.Struct, frozen=True):
    """One message of a watch."""

    header: Header = Header()
    events: tuple[KeyChange, ...] = ()
    canceled: bool = False
    cancel_reason: str = ""
    compact_revision: int = 0


class TokenAnswer(msgspec.Struct, frozen=True):
    """A token for the Authorization header."""

    token: str = ""


class Failure(msgspec.Struct, frozen=True):
    """Why a call failed; in a stream the code is `grpc_code` up to etcd 3.5."""

    message: str = ""
    code: int = 0
    grpc_code: int = 0


class Frame(msgspec.Struct, frozen=True):
    """One line of a watch."""

    result: WatchAnswer | None = None
    error: Failure | None = None


def encode_call(message: Mapping[str, Any]) -> bytes:
    """A request's body."""
    return msgspec.json.encode(message)


def decode_answer(kind: type[T], body: bytes) -> T:
    """Raises ValueError for anything that is not a `kind`."""
    try:
        return msgspec.json.decode(body, type=kind, strict=False)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise ValueError(str(exc)) from exc
