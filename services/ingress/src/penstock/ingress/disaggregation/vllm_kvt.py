"""`vllm-kvt`: decode's connector fetches from the prefill instance's own KV address.

Batched, decode alone gets a request and its engine asks prefill's to compute (Llumnix's hybrid connector,
single request mode); staged, prefill is asked first, and its answer says nothing that is needed.
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


@dataclass(frozen=True)
class VllmKvt:
    """`staged`: prefill first, then decode."""

    staged: bool

    @property
    def order(self) -> Order:
        return Order.PREFILL_FIRST if self.staged else Order.DECODE_ONLY

    def missing(self, prefill: Instance) -> str:
        return "" if kv_endpoint(prefill) else "kv_address (host:port at which its KV cache is fetched)"

    def prefill(self, pair: Pair, parts: Members) -> Edit:
        return with_sets(first_token_only(parts, stream=None), kv_transfer_params={"do_remote_decode": True})

    def question(self, pair: Pair, answer: Answer) -> Question | None:
        return None

    def decode(self, pair: Pair, answer: Answer) -> Edit:
        endpoint = kv_endpoint(pair.prefill)
        assert endpoint is not None, "asked for an instance that `missing` had refused"
        params: dict[str, Any] = {"remote_host": endpoint[0], "remote_port": endpoint[1]}
        if self.staged:
            params["do_remote_prefill"] = True
        return Edit({"kv_transfer_params": params})

    def cancel(self, pair: Pair) -> Cancel | None:
        return None


def kv_endpoint(instance: Instance) -> tuple[str, int] | None:
    """Host and port of `kv_address`; None if it is no such thing."""
    host, colon, port = instance.kv_address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or not 0 < int(port[:6]) < 65536:
        return None
    return host.removeprefix("[").removesuffix("]"), int(port)
