"""Value types that several services speak about."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

InstanceId = str

# An instance's label with the number of requests that it takes at a time.
LIMIT_LABEL = "penstock/max-requests"

# Text from outside is bounded where it is decoded: longer is a decode error, not a slow service.
Name = Annotated[str, msgspec.Meta(max_length=512)]
ShortName = Annotated[str, msgspec.Meta(max_length=128)]
# A host becomes a header of every request to it: characters that could end one do not pass.
Host = Annotated[str, msgspec.Meta(max_length=512, pattern=r"\A[A-Za-z0-9_.:-]+\Z")]
Scheme = Annotated[str, msgspec.Meta(max_length=128, pattern=r"\Ahttps?\Z")]
# What an engine counts; a float holds it exactly.
Figure = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Role(StrEnum):
    """What an instance may do; neutral does both."""

    NEUTRAL = "neutral"
    PREFILL = "prefill"
    DECODE = "decode"


class InstanceState(StrEnum):
    """Only `ready` takes new work; `stale` is ready by its last known record while its source is silent."""

    READY = "ready"
    DRAINING = "draining"
    UNHEALTHY = "unhealthy"
    STALE = "stale"


TAKES_WORK = frozenset({InstanceState.READY, InstanceState.STALE})


class Endpoint(msgspec.Struct, frozen=True):
    """Address of an instance."""

    host: Host
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    scheme: Scheme = "http"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        """`http://host:port`, an IPv6 host in brackets."""
        return f"{self.scheme}://{self}"


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One registry record (DESIGN 3.5)."""

    id: Name
    endpoint: Endpoint
    models: Annotated[tuple[Name, ...], msgspec.Meta(max_length=1024)] = ()
    lora_adapters: Annotated[tuple[Name, ...], msgspec.Meta(max_length=4096)] = ()
    owner: Name = ""
    role: Role = Role.NEUTRAL
    engine: ShortName = ""
    group: Name = ""
    dp_rank: Annotated[int, msgspec.Meta(ge=0)] = 0
    dp_size: Annotated[int, msgspec.Meta(ge=1)] = 1
    kv_address: Name = ""
    bootstrap_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    labels: dict[Name, Name] = msgspec.field(default_factory=dict)
    # Routing configuration that the instance brings along, as it came (JSON of `model.aibrix.ai/config`).
    config: Annotated[str, msgspec.Meta(max_length=8192)] = ""
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    state: InstanceState = InstanceState.READY
    reason: Name = ""
    source: ShortName = ""
    # By model, whose it is here by an administrator's mapping; the others are `owner`'s.
    owners: dict[Name, Name] = msgspec.field(default_factory=dict)

    @property
    def takes_work(self) -> bool:
        """Whether new requests may be placed here."""
        return self.state in TAKES_WORK

    def owned_by(self, model: str) -> str:
        """Whose `model` it serves; empty if nobody says."""
        return self.owners.get(model, self.owner) if self.owners else self.owner

    def parent_of(self, lora_adapter: str) -> str:
        """The model that a LoRA adapter is loaded on; a model's own is empty."""
        return "" if lora_adapter in self.models else next(iter(self.models), "")

    @property
    def max_requests(self) -> int:
        """Requests that it may have in flight by its label LIMIT_LABEL; 0 if that has no usable value."""
        text = self.labels.get(LIMIT_LABEL, "")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 0

    def serves(self, model: str) -> bool:
        """Whether `model` is one of its models or LoRA adapters."""
        return model in self.models or model in self.lora_adapters


class EngineLoad(msgspec.Struct, frozen=True):
    """Load as an engine reports it; NaN does not pass the bounds, an unknown figure is None."""

    running: Figure | None = None
    waiting: Figure | None = None
    kv_usage_ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    kv_blocks: Figure | None = None
    block_size: Figure | None = None
    # Prompts that the engine kept for decode and nobody fetched within their lease, since it began.
    kv_expired: Figure | None = None
