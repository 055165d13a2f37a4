"""Settings of the discovery service."""

from __future__ import annotations

from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator

from penstock.common.settings import ServiceSettings
from penstock.discovery.endpoints import parse_endpoints

ENDPOINTS = "endpoints"
AVAILABLE = (ENDPOINTS,)


class DiscoverySettings(ServiceSettings):
    """Finds engine instances, probes them, and keeps the registry that every service reads."""

    admin_port: int = Field(
        8083, ge=0, le=65535, description="port of the admin listener; 0 picks a free one"
    )
    llm_backend_discovery: str = Field(
        "redis",
        description="where instances are found; this release has: endpoints, "
        "which --llm-backend-endpoints alone implies",
    )
    llm_backend_endpoints: str = Field(
        "", description="engines, comma-separated: [role@]host:port, role one of neutral, prefill, decode"
    )
    probe_interval: float = Field(
        5.0, gt=0, le=3600, description="seconds between two probes of a healthy instance"
    )
    probe_timeout: float = Field(2.0, gt=0, le=300, description="seconds a probe may take")
    probe_rise: int = Field(
        1, ge=1, le=100, description="good probes in a row that make an unhealthy instance ready"
    )
    probe_fall: int = Field(
        2, ge=1, le=100, description="failed probes in a row that make a ready instance unhealthy"
    )
    probe_concurrency: int = Field(64, ge=1, le=4096, description="probes that run at one time")
    engine_api_key: SecretStr = Field(
        SecretStr(""), description="key sent to the engines as a bearer token by the prober"
    )
    discovery_id: str = Field("", max_length=128, description="name of this replica; random if empty")

    @field_validator("llm_backend_endpoints")
    @classmethod
    def _endpoints(cls, text: str) -> str:
        parse_endpoints(text)
        return text

    @field_validator("engine_api_key")
    @classmethod
    def _header_safe(cls, key: SecretStr) -> SecretStr:
        text = key.get_secret_value()
        if not (text.isascii() and text.isprintable()):
            raise ValueError("a key holds printable ASCII characters only")
        return key

    @model_validator(mode="after")
    def _source(self) -> Self:
        name, listed = self.source, parse_endpoints(self.llm_backend_endpoints)
        if name not in AVAILABLE:
            default = "" if "llm_backend_discovery" in self.model_fields_set else ", the default,"
            raise ValueError(
                f"--llm-backend-discovery {name}{default} is not available in this release; "
                f"available: {', '.join(AVAILABLE)} (list the engines with --llm-backend-endpoints)"
            )
        if name == ENDPOINTS and not listed:
            raise ValueError("--llm-backend-discovery endpoints needs --llm-backend-endpoints")
        return self

    @property
    def source(self) -> str:
        """The source to run; a list of endpoints alone says `endpoints`."""
        if self.llm_backend_endpoints and "llm_backend_discovery" not in self.model_fields_set:
            return ENDPOINTS
        return self.llm_backend_discovery
