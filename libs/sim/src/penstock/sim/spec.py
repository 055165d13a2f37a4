"""What an engine is, what it is asked, what it answers, and why it refuses."""

from dataclasses import dataclass
from typing import Literal

import msgspec

Role = Literal["neutral", "prefill", "decode"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """How fast and how large an engine is.

    Duration of a step that computes p prompt tokens and one token for each of n decoding requests:
    p / prefill_tokens_per_s + (decode_step_s + decode_step_per_seq_s * n, if n > 0).
    """

    role: Role = "neutral"
    max_batch: int = 32
    prefill_tokens_per_s: float = 8000.0
    step_token_budget: int = 1024
    decode_step_s: float = 0.020
    decode_step_per_seq_s: float = 0.0003
    kv_blocks: int = 4096
    block_size: int = 16
    max_waiting: int = 10_000

    def __post_init__(self) -> None:
        if min(self.max_batch, self.kv_blocks, self.block_size, self.max_waiting) < 1:
            raise ValueError("max_batch, kv_blocks, block_size and max_waiting are at least 1")
        if self.step_token_budget < self.max_batch:
            # Every decoding request takes one token of the budget in every step.
            raise ValueError("step_token_budget is at least max_batch")
        if self.prefill_tokens_per_s <= 0 or min(self.decode_step_s, self.decode_step_per_seq_s) < 0:
            raise ValueError("prefill_tokens_per_s is above 0, step times are not below 0")

    def step_duration_s(self, prefill_tokens: int, decodes: int) -> float:
        decode_s = self.decode_step_s + self.decode_step_per_seq_s * decodes if decodes else 0.0
        return prefill_tokens / self.prefill_tokens_per_s + decode_s


class EngineRequest(msgspec.Struct, frozen=True):
    """One sequence to compute. Without output tokens (embeddings) it finishes when the prompt is computed.

    `block_hashes` names the leading full blocks of prompt and output in order, as far as they are known;
    blocks after them are never shared. `finish_reason` is what a complete output ends with. After
    `stall_after` output tokens the request produces nothing more and holds what it has until it is aborted.
    `tokens` and `cache_root` are what the hashes were made of; only an engine that publishes needs them.
    Keys and values of the first `imported_tokens` of the prompt came from another engine: no computation.
    With `keeps` its blocks stay after its end, until `Engine.let_go`.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...] = ()
    finish_reason: FinishReason = "stop"
    stall_after: int | None = None
    tokens: bytes = b""
    cache_root: str = ""
    imported_tokens: int = 0
    keeps: bool = False


class TokenEvent(msgspec.Struct, frozen=True, gc=False):
    """A request got its `generated`-th output token; 0: it wants none, and its prompt is computed."""

    request_id: str
    generated: int
    finished: bool
    cached_tokens: int


class DoesNotFit(Exception):
    """A request needs more KV blocks than the engine has, so it could never finish."""

    def __init__(self, needed_blocks: int, kv_blocks: int) -> None:
        super().__init__(f"the request needs {needed_blocks} KV blocks, the engine has {kv_blocks}")
        self.needed_blocks = needed_blocks
        self.kv_blocks = kv_blocks


class QueueFull(Exception):
    """As many requests wait as the engine lets wait."""

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests are waiting already")
        self.waiting = waiting
