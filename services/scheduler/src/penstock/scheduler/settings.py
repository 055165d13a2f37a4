"""Settings of the scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from penstock.common.messages import MAX_BLOCKS
from penstock.common.profile_settings import ProfilesFileSettings
from penstock.common.settings import InstanceLimitSettings, ServiceSettings
from penstock.common.tracing_settings import OtlpSettings
from penstock.scheduler import plugins
from penstock.scheduler.policies.catalog import MAX_COEFFICIENT
from penstock.scheduler.policies.configured import ConfiguredCatalog
from penstock.scheduler.policies.custom import Policy
from penstock.scheduler.policies.table import CACHE_AWARE, STRATEGIES, Thresholds
from penstock.scheduler.profile import Division


class SchedulerSettings(ProfilesFileSettings, InstanceLimitSettings, OtlpSettings, ServiceSettings):
    """Decides which instance serves each request."""

    admin_port: int = Field(
        8082, ge=0, le=65535, description="port of the admin listener; 0 picks a free one"
    )
    scheduler_id: str = Field(
        "", max_length=64, description="name of this replica in logs, events and heartbeats; empty: random"
    )
    default_routing_strategy: str = Field(
        CACHE_AWARE,
        max_length=512,
        description=f"policy of requests that name none: {', '.join(STRATEGIES)}, one of --policy-module, or "
        f"a list with weights from 0 to {MAX_COEFFICIENT} such as prefix-cache:6,least-request:1",
    )
    policy_module: str = Field(
        "",
        description="Python files with policies of your own, comma-separated: each has POLICIES, a dict of "
        f"name -> function; packages bring theirs by the entry point group {plugins.GROUP}",
    )
    pd_skip_below_tokens: int = Field(
        0,
        ge=0,
        le=1_000_000_000,
        description="prompt tokens below which disaggregation is skipped: an instance that decodes and lacks "
        "fewer computes them itself; 0 never skips",
    )
    pd_prefill_imbalance: int = Field(
        16,
        ge=0,
        le=100_000,
        description="disaggregation: if requests in flight on prefill instances differ by more, the least "
        "loaded takes the prompt, whichever holds its prefix; 0: never",
    )
    pd_decode_imbalance: int = Field(
        16,
        ge=0,
        le=100_000,
        description="disaggregation: if requests in flight on instances that decode differ by so many or "
        "more, the least loaded decodes; 0: never",
    )
    failover_domain_label: str = Field(
        "",
        max_length=512,
        description="label of instances that fail together, such as their host's name: while one of them is "
        "unhealthy, the others with the same value take no new work; empty: none",
    )
    prefix_index_blocks: int = Field(
        1_000_000,
        ge=2 * MAX_BLOCKS,
        le=100_000_000,
        description="prompt blocks the prefix index remembers, 100 bytes each, 20 to 40 if compiled",
    )
    max_loop_lag_ms: float = Field(
        500.0,
        ge=0,
        le=60_000,
        description="milliseconds that the event loop may be late; three times in a row above it, requests "
        "are left to the other replicas until it has kept within half of it for 2 s; 0: never",
    )
    explain: Literal["sampled", "full", "off"] = Field(
        "sampled",
        description="decisions whose event holds their full inputs, so that they can be made again: one in a "
        "hundred, and of rejections and fallbacks up to 50 a second (sampled), or all (full); off: none, and "
        "the last 10,000 are not kept in the replica either",
    )
    prefix_index_max_age: float = Field(
        3600.0,
        ge=0,
        le=604_800,
        description="seconds after which prompt blocks that were neither placed nor announced are forgotten, "
        "at the earliest after half of it; 0: only for want of room",
    )
    max_kv_ratio_per_instance: float = Field(
        0.0,
        ge=0,
        le=100,
        description="tokens that an instance may have in flight, as a share of the KV cache that its engine "
        "reports; with all at their limit further requests wait; 0: no limit",
    )
    prefix_index_kv_factor: float = Field(
        2.5,
        ge=0,
        le=1000,
        description="the prefix index remembers so many times what the KV caches of all instances hold, as "
        "engines report it, and never more than --prefix-index-blocks; 0: that alone",
    )
    imbalance_requests: float = Field(
        16.0,
        gt=0,
        le=100_000,
        description="prefix-cache: requests in flight above the least loaded instance at which an "
        "instance's prefix match stops to count",
    )
    imbalance_ratio: float = Field(
        0.25,
        ge=0,
        le=100,
        description="prefix-cache: share above the mean in flight that it must also exceed for that",
    )

    @model_validator(mode="after")
    def _known_strategy(self) -> Self:
        faults = []
        custom: Mapping[str, Policy] = {}
        try:
            custom = self.custom_policies
        except plugins.PluginError as exc:
            faults.append(f"--policy-module: {exc}")
        catalog = ConfiguredCatalog(self.thresholds, custom)
        try:
            catalog.find(self.default_routing_strategy)
        except ValueError as exc:
            faults.append(f"--default-routing-strategy: {exc}")
        try:
            for model, one in self.profiles().items():
                if fault := catalog.fault(one):
                    faults.append(f"--profiles-file {self.profiles_file}: {model}: {fault}")
        except (OSError, ValueError) as exc:
            cause = exc.strerror if isinstance(exc, OSError) else exc
            faults.append(f"--profiles-file {self.profiles_file}: {cause}")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def division(self) -> Division:
        """When requests are divided, where no profile says."""
        return Division(
            self.pd_skip_below_tokens,
            prefill_imbalance=self.pd_prefill_imbalance,
            decode_imbalance=self.pd_decode_imbalance,
        )

    @property
    def thresholds(self) -> Thresholds:
        """What the policies are built with."""
        return Thresholds(
            self.imbalance_requests,
            self.imbalance_ratio,
            self.max_requests_per_instance,
            max_kv_ratio=self.max_kv_ratio_per_instance,
        )

    @property
    def custom_policies(self) -> Mapping[str, Policy]:
        """The operator's own. Raises PluginError."""
        names = [name.strip() for name in self.policy_module.split(",")]
        return plugins.load(tuple(Path(name) for name in names if name))
