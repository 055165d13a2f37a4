"""Settings of `penstock sim`."""

from typing import Self

from pydantic import Field, model_validator

from penstock.common.settings import Settings
from penstock.sim.connectors import ConnectorName
from penstock.sim.http import Profile
from penstock.sim.instance import DEFAULT_KEEP_ALIVE_S, KvEventsAt
from penstock.sim.kv_log import KvEncoding
from penstock.sim.metrics import MetricsStyle
from penstock.sim.spec import EngineSpec, Role
from penstock.sim.text import DEFAULT_MODEL
from penstock.sim.transfers import TransferSpec

# Computing takes no time that a timer would notice, yet durations stay finite.
_INSTANT_TOKENS_PER_S = 1e15
_LONGEST_DEFAULT_MODEL_LEN = 32_768


class SimSettings(Settings):
    """One or several simulated LLM engines in one process, with an OpenAI-compatible HTTP interface."""

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(
        8000, ge=0, le=65535, description="port of the first engine, others take the next; 0 picks free ones"
    )
    count: int = Field(1, ge=1, le=1000, description="number of engines")
    model: str = Field(
        DEFAULT_MODEL, description="names of the model, comma-separated; the first one labels the metrics"
    )
    lora_adapters: str = Field("", description="names of LoRA adapters on the model, comma-separated")
    owned_by: str = Field("penstock", description="owner that /v1/models names")
    role: Role = Field("neutral", description="what the engine may do")
    max_batch: int = Field(32, ge=1, le=100_000, description="requests computed at a time, the others wait")
    max_waiting: int = Field(10_000, ge=1, description="requests that may wait, the next one gets a 503")
    prefill_tokens_per_s: int = Field(8000, ge=1, description="prompt tokens computed in a second")
    step_token_budget: int = Field(
        1024, ge=1, description="tokens computed in one step; longer prompts are computed in chunks"
    )
    decode_step_ms: float = Field(
        20.0, ge=0, le=60_000, description="milliseconds of a step that decodes, however many requests"
    )
    decode_step_per_seq_ms: float = Field(
        0.3, ge=0, le=60_000, description="milliseconds that each decoding request adds to the step"
    )
    kv_blocks: int = Field(4096, ge=1, le=10_000_000, description="blocks of KV cache")
    block_size: int = Field(16, ge=1, le=65_536, description="tokens in a block")
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="longest prompt and answer in tokens; default 32768, less if the KV cache is small",
    )
    speedup: float = Field(
        1.0, gt=0, le=1_000_000, description="factor by which all modelled times are shorter"
    )
    instant: bool = Field(False, description="compute in no modelled time, as fast as the machine goes")
    metrics_style: MetricsStyle = Field("vllm", description="whose metric names /metrics uses")
    kv_events_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="port at which the first engine publishes KV-cache events over ZeroMQ, others take the "
        "next; 0: none",
    )
    kv_events_replay_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="port at which the first engine sends missed KV-cache events again, others take the "
        "next; 0: none",
    )
    kv_events_encoding: KvEncoding = Field(
        "vllm", description="whose events: vllm (0.32), vllm-bytes (older, hashes as bytes) or sglang"
    )
    kv_connector: ConnectorName = Field(
        "none", description="how prefill and decode transfer KV; requests that break its protocol are refused"
    )
    kv_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="port of the first engine's side channel, where its KV is fetched, others take the next; "
        "0 picks free ones",
    )
    kv_lease_ms: float = Field(
        30_000.0,
        gt=0,
        le=3_600_000,
        description="milliseconds that a computed prompt is kept for others to fetch",
    )
    kv_transfer_tokens_per_s: float = Field(
        1_000_000.0, gt=0, description="tokens of KV cache that are transferred in a second"
    )
    kv_wait_ms: float = Field(
        480_000.0, gt=0, le=3_600_000, description="milliseconds that decode waits for a prefill under way"
    )
    dp_rank: int = Field(0, ge=0, le=4095, description="data-parallel rank")
    dp_size: int = Field(1, ge=1, le=4096, description="data-parallel ranks in all")
    keep_alive: float = Field(
        DEFAULT_KEEP_ALIVE_S, gt=0, le=86_400, description="seconds after which an idle connection is closed"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = []
        if self.step_token_budget < self.max_batch:
            faults.append(
                "--step-token-budget is at least --max-batch: a decoding request takes one token of it"
            )
        if self.max_model_len is not None and self.max_model_len > self.kv_tokens:
            faults.append(
                f"--max-model-len is at most --kv-blocks * --block-size, which is {self.kv_tokens} here"
            )
        if self.port and self.port + self.count - 1 > 65535:
            faults.append("--port + --count goes past port 65535")
        for name in ("kv_events_port", "kv_events_replay_port"):
            first: int = getattr(self, name)
            if first and first + self.count - 1 > 65535:
                faults.append(f"--{name.replace('_', '-')} + --count goes past port 65535")
        if self.kv_events_replay_port and not self.kv_events_port:
            faults.append("--kv-events-replay-port needs --kv-events-port")
        if self.kv_port and self.kv_port + self.count - 1 > 65535:
            faults.append("--kv-port + --count goes past port 65535")
        if self.dp_rank >= self.dp_size:
            faults.append(f"--dp-rank {self.dp_rank}: below --dp-size, which is {self.dp_size}")
        names = [*_names(self.model), *_names(self.lora_adapters)]
        if not _names(self.model):
            faults.append("--model names at least one model")
        if len(set(names)) != len(names):
            faults.append("--model and --lora-adapters name something twice")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def kv_tokens(self) -> int:
        return self.kv_blocks * self.block_size

    def spec(self) -> EngineSpec:
        """The engine's speed and size, `speedup` and `instant` worked in."""
        return EngineSpec(
            role=self.role,
            max_batch=self.max_batch,
            prefill_tokens_per_s=_INSTANT_TOKENS_PER_S
            if self.instant
            else self.prefill_tokens_per_s * self.speedup,
            step_token_budget=self.step_token_budget,
            decode_step_s=self._step_s(self.decode_step_ms),
            decode_step_per_seq_s=self._step_s(self.decode_step_per_seq_ms),
            kv_blocks=self.kv_blocks,
            block_size=self.block_size,
            max_waiting=self.max_waiting,
        )

    def transfer(self, place: int) -> TransferSpec | None:
        """How the engine at a place of the row transfers KV; None if it does not."""
        if self.kv_connector == "none":
            return None
        return TransferSpec(
            self.kv_connector,
            self.kv_port + place if self.kv_port else 0,
            self.kv_lease_ms / 1000,
            self.kv_transfer_tokens_per_s,
            self.kv_wait_ms / 1000,
            self.dp_rank,
            self.dp_size,
        )

    def profile(self) -> Profile:
        return Profile(
            models=_names(self.model),
            lora_adapters=_names(self.lora_adapters),
            owned_by=self.owned_by,
            max_model_len=self.max_model_len or min(_LONGEST_DEFAULT_MODEL_LEN, self.kv_tokens),
            metrics_style=self.metrics_style,
        )

    def kv_events_at(self, place: int) -> KvEventsAt | None:
        """Where the engine number `place`, counted from 0, publishes its KV-cache events."""
        if not self.kv_events_port:
            return None
        replay = self.kv_events_replay_port
        return KvEventsAt(
            self.kv_events_port + place, replay + place if replay else -1, self.kv_events_encoding
        )

    def _step_s(self, step_ms: float) -> float:
        return 0.0 if self.instant else step_ms / 1000 / self.speedup


def _names(value: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in value.split(",") if name.strip())
