"""`vllm-nixl`: prefill answers with parameters, which decode gets as they are.

Wire format of vLLM's NIXL connector. Prefill gives none where there is nothing to fetch (a prompt answered by
its first token); decode then computes the prompt itself.
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

# Asks prefill to keep the blocks; the names with null are part of the format.
HOLD: dict[str, Any] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@dataclass(frozen=True)
class VllmNixl:
    """The same batched and staged."""

    order = Order.PREFILL_FIRST

    def missing(self, prefill: Instance) -> str:
        return ""

    def prefill(self, pair: Pair, parts: Members) -> Edit:
        # A streamed answer never holds the parameters.
        return with_sets(first_token_only(parts, stream=False), kv_transfer_params=HOLD)

    def question(self, pair: Pair, answer: Answer) -> Question | None:
        return None

    def decode(self, pair: Pair, answer: Answer) -> Edit:
        return Edit({"kv_transfer_params": answer.parameters} if answer.parameters is not None else {})

    def cancel(self, pair: Pair) -> Cancel | None:
        return None
