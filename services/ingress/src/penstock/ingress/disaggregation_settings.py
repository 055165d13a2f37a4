"""Settings of disaggregation."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from penstock.common.profile_settings import ProfilesFileSettings
from penstock.ingress.disaggregation.protocols import PROTOCOLS, find
from penstock.ingress.methods import fault_of


class DisaggregationSettings(ProfilesFileSettings):
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
        protocol, staged, faults = self.pd_disagg_protocol, self.separate_pd_scheduling, []
        try:
            if protocol:
                find(protocol, staged=staged)
        except ValueError as exc:
            faults.append(f"--pd-disagg-protocol: {exc}")
        try:
            for model, one in self.profiles().items():
                if fault := fault_of(one, protocol, staged=staged):
                    faults.append(f"--profiles-file {self.profiles_file}: {model}: {fault}")
        except (OSError, ValueError) as exc:
            cause = exc.strerror if isinstance(exc, OSError) else exc
            faults.append(f"--profiles-file {self.profiles_file}: {cause}")
        if faults:
            raise ValueError("; ".join(faults))
        return self
