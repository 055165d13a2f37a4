"""Where traces go, and which requests get one."""

from __future__ import annotations

from importlib.util import find_spec
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from penstock.common.settings import Settings


class OtlpSettings(Settings):
    """Of a service that makes spans."""

    otlp_endpoint: str = Field(
        "",
        description="base address of an OpenTelemetry collector that takes OTLP over HTTP, like "
        "http://collector:4318: spans of sampled requests go there; empty: no traces",
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _usable(cls, text: str) -> str:
        if not text:
            return text
        parts = urlsplit(text)
        # Raises ValueError for a port that is none.
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if not usable or parts.query or parts.fragment:
            raise ValueError("must be an address like http://collector:4318")
        if parts.username is not None:
            raise ValueError("holds credentials: put them into the variable OTEL_EXPORTER_OTLP_HEADERS")
        if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
            raise ValueError("OpenTelemetry is not installed: install penstock-common[otlp]")
        return text


class TraceSettings(OtlpSettings):
    """Of the service where requests begin."""

    trace_sample_ratio: float = Field(
        0.01, ge=0, le=1, description="share of the requests that are traced, with --otlp-endpoint"
    )
    trace_inbound_per_second: float = Field(
        10.0,
        ge=0,
        le=100_000,
        description="sampled traces of clients (header traceparent) that are continued, each second and "
        "worker; beyond it, and with 0 always, --trace-sample-ratio decides",
    )
