"""The closed table of protocols, and which of them can do what."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from penstock.common.messages import Mode, Stage
from penstock.common.model import Instance
from penstock.common.profiles import BATCHED, DISAGGREGATED, STAGED
from penstock.ingress.disaggregation.protocol import DisaggregationProtocol
from penstock.ingress.disaggregation.sglang_mooncake import SglangMooncake
from penstock.ingress.disaggregation.vllm_kvt import VllmKvt
from penstock.ingress.disaggregation.vllm_mooncake import VllmMooncake
from penstock.ingress.disaggregation.vllm_nixl import VllmNixl

# The routing strategy that asks for disaggregation where nothing else does.
PD = DISAGGREGATED
# What an instance's record says of its engine's connector; the second is AIBrix's.
CONNECTOR_LABELS = "kv_connector", "model.aibrix.ai/kv-connector-type"

# Name -> mode -> protocol. A mode that is not here cannot be done.
PROTOCOLS: Mapping[str, Mapping[str, DisaggregationProtocol]] = {
    "vllm-kvt": {BATCHED: VllmKvt(staged=False), STAGED: VllmKvt(staged=True)},
    "vllm-mooncake": {BATCHED: VllmMooncake(), STAGED: VllmMooncake()},
    "vllm-nixl": {BATCHED: VllmNixl(), STAGED: VllmNixl()},
    "sglang-mooncake": {BATCHED: SglangMooncake()},
}

# AIBrix calls what speaks NIXL's wire format by the file system that it was written for first.
_BY_CONNECTOR = {"shfs": "vllm-nixl", "nixl": "vllm-nixl", "mooncake": "vllm-mooncake", "kvt": "vllm-kvt"}


class Method(NamedTuple):
    """How a request is divided."""

    name: str
    protocol: DisaggregationProtocol
    staged: bool

    @property
    def first_call(self) -> tuple[Mode, Stage]:
        """What a scheduler is asked first."""
        return (Mode.PD_STAGED, Stage.PREFILL) if self.staged else (Mode.PD_BATCH, Stage.ONLY)


def spoken_by(instance: Instance) -> str:
    """The protocol that an instance's record names, "" if none: by label (a protocol's name, or that of a
    vLLM connector such as NixlConnector), else by an engine that has one only."""
    label = next((instance.labels[name] for name in CONNECTOR_LABELS if name in instance.labels), "").lower()
    if label:
        connector = label.removesuffix("connector")
        return label if label in PROTOCOLS else _BY_CONNECTOR.get(connector, "")
    return "sglang-mooncake" if instance.engine == "sglang" else ""


def method_of(name: str, *, staged: bool) -> Method:
    """The method of a protocol that exists; staged only if it can be."""
    mode = STAGED if staged and STAGED in PROTOCOLS[name] else BATCHED
    return Method(name, PROTOCOLS[name][mode], mode == STAGED)


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
