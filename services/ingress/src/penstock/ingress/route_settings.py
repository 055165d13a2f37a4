"""Settings of traffic splitting, retries and fallbacks; names and defaults of the reference gateways."""

from __future__ import annotations

import json
import ssl
from base64 import b64encode
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment, proxy_bypass

from pydantic import Field, SecretStr, field_validator, model_validator

from penstock.common.settings import Settings
from penstock.ingress.route_config import RouteDocument, read
from penstock.ingress.routes import Proxy

MAX_FILE_BYTES = 1024 * 1024


class RouteSettings(Settings):
    """Where requests go before a scheduler is asked, and after it could not help."""

    route_policy: Literal["", "weight", "prefix"] = Field(
        "", description="how routes are chosen; off if empty"
    )
    route_config: SecretStr = Field(
        SecretStr(""), description="routes: a JSON array, or the path of a file that holds one"
    )
    route_sticky_sessions: bool = Field(
        False, description="under the policy weight, keep the requests of an x-session-id on one route"
    )
    route_tls_ca: Path | None = Field(
        None, description="CA certificates that external endpoints are verified with (PEM); else the system's"
    )

    retry_max_count: int = Field(
        0,
        ge=0,
        le=16,
        description="further instances tried after an error, before a byte is sent to the client",
    )
    retry_budget_percent: float = Field(
        20.0, ge=0, le=100, description="retries at most, in percent of the requests"
    )
    retry_budget_min_per_second: float = Field(
        10.0, ge=0, le=10_000, description="retries per second that are allowed on top, per worker"
    )
    fallback_retry_queue_enabled: bool = Field(
        False, description="queue requests that a fallback answered with 429, and send them again"
    )
    fallback_retry_queue_size: int = Field(
        100, ge=0, le=100_000, description="requests that wait in the 429 queue, per worker"
    )
    fallback_retry_worker_size: int = Field(
        10, ge=1, le=10_000, description="requests out of the 429 queue under way at one time, per worker"
    )
    fallback_retry_max_count: int = Field(
        3,
        ge=-1,
        le=100,
        description="further calls of one fallback after its first 429; -1: until --request-timeout",
    )
    fallback_retry_init_delay_ms: int = Field(
        500, ge=1, le=600_000, description="ms before the first further call; doubles with each"
    )
    fallback_retry_max_delay_ms: int = Field(
        5000,
        ge=1,
        le=600_000,
        description="ms between two further calls at most, unless Retry-After asks more",
    )

    breaker_failures: int = Field(
        5, ge=0, le=10_000, description="failures in a row that open a circuit breaker; 0: never"
    )
    breaker_error_percent: float = Field(
        50.0, ge=0, le=100, description="share of failures within 10 s that opens a circuit breaker; 0: never"
    )
    breaker_min_requests: int = Field(
        20,
        ge=1,
        le=100_000,
        description="requests within 10 s below which their share of failures says nothing",
    )
    breaker_open_time: float = Field(
        5.0,
        gt=0,
        le=3600,
        description="seconds until an open breaker lets a probe through; doubles up to 16 times that",
    )
    ejection_max_percent: float = Field(
        50.0,
        ge=0,
        le=100,
        description="share of a model's instances that open breakers may keep from requests",
    )

    @field_validator("route_config", mode="before")
    @classmethod
    def _content(cls, value: Any) -> Any:
        """A file's content in place of its path; an array of the YAML file as JSON."""
        if isinstance(value, list):
            return json.dumps(value)
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not isinstance(text, str) or not text.strip() or text.lstrip()[0] in "[{":
            return value
        try:
            data = Path(text).read_bytes()
        except (OSError, ValueError) as exc:
            cause = getattr(exc, "strerror", None) or exc
            raise ValueError(
                f"is neither a JSON array nor a file that can be read ({cause}); give one of them"
            ) from None
        if len(data) > MAX_FILE_BYTES:
            raise ValueError(f"the file has {len(data)} bytes, at most {MAX_FILE_BYTES} are read")
        try:
            content = data.decode()
        except UnicodeDecodeError:
            raise ValueError("the file is not UTF-8") from None
        if content.lstrip()[:1] != "[":
            raise ValueError('the file must hold a JSON array such as [{"base_url": "local"}]')
        return content

    @field_validator("route_tls_ca")
    @classmethod
    def _pem(cls, path: Path | None) -> Path | None:
        if path is not None:
            try:
                ssl.create_default_context(cafile=path)
            except OSError as exc:
                raise ValueError(f"cannot be read as PEM certificates: {exc.strerror or exc}") from exc
        return path

    @model_validator(mode="after")
    def _routes_fit(self) -> Self:
        given = bool(self.route_config.get_secret_value().strip())
        if given and not self.route_policy:
            raise ValueError("--route-config needs --route-policy: give weight or prefix")
        if self.route_policy and not given:
            raise ValueError(f"--route-policy {self.route_policy} needs --route-config: give the routes")
        if self.fallback_retry_init_delay_ms > self.fallback_retry_max_delay_ms:
            raise ValueError(
                f"--fallback-retry-init-delay-ms ({self.fallback_retry_init_delay_ms}) is above "
                f"--fallback-retry-max-delay-ms ({self.fallback_retry_max_delay_ms}): raise the latter"
            )
        self.routes()
        return self

    def routes(self) -> RouteDocument | None:
        """The routes that are given; None if none are. Raises RouteFaults, but never of a valid record."""
        text = self.route_config.get_secret_value()
        return read(self.route_policy, text) if self.route_policy and text.strip() else None

    def external_tls(self) -> ssl.SSLContext:
        """For connections to external endpoints. Raises OSError if the file is gone."""
        return ssl.create_default_context(cafile=self.route_tls_ca)


def proxy_from_environment(scheme: str, host: str, port: int) -> Proxy | None:
    """The HTTP proxy that `HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` name, in either case."""
    proxies = getproxies_environment()
    url = proxies.get(scheme) or proxies.get("all")
    if not url or proxy_bypass(f"{host}:{port}", proxies):
        return None
    parts = urlsplit(url if "://" in url else f"http://{url}")
    if parts.scheme != "http" or not parts.hostname:
        return None
    authorization = ""
    if parts.username is not None:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        authorization = "Basic " + b64encode(pair.encode()).decode()
    return Proxy(parts.hostname, parts.port or 80, authorization)
