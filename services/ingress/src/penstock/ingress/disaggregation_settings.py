"""Settings of disaggregation."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from penstock.common.settings import Settings
from penstock.ingress.disaggregation.protocols import PROTOCOLS, find


class DisaggregationSettings(Settings):
    """How requests are divided between prefill and decode instances."""

    pd_disagg_protocol: str = Field(
        "",
        description="how prefill and decode instances exchange KV caches: "
        f"{', '.join(PROTOCOLS)}; empty: requests are divided only if their routing-strategy is pd",
    )
    separate_pd_scheduling: bool = Field(
        False, description="place decode when prefill is done (staged) instead of both together (batched)"
    )
    prefill_timeout: float = Field(
        60.0, gt=0, le=86400, description="seconds a prefill instance may take to answer"
    )
    prefill_lease: float = Field(
        30.0,
        gt=0,
        le=3600,
        description="seconds after prefill's answer in which decode may fetch; not above the engines' own",
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.pd_disagg_protocol:
            try:
                find(self.pd_disagg_protocol, staged=self.separate_pd_scheduling)
            except ValueError as exc:
                raise ValueError(f"--pd-disagg-protocol: {exc}") from None
        return self
