"""Settings of the mirror service."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from penstock.common.settings import ServiceSettings


class MirrorSettings(ServiceSettings):
    """Copies of requests out of the bus, to a shadow."""

    admin_port: int = Field(
        8084, ge=0, le=65535, description="port of the admin listener; 0 picks a free one"
    )
    mirror_id: str = Field("", max_length=64, description="name of this replica; random if empty")
    mirror_config: Path = Field(
        Path("/mnt/mirror.json"),
        description="JSON file that says what is copied where; checked every 10 s and when it changes",
    )
    mirror_max_concurrency: int = Field(
        64, ge=1, le=4096, description="copies under way to the shadow at one time, per replica"
    )
    request_timeout: float = Field(
        120.0, gt=0, le=86400, description="seconds for a copy's whole response while Timeout is 0"
    )
