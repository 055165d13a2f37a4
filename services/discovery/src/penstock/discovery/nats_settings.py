"""Settings of the NATS source."""

from __future__ import annotations

from pydantic import Field

from penstock.common.settings import Settings


class NatsSourceSettings(Settings):
    """How instances are found in NATS."""

    discovery_nats_status_ttl_ms: int = Field(
        60_000,
        ge=100,
        le=86_400_000,
        description="milliseconds after which a registration in NATS ends unless it is written again",
    )
