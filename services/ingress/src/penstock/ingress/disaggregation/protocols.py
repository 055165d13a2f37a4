"""The closed table of protocols, and which of them can do what."""

from __future__ import annotations

from collections.abc import Mapping

from penstock.ingress.disaggregation.protocol import DisaggregationProtocol
from penstock.ingress.disaggregation.sglang_mooncake import SglangMooncake
from penstock.ingress.disaggregation.vllm_kvt import VllmKvt
from penstock.ingress.disaggregation.vllm_mooncake import VllmMooncake
from penstock.ingress.disaggregation.vllm_nixl import VllmNixl

BATCHED, STAGED = "batched", "staged"

# Name -> mode -> protocol. A mode that is not here cannot be done.
PROTOCOLS: Mapping[str, Mapping[str, DisaggregationProtocol]] = {
    "vllm-kvt": {BATCHED: VllmKvt(staged=False), STAGED: VllmKvt(staged=True)},
    "vllm-mooncake": {BATCHED: VllmMooncake(), STAGED: VllmMooncake()},
    "vllm-nixl": {BATCHED: VllmNixl(), STAGED: VllmNixl()},
    "sglang-mooncake": {BATCHED: SglangMooncake()},
}


def find(name: str, *, staged: bool) -> DisaggregationProtocol:
    """Raises ValueError with a text that says what there is."""
    modes = PROTOCOLS.get(name)
    if modes is None:
        raise ValueError(f"protocol '{name}' is unknown: one of {', '.join(PROTOCOLS)}")
    protocol = modes.get(STAGED if staged else BATCHED)
    if protocol is None:
        able = ", ".join(other for other, has in PROTOCOLS.items() if STAGED in has)
        raise ValueError(f"protocol {name} places both instances at once: staged is done by {able}")
    return protocol
