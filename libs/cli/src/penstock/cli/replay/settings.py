"""What a replay can be told."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from penstock.cli.replay.references import REFERENCES
from penstock.common.messages import MAX_BLOCKS
from penstock.common.settings import Settings
from penstock.scheduler import plugins
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.custom import Policy
from penstock.scheduler.policies.table import STRATEGIES, Thresholds
from penstock.sim.spec import EngineSpec

PROG = "penstock replay"
ORACLE = "oracle"
DEFAULT_POLICIES = "cache-aware,prefix-cache,least-request,random,oracle"
# Of 320 GB that 4 x 80 GB are, an engine uses 90 %: 288 GB. The weights of 70 billion parameters at two bytes
# take 141 GB, activations 2 GB a device. The 139 GB left hold 424,000 tokens of 80 layers x 8 KV heads x 128
# x 2 (keys and values) x 2 bytes = 327,680 bytes, which are 828 blocks of 512 tokens.
KV_BLOCKS_70B = 828
MAX_INSTANCES = 256
MAX_REPLICAS = 16
MAX_INGRESSES = 64
MAX_DELAY_MS = 10_000
# What a float still tells apart.
MAX_SEED = 2**53
MAX_POLICIES = 32

with warnings.catch_warnings():
    # pydantic warns that `json` hides a deprecated method of its base, which nothing calls.
    warnings.simplefilter("ignore", UserWarning)

    class ReplaySettings(Settings):
        """Replay a trace through the scheduler's own code on simulated engines, and compare policies.

        Lists are comma-separated; every combination is run.
        """

        trace: Path | None = Field(
            None, description="trace in Mooncake's format, one JSON object a line; .gz is unpacked"
        )
        policy: str = Field(
            DEFAULT_POLICIES,
            max_length=4096,
            description=f"policies to compare: {', '.join(STRATEGIES)}, one of --policy-module, or a list "
            "with weights, joined by +, such as prefix-cache:6+least-request:1; oracle (cache-aware with "
            f"the true caches) or oracle:POLICY; {', '.join(REFERENCES)}",
        )
        policy_module: str = Field(
            "",
            description="Python files with policies of your own, as the scheduler takes them",
        )
        instances: str = Field(
            "8", max_length=200, description=f"engine instances, 1 to {MAX_INSTANCES}; several: 8,16,32"
        )
        replicas: str = Field(
            "1",
            max_length=200,
            description=f"scheduler replicas, 1 to {MAX_REPLICAS}; one is always run, to compare with",
        )
        event_delay_ms: str = Field(
            "1",
            max_length=200,
            description="milliseconds that other replicas' placements and load reports take, "
            f"0 to {MAX_DELAY_MS}",
        )
        ingresses: str = Field("1", max_length=200, description=f"ingress workers, 1 to {MAX_INGRESSES}")
        limit: int = Field(
            0, ge=0, le=1_000_000, description="only the first requests of the trace; 0 takes all"
        )
        rate_scale: float = Field(
            1.0, gt=0, le=1_000_000, description="requests arrive so many times as fast as recorded"
        )
        spread: bool = Field(
            False, description="spread requests with equal times evenly before the next time of the trace"
        )
        seed: str = Field(
            "0",
            max_length=200,
            description=f"of all chance, 0 to {MAX_SEED}: the same seed, the same output; of several, 0,1,2, "
            "the table shows the mean and the range",
        )
        kv_blocks: int = Field(
            KV_BLOCKS_70B,
            ge=1,
            le=10_000_000,
            description="blocks of KV cache of an instance; default: 424,000 tokens, what 70 billion "
            "parameters with grouped attention leaves of 4 x 80 GB",
        )
        block_size: int = Field(
            512, ge=1, le=65_536, description="tokens in a block, of the trace and of the engines"
        )
        max_batch: int = Field(
            256, ge=1, le=100_000, description="requests an engine computes at a time, the others wait"
        )
        prefill_tokens_per_s: int = Field(
            8000, ge=1, le=10**9, description="prompt tokens an engine computes in a second"
        )
        step_token_budget: int = Field(
            2048, ge=1, le=10**6, description="tokens an engine computes in one step, at least --max-batch"
        )
        decode_step_ms: float = Field(
            20.0, ge=0, le=60_000, description="milliseconds of a step that decodes, however many requests"
        )
        decode_step_per_seq_ms: float = Field(
            0.3, ge=0, le=60_000, description="milliseconds that each decoding request adds to the step"
        )
        slow_ratio: float = Field(
            0.0, ge=0, le=1, description="share of the instances that are slow; nobody is told which"
        )
        slow_speed: float = Field(
            0.33,
            gt=0,
            le=1,
            description="speed of slow instances in prefill and decode, of that of the others",
        )
        prefix_index_blocks: int = Field(
            1_000_000,
            ge=2 * MAX_BLOCKS,
            le=100_000_000,
            description="blocks that a scheduler's index remembers",
        )
        prefix_index_kv_factor: float = Field(
            2.5,
            ge=0,
            le=1000,
            description="and at most so many times what all engines' KV caches hold; 0: whatever they hold",
        )
        slo_ttft_ms: float = Field(
            6000.0, gt=0, le=1e9, description="goodput counts requests whose first token comes within this"
        )
        slo_tpot_ms: float = Field(
            100.0, gt=0, le=1e9, description="and whose further tokens take at most this each, on average"
        )
        json: bool = Field(False, description="print every figure as JSON instead of a table")  # type: ignore[assignment]  # the flag is --json
        plot: Path | None = Field(None, description="SVG file that shows the comparison")

        @model_validator(mode="after")
        def _consistent(self) -> Self:
            faults = []
            if self.trace is None:
                faults.append("--trace is missing: name a file of requests")
            if self.step_token_budget < self.max_batch:
                faults.append(f"--step-token-budget is at least --max-batch, which is {self.max_batch}")
            for name, lowest, highest in (
                ("instances", 1, MAX_INSTANCES),
                ("replicas", 1, MAX_REPLICAS),
                ("ingresses", 1, MAX_INGRESSES),
                ("seed", 0, MAX_SEED),
            ):
                faults += _faults_of_numbers(name, getattr(self, name), lowest, highest)
            faults += _faults_of_numbers("event-delay-ms", self.event_delay_ms, 0, MAX_DELAY_MS)
            faults += self._faults_of_policies()
            if faults:
                raise ValueError("; ".join(faults))
            return self

        def _faults_of_policies(self) -> list[str]:
            if not 0 < len(self.policies) <= MAX_POLICIES:
                return [f"--policy names 1 to {MAX_POLICIES} policies, got {len(self.policies)}"]
            try:
                catalog = Catalog(Thresholds(), self.custom_policies)
                for policy in self.policies:
                    if policy not in REFERENCES:
                        catalog.find(asked_of(policy))
            except plugins.PluginError as exc:
                return [f"--policy-module: {exc}"]
            except ValueError as exc:
                return [f"--policy: {exc}; or {ORACLE}, {', '.join(REFERENCES)}"]
            return []

        @property
        def policies(self) -> tuple[str, ...]:
            """As they are named, each once."""
            return tuple(dict.fromkeys(name.strip() for name in self.policy.split(",") if name.strip()))

        @property
        def seeds(self) -> tuple[int, ...]:
            """In order, each once."""
            return tuple(map(int, numbers(self.seed)))

        @property
        def custom_policies(self) -> Mapping[str, Policy]:
            """The operator's own. Raises PluginError."""
            names = [name.strip() for name in self.policy_module.split(",")]
            return plugins.load(tuple(Path(name) for name in names if name))

        def specs(self, instances: int) -> list[EngineSpec]:
            """The engines, slow ones last."""
            slow = round(instances * self.slow_ratio)
            return [self.spec()] * (instances - slow) + [self.spec(self.slow_speed)] * slow

        def spec(self, speed: float = 1.0) -> EngineSpec:
            """An engine so many times as fast as the flags say."""
            return EngineSpec(
                max_batch=self.max_batch,
                prefill_tokens_per_s=max(1, round(self.prefill_tokens_per_s * speed)),
                step_token_budget=self.step_token_budget,
                decode_step_s=self.decode_step_ms / 1000 / speed,
                decode_step_per_seq_s=self.decode_step_per_seq_ms / 1000 / speed,
                kv_blocks=self.kv_blocks,
                block_size=self.block_size,
                max_waiting=1_000_000,
            )


def asked_of(policy: str) -> str:
    """The text that the scheduler's catalog knows it by; `oracle` alone is its default policy."""
    name, _, rest = policy.partition(":")
    if name == ORACLE:
        policy = rest or next(iter(STRATEGIES))
    return policy.replace("+", ",")


def numbers(text: str) -> list[float]:
    """The members of a list, in order, each once."""
    return sorted({float(one) for one in text.split(",")})


def _faults_of_numbers(name: str, text: str, lowest: int, highest: int) -> list[str]:
    try:
        given = numbers(text)
    except ValueError:
        given = []
    whole = name == "event-delay-ms" or all(one.is_integer() for one in given)
    if given and whole and all(lowest <= one <= highest for one in given):
        return []
    return [f"--{name} is a list of numbers from {lowest} to {highest} such as 1,2,4, got {text[:80]!r}"]
