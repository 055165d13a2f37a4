"""The engines beside the sidecar: what the settings say of them, what they say, whether they live."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from penstock.common.codec import DecodeError, decode_record, encode_record
from penstock.common.model import Endpoint, Instance, Role
from penstock.discovery.reconcile import Verdict

# All names of all engines share one record, which is at most 64 KiB in NATS.
MAX_NAMES_BYTES = 48 * 1024


@dataclass(frozen=True)
class LocalEngine:
    """One engine. `probe` is its address here, `base` what is known of it without asking; a role or
    a data-parallel size that is not known is what the engine says."""

    probe: Endpoint
    base: Instance
    role_known: bool = True
    size_known: bool = True


class ServerInfo(msgspec.Struct, frozen=True):
    """What is read of SGLang's /server_info."""

    disaggregation_mode: str = ""
    disaggregation_bootstrap_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] | None = None
    dp_size: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 1


def parse_server_info(body: bytes | None) -> ServerInfo | None:
    """None for anything that is not it."""
    try:
        return None if body is None else decode_record(ServerInfo, body)
    except DecodeError:
        return None


@dataclass
class Watched:
    """One engine and its probes. `rise` good ones in a row make it healthy, `fall` failed ones end that;
    the first verdict decides alone."""

    engine: LocalEngine
    rise: int = 1
    fall: int = 2
    max_names_bytes: int = MAX_NAMES_BYTES
    healthy: bool | None = None
    reason: str = ""
    info: ServerInfo | None = None
    last: Verdict = field(default_factory=Verdict)
    good: int = 0
    bad: int = 0

    def judge(self, verdict: Verdict) -> None:
        """Take the verdict of a probe. Names that nobody would read count as a failed one: one engine's
        must not cost the others their record."""
        names = (*verdict.models, *verdict.lora_adapters, verdict.owner)
        if len(encode_record(names)) > self.max_names_bytes:
            verdict = Verdict("too_large", f"its names take more than {self.max_names_bytes} bytes")
        elif not all(map(str.isprintable, names)):
            verdict = Verdict("malformed", "its names hold characters that cannot be printed")
        if verdict.fault:
            self.good, self.bad, self.reason = 0, self.bad + 1, verdict.reason
            # The next process on this address may be another engine.
            self.info = None
        else:
            self.good, self.bad, self.last, self.reason = self.good + 1, 0, verdict, ""
        if self.healthy is None:
            self.healthy = not verdict.fault
        else:
            self.healthy = self.bad < self.fall if self.healthy else self.good >= self.rise

    @property
    def asks_for_info(self) -> bool:
        """Whether the engine is one that describes itself further, and has not done so."""
        return self.info is None and not self.bad and self.last.engine == "sglang"

    @property
    def record(self) -> Instance | None:
        """What is registered; None unless it is healthy."""
        if not self.healthy:
            return None
        base, said = self.engine.base, self.last
        info = self.info or ServerInfo()
        return msgspec.structs.replace(
            base,
            models=base.models or said.models,
            lora_adapters=base.lora_adapters or said.lora_adapters,
            owner=base.owner or said.owner,
            engine=base.engine or said.engine,
            role=base.role if self.engine.role_known else _role(info.disaggregation_mode),
            dp_size=base.dp_size if self.engine.size_known else info.dp_size,
            bootstrap_port=base.bootstrap_port or self._bootstrap_port(info),
        )

    def _bootstrap_port(self, info: ServerInfo) -> int:
        """Only prefill instances listen on it."""
        return (info.disaggregation_bootstrap_port or 0) if info.disaggregation_mode == "prefill" else 0


def _role(mode: str) -> Role:
    return Role(mode) if mode in (Role.PREFILL, Role.DECODE) else Role.NEUTRAL
