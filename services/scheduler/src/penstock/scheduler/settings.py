"""Settings of the scheduler."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from penstock.common.messages import MAX_BLOCKS
from penstock.common.settings import ServiceSettings
from penstock.scheduler.policies.table import LEAST_REQUEST, POLICIES, Thresholds


class SchedulerSettings(ServiceSettings):
    """Decides which instance serves each request."""

    admin_port: int = Field(
        8082, ge=0, le=65535, description="port of the admin listener; 0 picks a free one"
    )
    scheduler_id: str = Field(
        "", max_length=64, description="name of this replica in logs, events and heartbeats; empty: random"
    )
    default_routing_strategy: str = Field(
        LEAST_REQUEST, description=f"policy of requests that name none: {', '.join(POLICIES)}"
    )
    prefix_index_blocks: int = Field(
        1_000_000,
        ge=2 * MAX_BLOCKS,
        le=100_000_000,
        description="prompt blocks the prefix index remembers, about 100 bytes each",
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
        if self.default_routing_strategy not in POLICIES:
            raise ValueError(
                f"--default-routing-strategy: unknown strategy {self.default_routing_strategy!r}; "
                f"one of: {', '.join(POLICIES)}"
            )
        return self

    @property
    def thresholds(self) -> Thresholds:
        """What the policies are built with."""
        return Thresholds(self.imbalance_requests, self.imbalance_ratio)
