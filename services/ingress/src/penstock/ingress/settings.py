"""Settings of the ingress."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from penstock.common.followed_file import read_bytes
from penstock.common.settings import (
    BlockHashSettings,
    EngineKeySettings,
    EngineTlsSettings,
    InstanceLimitSettings,
    ServiceSettings,
    is_loopback,
    read_token,
    sane_token,
)
from penstock.common.tracing_settings import TraceSettings
from penstock.ingress.api_keys import LIVE, read_keys
from penstock.ingress.disaggregation_settings import DisaggregationSettings
from penstock.ingress.limit_settings import LimitSettings
from penstock.ingress.route_settings import RouteSettings
from penstock.ingress.tls_settings import TlsSettings
from penstock.ingress.tokenizer_paths import tokenizer_folders
from penstock.ingress.traffic_settings import TrafficSettings

KIB, MIB = 1024, 1024 * 1024


class IngressSettings(
    DisaggregationSettings,
    LimitSettings,
    RouteSettings,
    BlockHashSettings,
    EngineKeySettings,
    EngineTlsSettings,
    InstanceLimitSettings,
    TlsSettings,
    TraceSettings,
    TrafficSettings,
    ServiceSettings,
):
    """HTTP in, placements from the bus, tokens out."""

    host: str = Field("0.0.0.0", description="address of the public listener")
    port: int = Field(8080, ge=0, le=65535, description="port of the public listener; 0 picks a free one")
    admin_port: int = Field(
        8081, ge=0, le=65535, description="port of the admin listener, for all workers; 0 picks a free one"
    )
    admin_token: SecretStr = Field(
        SecretStr(""),
        description="bearer token of the admin API; needed where --admin-host is wider than loopback",
    )
    admin_token_file: Path | None = Field(
        None, description="file with that token, read again when it changes; instead of --admin-token"
    )
    admin_on_public_port: bool = Field(
        False, description="answer /admin/ on the public port too; needs a token"
    )
    api_keys: str = Field(
        "",
        description="YAML file with the hashes of API keys, read again when it changes; those of live "
        f"configuration count as well; {LIVE}: they alone; empty: requests need no key",
    )
    workers: int = Field(1, ge=1, le=256, description="processes that share the port")
    ingress_id: str = Field("", max_length=64, description="name of this ingress on the bus; random if empty")

    request_timeout: float = Field(
        120.0, gt=0, le=86400, description="seconds from the request's end to the response's first byte"
    )
    stream_idle_timeout: float = Field(
        300.0, gt=0, le=86400, description="seconds between two pieces of a response"
    )
    connect_timeout: float = Field(
        6.0, gt=0, le=300, description="seconds to open a connection to an instance"
    )
    schedule_timeout: float = Field(
        0.05, gt=0, le=10, description="seconds one attempt to reach a scheduler may take; there are two"
    )
    header_timeout: float = Field(
        10.0,
        gt=0,
        le=3600,
        description="seconds for a request's headers, and for each further piece of its body",
    )
    body_timeout: float = Field(
        60.0, gt=0, le=86400, description="seconds for a request's body from its first piece to its last"
    )
    idle_timeout: float = Field(
        75.0, gt=0, le=3600, description="seconds a client's connection may stand idle"
    )

    waiting_limit: int = Field(
        1000,
        ge=0,
        le=100_000,
        description="requests that may wait for capacity, of all workers together; further ones get a 429; "
        "0: none waits",
    )
    waiting_timeout: float = Field(
        30.0, gt=0, le=3600, description="seconds a request may wait for capacity, then it gets a 503"
    )

    max_header_bytes: int = Field(
        64 * KIB, ge=1024, le=MIB, description="bytes of a request's or response's head"
    )
    buffer_limit: int = Field(4 * MIB, ge=1024, le=1024 * MIB, description="bytes of a request's body")
    connection_limit: int = Field(
        1024,
        ge=1,
        le=1_000_000,
        description="client connections at one time, of all workers together; further ones are closed",
    )
    upstream_idle_timeout: float = Field(
        60.0, gt=0, le=3600, description="seconds an unused connection to an instance is kept"
    )

    mirror_forward_credentials: bool = Field(
        False, description="leave clients' credentials in the copies that the mirror sends on"
    )
    block_bytes: int = Field(
        256,
        ge=16,
        le=16384,
        description="bytes of canonical prompt text per block hash, at the prompt's start",
    )
    tokenizer_path: str = Field(
        "",
        description="folder of a tokenizer (tokenizer.json, and the chat template beside it), or "
        "model=folder,...: prompts are hashed by the engines' tokens, as KV-cache events need it; empty: "
        "by bytes",
    )
    block_hash_tenant: Literal["none", "user", "owner"] = Field(
        "none",
        description="whose prompts share no prefix match with those of others: each user's (header user), or "
        "each owner's (header x-owned-by); such hashes match no KV-cache events",
    )
    expose_routing_headers: bool = Field(
        True, description="tell clients routing-strategy, target-pod and target-pod-ip"
    )
    access_log: bool = Field(True, description="one log line per request")
    audit_user_salt: SecretStr = Field(
        SecretStr(""),
        description="put users into outcome events and access log lines, as hashes salted with this, the "
        "same on every ingress; without it no user is named",
    )

    @field_validator("tokenizer_path")
    @classmethod
    def _usable_tokenizer(cls, text: str) -> str:
        tokenizer_folders(text)
        lacking = [name for name in ("tokenizers", "jinja2") if text and find_spec(name) is None]
        if lacking:
            raise ValueError(f"{', '.join(lacking)} is not installed: install penstock-ingress[tokenizer]")
        return text

    @field_validator("api_keys")
    @classmethod
    def _readable_keys(cls, source: str) -> str:
        if source and source != LIVE:
            try:
                read_keys(read_bytes(Path(source)))
            except OSError as exc:
                raise ValueError(f"cannot be read: {exc.strerror or exc}") from exc
        return source

    @field_validator("admin_token")
    @classmethod
    def _sane_token(cls, token: SecretStr) -> SecretStr:
        sane_token(token.get_secret_value())
        return token

    @field_validator("admin_token_file")
    @classmethod
    def _readable_token(cls, path: Path | None) -> Path | None:
        if path is not None:
            read_token(path)
        return path

    @model_validator(mode="after")
    def _closed(self) -> Self:
        token = bool(self.admin_token.get_secret_value())
        if token and self.admin_token_file:
            raise ValueError("--admin-token and --admin-token-file exclude each other: give one")
        if token or self.admin_token_file:
            return self
        wanted = "set --admin-token or --admin-token-file"
        if not is_loopback(self.admin_host):
            raise ValueError(
                f"--admin-host {self.admin_host} is wider than loopback, where the admin API needs a token: "
                f"{wanted}, or --admin-host 127.0.0.1"
            )
        if self.admin_on_public_port:
            raise ValueError(f"--admin-on-public-port needs a token: {wanted}")
        return self
