"""What a protocol of disaggregation says; each is one module beside this one, entered in `protocols`.

A protocol decides without I/O: it is asked for the edits of the two bodies, in the order that it declares.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Protocol

import msgspec

from penstock.common.model import Instance
from penstock.ingress.disaggregation.bodies import Edit, Members


class Order(Enum):
    """Which of the two requests goes out when."""

    # Prefill gets none: decode's engine talks to it.
    DECODE_ONLY = "decode-only"
    # Decode goes out once prefill has answered 200.
    PREFILL_FIRST = "prefill-first"
    # Both at once; prefill's answer is not read.
    TOGETHER = "together"


class Pair(msgspec.Struct, frozen=True):
    """What a protocol may know of one attempt. `decode` is None while it is not placed yet; `transfer_id` is
    unique among all attempts of all ingresses, `draw` is a random integer of 0..2^63-1."""

    prefill: Instance
    decode: Instance | None
    request_id: str
    transfer_id: str
    draw: int


class Answer(msgspec.Struct, frozen=True):
    """What prefill answered: its body's `kv_transfer_params`, if it had any that are an object, and what
    `question` brought (JSON in plain types)."""

    parameters: msgspec.Raw | None = None
    asked: Any = None


class Question(msgspec.Struct, frozen=True):
    """A GET to a port of prefill's host, beside the API. Its answer stays true until the engine restarts."""

    port: int
    path: str


class Cancel(msgspec.Struct, frozen=True):
    """A POST to prefill's API that ends what it holds or computes for this attempt."""

    path: str
    body: dict[str, Any]


class ProtocolError(Exception):
    """An engine's answer is not what the protocol says; the text is for people, without what it said."""


class DisaggregationProtocol(Protocol):
    """One protocol in one mode. `missing`, `question` and `cancel` are asked before any is used."""

    @property
    def order(self) -> Order:
        """Which request goes out when."""

    def missing(self, prefill: Instance) -> str:
        """What the prefill instance's record lacks for this protocol, in words; "" if nothing."""

    def prefill(self, pair: Pair, parts: Members) -> Edit:
        """What prefill is sent."""

    def question(self, pair: Pair, answer: Answer) -> Question | None:
        """What else has to be asked before decode goes out."""

    def decode(self, pair: Pair, answer: Answer) -> Edit:
        """What decode is sent. Raises ProtocolError."""

    def cancel(self, pair: Pair) -> Cancel | None:
        """How prefill is told that nobody will fetch; None where closing its connection is all there is, and
        what it holds ends by its lease."""


def first_token_only(parts: Members, *, stream: bool | None) -> Edit:
    """What all prefill bodies have in common: one token, none of what speaks of more. `stream` None leaves it
    as the client has it."""
    sets: dict[str, Any] = {"max_tokens": 1}
    drops = {"min_tokens", "stream_options"}
    if "max_completion_tokens" in parts:
        sets["max_completion_tokens"] = 1
    if stream is not None:
        sets["stream"] = stream
    return Edit(sets, frozenset(drops))


def with_sets(edit: Edit, **sets: Any) -> Edit:
    """The edit with further members set."""
    return Edit({**edit.sets, **sets}, edit.drops)
