"""Settings of `penstock register`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, Self

import msgspec
from pydantic import Field, field_validator, model_validator

from penstock.common.model import Endpoint, Instance, Role
from penstock.common.records import PENSTOCK, RecordError, parse_record, write_record
from penstock.common.settings import EngineKeySettings, EngineTlsSettings, ServiceSettings
from penstock.common.settings_sources import flag_of
from penstock.discovery.endpoints import parse_endpoints
from penstock.discovery.etcd_settings import EtcdSettings
from penstock.discovery.nats_settings import NatsSourceSettings
from penstock.discovery.record_settings import RecordSettings
from penstock.discovery.redis_settings import RedisSettings
from penstock.discovery.register.engines import LocalEngine

REDIS, ETCD, NATS = "redis", "etcd", "nats"
MAX_INSTANCES = 64
# How long a registration lives, by store.
_TTLS = {
    REDIS: "discovery_redis_status_ttl_ms",
    ETCD: "discovery_etcd_lease_ttl",
    NATS: "discovery_nats_status_ttl_ms",
}


class RegisterSettings(
    RedisSettings,
    EtcdSettings,
    NatsSourceSettings,
    RecordSettings,
    EngineKeySettings,
    EngineTlsSettings,
    ServiceSettings,
):
    """Runs beside engines: probes them, and keeps those that are healthy registered in Redis, etcd or NATS,
    where discovery finds them. The flags of the stores are those of penstock discovery."""

    drain_timeout: float = Field(
        5.0, ge=0, le=3600, description="seconds that withdrawing the registration may take after SIGTERM"
    )
    store: Literal["redis", "etcd", "nats"] = Field("redis", description="where the engines are registered")
    engine: str = Field(
        "",
        max_length=16_384,
        description="engines of this machine, comma-separated: [role@][http[s]://]host:port",
    )
    advertise_host: str = Field(
        "", max_length=253, description="host at which others reach the engines; as in --engine if empty"
    )
    name: str = Field(
        "",
        max_length=256,
        description="name of the registration, the same after a restart and no other's, such as the name "
        "of the pod; host:port of the first engine if empty",
    )
    model: str = Field("", max_length=8192, description="model names, comma-separated; asked for if empty")
    lora_adapters: str = Field(
        "", max_length=8192, description="names of LoRA adapters, comma-separated; asked for if empty"
    )
    owned_by: str = Field("", max_length=512, description="owner of the models; asked for if empty")
    role: Literal["", "neutral", "prefill", "decode"] = Field(
        "", description="what the engines may do, where --engine does not say it; asked for if empty"
    )
    engine_kind: str = Field("", max_length=128, description="vllm, sglang, tensorrt_llm; asked for if empty")
    group: str = Field(
        "", max_length=512, description="prefill and decode instances of one group exchange KV caches"
    )
    kv_address: str = Field(
        "", max_length=512, description="host:port at which the engines hand over KV caches"
    )
    bootstrap_port: int = Field(
        0, ge=0, le=65535, description="port of a prefill engine's KV-transfer bootstrap; asked for if 0"
    )
    dp_ranks: int = Field(
        1,
        ge=1,
        le=MAX_INSTANCES,
        description="data-parallel ranks that each engine serves, one a port from its own upwards",
    )
    dp_start_rank: int = Field(0, ge=0, le=65535, description="data-parallel rank of the first port")
    dp_size: int = Field(
        0, ge=0, le=65535, description="data-parallel ranks on all hosts together; asked for if 0"
    )
    labels: str = Field("", max_length=8192, description="labels as name=value, comma-separated")
    weight: float = Field(1.0, gt=0, le=1e6, description="share of the work, relative to other instances")
    heartbeat_interval: float = Field(
        10.0, ge=0.05, le=3600, description="seconds between two writes of the registration"
    )
    store_timeout: float = Field(5.0, gt=0, le=300, description="seconds that one write may take")
    probe_interval: float = Field(
        1.0, ge=0.05, le=3600, description="seconds between two probes of a healthy engine"
    )
    probe_timeout: float = Field(2.0, gt=0, le=300, description="seconds a probe may take")
    probe_rise: int = Field(
        1, ge=1, le=100, description="good probes in a row after which a failed engine is registered again"
    )
    probe_fall: int = Field(
        2, ge=1, le=100, description="failed probes in a row after which an engine is withdrawn"
    )

    @field_validator("engine")
    @classmethod
    def _endpoints(cls, text: str) -> str:
        if not parse_endpoints(text):
            raise ValueError("name at least one engine, such as http://127.0.0.1:8000")
        return text

    @field_validator("advertise_host")
    @classmethod
    def _host(cls, text: str) -> str:
        if text:
            parse_endpoints(f"[{text}]:1" if ":" in text else f"{text}:1")
        return text

    @field_validator("labels")
    @classmethod
    def _labels(cls, text: str) -> str:
        for entry in _entries(text):
            if not entry.partition("=")[0].strip() or "=" not in entry:
                raise ValueError(f"{entry!r} is not name=value")
        return text

    @model_validator(mode="after")
    def _complete(self) -> Self:
        faults = list(self._faults())
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults(self) -> Iterator[str]:
        if not self.engine:
            yield "--engine is needed: the engines of this machine, such as http://127.0.0.1:8000"
        if self.heartbeat_interval * 3 > self.ttl_s:
            yield (
                f"--heartbeat-interval {self.heartbeat_interval:g} is over a third of the {self.ttl_s:g} s "
                f"after which the registration ends ({flag_of(_TTLS[self.store])})"
            )
        if self.store == NATS and self.discovery_record_format != PENSTOCK:
            yield f"--store nats takes --discovery-record-format {PENSTOCK} only"
        last = self.dp_start_rank + self.dp_ranks
        if self.dp_size and last > self.dp_size:
            yield f"--dp-size {self.dp_size} is too small for ranks up to {last - 1}"
        if self.engine:
            yield from self._engine_faults()

    def _engine_faults(self) -> Iterator[str]:
        engines = self.engines()
        endpoints = [engine.probe for engine in engines]
        try:
            value = self.encode(tuple(engine.base for engine in engines), 1)
            parse_record(self.key_name, value, self.discovery_record_format)
        except RecordError as exc:
            yield f"the record would not be read ({self.discovery_record_format} format): {exc}"
        if any(endpoint.port > 65535 for endpoint in endpoints):
            yield "--dp-ranks goes past port 65535"
        if len(endpoints) != len(set(endpoints)):
            yield "--engine with --dp-ranks names an address twice"
        if len(endpoints) > MAX_INSTANCES:
            yield f"--engine with --dp-ranks names {len(endpoints)} instances, {MAX_INSTANCES} at most"

    @property
    def ttl_s(self) -> float:
        """How long the registration lives unless it is written again."""
        ttl: float = getattr(self, _TTLS[self.store])
        return ttl / 1000 if _TTLS[self.store].endswith("_ms") else ttl

    @property
    def only_local(self) -> bool:
        """Whether an engine is registered at an address that nobody but this machine reaches."""
        hosts = {engine.base.endpoint.host for engine in self.engines()}
        return any(host in ("localhost", "::1") or host.startswith("127.") for host in hosts)

    @property
    def key_name(self) -> str:
        """What the registration is written under."""
        return self.name or str(self._advertised(self.engines()[0].probe))

    def encode(self, instances: tuple[Instance, ...], now_ms: int) -> bytes:
        """The record of these instances. Raises RecordError."""
        return write_record(instances, now_ms, self.discovery_record_format, name=self.key_name)

    def engines(self) -> tuple[LocalEngine, ...]:
        """Every engine, each data-parallel rank by itself, as far as the settings describe it."""
        listed = [
            (instance, rank)
            for instance in (parse_endpoints(self.engine) if self.engine else ())
            for rank in range(self.dp_ranks)
        ]
        return tuple(
            self._engine(instance, rank, f"-{number}" if len(listed) > 1 else "")
            for number, (instance, rank) in enumerate(listed)
        )

    def _engine(self, listed: Instance, rank: int, part: str) -> LocalEngine:
        probe = msgspec.structs.replace(listed.endpoint, port=listed.endpoint.port + rank)
        role_said = any(
            "@" in entry and parse_endpoints(entry)[0].id == listed.id for entry in _entries(self.engine)
        )
        base = Instance(
            id=f"{self.name}{part}" if self.name else str(self._advertised(probe)),
            endpoint=self._advertised(probe),
            models=_entries(self.model),
            lora_adapters=_entries(self.lora_adapters),
            owner=self.owned_by,
            role=listed.role if role_said else Role(self.role or Role.NEUTRAL),
            engine=self.engine_kind,
            group=self.group,
            dp_rank=self.dp_start_rank + rank,
            dp_size=self.dp_size or self.dp_start_rank + self.dp_ranks,
            kv_address=self.kv_address,
            bootstrap_port=self.bootstrap_port,
            labels=dict(_label(entry) for entry in _entries(self.labels)),
            weight=self.weight,
        )
        return LocalEngine(
            probe,
            base,
            role_known=role_said or bool(self.role),
            size_known=bool(self.dp_size) or self.dp_ranks > 1,
        )

    def _advertised(self, probe: Endpoint) -> Endpoint:
        return msgspec.structs.replace(probe, host=self.advertise_host) if self.advertise_host else probe


def _entries(text: str) -> tuple[str, ...]:
    return tuple(entry for part in text.split(",") if (entry := part.strip()))


def _label(entry: str) -> tuple[str, str]:
    name, _, value = entry.partition("=")
    return name.strip(), value.strip()
