"""`vllm-mooncake`: both generations of that connector, told apart by what prefill answers.

The connector of the Llumnix releases answers with parameters, which decode gets as they are. The one of a
current vLLM answers with none: the transfer has the id that the gateway made, and decode gets it with the
engine's id, which prefill's bootstrap server tells (`GET /query`, a map of data-parallel rank to engine).
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.common.model import Instance
from penstock.ingress.disaggregation.bodies import Edit, Members
from penstock.ingress.disaggregation.protocol import (
    Answer,
    Cancel,
    Order,
    Pair,
    ProtocolError,
    Question,
    first_token_only,
    with_sets,
)
from penstock.ingress.disaggregation.vllm_nixl import HOLD


@dataclass(frozen=True)
class VllmMooncake:
    """The same batched and staged."""

    order = Order.PREFILL_FIRST

    def missing(self, prefill: Instance) -> str:
        return ""

    def prefill(self, pair: Pair, parts: Members) -> Edit:
        # The older connector reads the nulls and not the id, the current one the id and not the nulls.
        params = {**HOLD, "transfer_id": pair.transfer_id}
        return with_sets(first_token_only(parts, stream=False), kv_transfer_params=params)

    def question(self, pair: Pair, answer: Answer) -> Question | None:
        if answer.parameters is not None or not pair.prefill.bootstrap_port:
            return None
        return Question(pair.prefill.bootstrap_port, "/query")

    def decode(self, pair: Pair, answer: Answer) -> Edit:
        if answer.parameters is not None:
            return Edit({"kv_transfer_params": answer.parameters})
        if answer.asked is None:
            return Edit()
        endpoint, port = pair.prefill.endpoint, pair.prefill.bootstrap_port
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        params = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "remote_bootstrap_addr": f"http://{host}:{port}",
            "remote_engine_id": _engine_id(answer.asked, pair.prefill.dp_rank),
            "transfer_id": pair.transfer_id,
        }
        return Edit({"kv_transfer_params": params})

    def cancel(self, pair: Pair) -> Cancel | None:
        return None


def _engine_id(asked: object, rank: int) -> str:
    entry = asked.get(str(rank)) if isinstance(asked, dict) else None
    engine = entry.get("engine_id") if isinstance(entry, dict) else None
    if not isinstance(engine, str) or not 0 < len(engine) <= 256:
        raise ProtocolError(f"the bootstrap server of prefill does not name the engine of rank {rank}")
    return engine
