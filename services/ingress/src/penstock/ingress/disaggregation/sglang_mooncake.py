"""`sglang-mooncake`: both get the request at once, with the room in which they meet.

The room, modulo decode's data-parallel size, is decode's rank (Llumnix; SGLang picks the rank by it). `rid`
lets either be told to abort.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.common.model import Instance
from penstock.ingress.disaggregation.bodies import Edit, Members
from penstock.ingress.disaggregation.protocol import (
    Answer,
    Cancel,
    Order,
    Pair,
    Question,
    first_token_only,
    with_sets,
)

DEFAULT_BOOTSTRAP_PORT = 8998
MAX_ROOM = 2**63 - 1


@dataclass(frozen=True)
class SglangMooncake:
    """Batched only: both instances are known before the first request goes out."""

    order = Order.TOGETHER

    def missing(self, prefill: Instance) -> str:
        return ""

    def prefill(self, pair: Pair, parts: Members) -> Edit:
        return with_sets(first_token_only(parts, stream=False), **self._meeting(pair))

    def question(self, pair: Pair, answer: Answer) -> Question | None:
        return None

    def decode(self, pair: Pair, answer: Answer) -> Edit:
        return Edit(self._meeting(pair))

    def cancel(self, pair: Pair) -> Cancel | None:
        return Cancel("/abort_request", {"rid": pair.transfer_id})

    def _meeting(self, pair: Pair) -> dict[str, Any]:
        assert pair.decode is not None, "both instances are placed together"
        return {
            "rid": pair.transfer_id,
            "bootstrap_host": pair.prefill.endpoint.host,
            "bootstrap_port": pair.prefill.bootstrap_port or DEFAULT_BOOTSTRAP_PORT,
            "bootstrap_room": room(pair.draw, pair.decode.dp_rank, pair.decode.dp_size),
        }


def room(draw: int, rank: int, size: int) -> int:
    """A number below 2^63 - 1 that gives `rank` modulo `size`, from a draw of 0..2^63-1."""
    size = max(1, size)
    rank %= size
    highest = (MAX_ROOM - 1 - rank) // size
    return draw % (highest + 1) * size + rank
