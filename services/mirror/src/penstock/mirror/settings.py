"""Settings of the mirror service."""

from __future__ import annotations

from pydantic import Field

from penstock.common.settings import ServiceSettings


class MirrorSettings(ServiceSettings):
    """The mirror's place in the suite; it replays nothing as of this release."""

    admin_port: int = Field(
        8084, ge=0, le=65535, description="port of the admin listener; 0 picks a free one"
    )
    mirror_id: str = Field("", max_length=128, description="name of this replica; random if empty")
