"""Settings of the discovery service."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from penstock.common.model import Instance
from penstock.common.settings import BlockHashSettings, EngineKeySettings, EngineTlsSettings, ServiceSettings
from penstock.discovery.allowed import AllowedHosts, parse_allowed
from penstock.discovery.endpoints import listed_file, parse_endpoints
from penstock.discovery.etcd_settings import EtcdSettings
from penstock.discovery.kubernetes_settings import KubernetesSettings
from penstock.discovery.kv_policy import KvPolicy
from penstock.discovery.nats_settings import NatsSourceSettings
from penstock.discovery.redis_settings import RedisSettings

REDIS, ETCD, ENDPOINTS, KUBERNETES, NATS = "redis", "etcd", "endpoints", "kubernetes", "nats"
AVAILABLE = (REDIS, ETCD, ENDPOINTS, KUBERNETES, NATS)


class DiscoverySettings(
    RedisSettings,
    EtcdSettings,
    KubernetesSettings,
    NatsSourceSettings,
    BlockHashSettings,
    EngineKeySettings,
    EngineTlsSettings,
    ServiceSettings,
):
    """Finds engine instances, probes them, and keeps the registry that every service reads."""

    admin_port: int = Field(
        8083, ge=0, le=65535, description="port of the admin listener; 0 picks a free one"
    )
    llm_backend_discovery: str = Field(
        REDIS,
        max_length=256,
        description=f"where instances are found, comma-separated, the first wins where two name the same: "
        f"{', '.join(AVAILABLE)}; --llm-backend-endpoints alone implies {ENDPOINTS}",
    )
    llm_backend_endpoints: str = Field(
        "",
        description="engines, comma-separated: [role@][https://]host:port, role neutral, prefill or decode; "
        "or @ and the path of a file that lists them and is read again when it changes",
    )
    discovery_allow_cidr: str = Field(
        "",
        description="networks that instances may be in, comma-separated; "
        "empty for all but link-local and metadata addresses",
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
    probe_flap_window: float = Field(
        600.0,
        ge=0,
        le=86400,
        description="seconds in which each failure after the first doubles the good probes that make an "
        "instance ready again, up to 64; 0 never asks for more than --probe-rise",
    )
    probe_concurrency: int = Field(64, ge=1, le=4096, description="probes that run at one time")
    discovery_forget_source_after: float = Field(
        300.0,
        ge=0,
        le=604800,
        description="seconds after which the records of a source that no replica runs any more are removed; "
        "longer than a rolling restart; 0 keeps them",
    )
    kv_events: Literal["off", "clears", "blocks"] = Field(
        "clears",
        description="what becomes of the KV-cache events that engines publish: clears tells the "
        "schedulers when an engine's cache is emptied; blocks also what it holds, for ingresses with "
        "--tokenizer-path and the same --block-hash-secret and --token-block-size",
    )
    kv_events_port: int = Field(
        0,
        ge=0,
        le=65535,
        description="port at which engines publish KV-cache events over ZeroMQ, of instances whose label "
        "penstock/kv-events does not say; 0: none",
    )
    kv_events_replay_port: int = Field(
        0, ge=0, le=65535, description="the same for missed events, label penstock/kv-events-replay; 0: none"
    )
    kv_events_max_blocks: int = Field(
        262_144,
        ge=1,
        le=16_777_216,
        description="blocks followed per instance, about 400 bytes each; further ones are passed over",
    )
    discovery_id: str = Field("", max_length=128, description="name of this replica; random if empty")

    @field_validator("llm_backend_endpoints")
    @classmethod
    def _endpoints(cls, text: str) -> str:
        if not listed_file(text):
            parse_endpoints(text)
        return text

    @field_validator("discovery_allow_cidr")
    @classmethod
    def _networks(cls, text: str) -> str:
        parse_allowed(text)
        return text

    @field_validator("llm_backend_discovery")
    @classmethod
    def _known_sources(cls, text: str) -> str:
        names = _names(text)
        faults = [
            f"{name!r} is none of {', '.join(AVAILABLE)}"
            for name in dict.fromkeys(names)
            if name not in AVAILABLE
        ]
        faults += [f"{name} is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
        if faults or not names:
            raise ValueError("; ".join(faults) or f"name at least one of {', '.join(AVAILABLE)}")
        return text

    @model_validator(mode="after")
    def _endpoints_and_sources(self) -> Self:
        listed, used = self.llm_backend_endpoints, ENDPOINTS in self.sources
        if used and not listed_file(listed) and not parse_endpoints(listed):
            raise ValueError("--llm-backend-discovery endpoints needs --llm-backend-endpoints")
        if not used and listed and "llm_backend_endpoints" in self.model_fields_set:
            raise ValueError(
                "--llm-backend-endpoints are given, but "
                f"--llm-backend-discovery {self.llm_backend_discovery} does not name {ENDPOINTS}"
            )
        refused = [
            why for instance in self.endpoints if (why := self.allowed.refusal(instance.endpoint.host))
        ]
        if self.kv_events_replay_port and not self.kv_events_port:
            raise ValueError("--kv-events-replay-port needs --kv-events-port")
        if used and refused:
            raise ValueError(f"--llm-backend-endpoints: {'; '.join(refused[:10])}")
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources to run, in order of precedence; a list of endpoints alone says `endpoints`."""
        if self.llm_backend_endpoints and "llm_backend_discovery" not in self.model_fields_set:
            return (ENDPOINTS,)
        return _names(self.llm_backend_discovery)

    @property
    def endpoints(self) -> tuple[Instance, ...]:
        """What --llm-backend-endpoints lists by itself, without a file."""
        return () if listed_file(self.llm_backend_endpoints) else parse_endpoints(self.llm_backend_endpoints)

    @property
    def kv_policy(self) -> KvPolicy:
        """How KV-cache events are bridged."""
        return KvPolicy(
            (self.kv_events_port, self.kv_events_replay_port),
            self.kv_events == "blocks",
            self.token_block_size,
            self.block_hash_secret.get_secret_value(),
            self.kv_events_max_blocks,
        )

    @property
    def allowed(self) -> AllowedHosts:
        """Which addresses instances may have."""
        return parse_allowed(self.discovery_allow_cidr)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.lower() for part in text.split(",") if (name := part.strip()))
