"""Settings of `penstock up`: its own, every service's, and the simulated engines' under `--sim-...`."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, cast

from pydantic import Field, SecretStr, ValidationError, create_model, model_validator

from penstock.common.model import Role
from penstock.common.settings import Settings, SettingsError, load
from penstock.common.settings_sources import env_of, flag_of
from penstock.discovery.settings import ENDPOINTS, NATS, DiscoverySettings
from penstock.ingress.settings import IngressSettings
from penstock.mirror.settings import MirrorSettings
from penstock.scheduler.settings import SchedulerSettings
from penstock.sim.settings import SimSettings

PROG = "penstock up"
DEFAULT_SIM = 2
# What a current vLLM ships.
SIM_PROTOCOL = "vllm-nixl"
SIM_PREFIX = "sim_"
# Stands for endpoints that are known once ports are chosen; discovery's rules see that there are some.
_SIMULATED = "simulated:1"
# What `up` decides itself for its simulated engines.
_NOT_FOR_SIM = frozenset({"config", "host", "port", "count"})
# Fields that only make sense for a NATS server that `up` did not start.
_OF_ANOTHER_BUS = (
    "nats_user",
    "nats_password",
    "nats_creds",
    "nats_tls_ca",
    "nats_tls_cert",
    "nats_tls_key",
    "nats_replicas",
)


class UpSettings(  # type: ignore[misc]  # the plugin's own model_construct differs between the bases
    IngressSettings, SchedulerSettings, DiscoverySettings, MirrorSettings
):
    """The whole stack on this machine: NATS, every service, and simulated engines where no real ones are
    given. Takes the flags of every service and hands each to the services that have it."""

    host: str = Field("127.0.0.1", description="address of the public listener")
    llm_backend_endpoints: str = Field(
        _SIMULATED,
        description="engines, comma-separated: [role@]host:port; simulated ones if none are given",
    )
    sim: int | None = Field(
        None,
        ge=0,
        le=1000,
        description=f"simulated engines to start; {DEFAULT_SIM} if neither --llm-backend-endpoints nor "
        "--llm-backend-discovery is given",
    )
    sim_prefill: int = Field(
        0,
        ge=0,
        le=1000,
        description="simulated engines to start that compute prompts for those of --sim-decode",
    )
    sim_decode: int = Field(
        0,
        ge=0,
        le=1000,
        description="simulated engines that decode what those of --sim-prefill computed; they "
        f"exchange KV caches by --pd-disagg-protocol, {SIM_PROTOCOL} if that is not given",
    )
    schedulers: int = Field(1, ge=1, le=64, description="scheduler replicas to start")
    nats_url: str = Field(
        "", description="NATS servers to use; a NATS server is started if empty; may carry user:password@"
    )
    nats_port: int = Field(
        0, ge=0, le=65535, description="port of the NATS server that is started; 0 picks a free one"
    )
    data_dir: Path | None = Field(
        None, description="folder for NATS's store; a temporary one, removed at the end, if not given"
    )
    log_json: bool = Field(False, description="print the log as JSON lines, as the services write it")
    start_timeout: float = Field(
        60.0, gt=0, le=3600, description="seconds the whole stack gets to become ready"
    )

    @model_validator(mode="after")
    def _one_kind_of_engine(self) -> Self:
        sim_flags = sorted(
            name for name in self.model_fields_set if name == "sim" or name.startswith(SIM_PREFIX)
        )
        if sim_flags and not self.simulated and self.sim != 0:
            raise ValueError(f"{flag_of(sim_flags[0])} and engines of your own exclude each other: give one")
        if bool(self.sim_prefill) != bool(self.sim_decode):
            raise ValueError(
                "--sim-prefill and --sim-decode go together: one computes what the other decodes"
            )
        return self

    @model_validator(mode="after")
    def _matched_events(self) -> Self:
        if self.kv_events == "blocks" and not self.tokenizer_path:
            raise ValueError("--kv-events blocks needs --tokenizer-path: no event matches blocks of bytes")
        return self

    @model_validator(mode="after")
    def _one_bus(self) -> Self:
        others = [name for name in _OF_ANOTHER_BUS if name in self.model_fields_set]
        if others and not self.nats_url:
            raise ValueError(
                f"{flag_of(others[0])} needs --nats-url: the NATS server that {PROG} starts has its own"
            )
        if self.nats_url and "nats_port" in self.model_fields_set:
            raise ValueError("--nats-port and --nats-url exclude each other: give one")
        return self

    @model_validator(mode="after")
    def _one_listener_a_port(self) -> Self:
        seen: dict[int, str] = {}
        for name in ("port", "admin_port", "nats_port"):
            port: int = getattr(self, name)
            if port and port in seen:
                raise ValueError(f"{flag_of(seen[port])} and {flag_of(name)} are both {port}")
            seen[port] = name
        return self

    @property
    def sources(self) -> tuple[str, ...]:
        """As discovery's; where nothing is said, the simulated engines, and whatever registers in NATS."""
        if "llm_backend_endpoints" in self.model_fields_set or self._discovery_said:
            return super().sources
        return (ENDPOINTS, NATS) if self.simulated else (NATS,)

    @property
    def simulated_publish(self) -> bool:
        """Whether simulated engines publish their KV-cache events: asked for, and not arranged otherwise."""
        arranged = SIM_PREFIX + "kv_events_port" in self.model_fields_set
        return "kv_events" in self.model_fields_set and self.kv_events != "off" and not arranged

    @property
    def simulated(self) -> dict[Role, int]:
        """How many simulated engines of which role to start."""
        if "llm_backend_endpoints" in self.model_fields_set:
            return {}
        if self._discovery_said and ENDPOINTS not in super().sources:
            return {}
        usual = 0 if self.sim_prefill else DEFAULT_SIM
        wanted = {
            Role.NEUTRAL: usual if self.sim is None else self.sim,
            Role.PREFILL: self.sim_prefill,
            Role.DECODE: self.sim_decode,
        }
        return {role: count for role, count in wanted.items() if count}

    @property
    def sim_protocol(self) -> str:
        """By which protocol simulated engines exchange KV caches; empty if none do."""
        return (self.pd_disagg_protocol or SIM_PROTOCOL) if self.sim_prefill else ""

    @property
    def _discovery_said(self) -> bool:
        return "llm_backend_discovery" in self.model_fields_set

    def for_sim(self) -> dict[str, object]:
        """What was given as `--sim-...`, under the names of SimSettings."""
        fields = [name for name in SimSettings.model_fields if name not in _NOT_FOR_SIM]
        return {
            name: getattr(self, SIM_PREFIX + name)
            for name in fields
            if SIM_PREFIX + name in self.model_fields_set
        }


def _with_sim_flags() -> type[UpSettings]:
    fields = {}
    for name, field in SimSettings.model_fields.items():
        if name not in _NOT_FOR_SIM:
            field = copy.copy(field)
            field.description = f"simulated engines: {field.description}"
            fields[SIM_PREFIX + name] = (field.annotation, field)
    made = create_model("UpFlags", __base__=UpSettings, __doc__=UpSettings.__doc__, **fields)  # type: ignore[call-overload]  # fields known at run time only
    return cast(type[UpSettings], made)


UpFlags = _with_sim_flags()

SERVICES: dict[str, type[Settings]] = {
    "ingress": IngressSettings,
    "scheduler": SchedulerSettings,
    "discovery": DiscoverySettings,
    "mirror": MirrorSettings,
}


def read_settings(argv: Sequence[str] | None, environ: Mapping[str, str] | None = None) -> UpSettings:
    """All settings of the stack. Raises SettingsError with the faults of every service."""
    settings = load(UpFlags, argv, prog=PROG, environ=environ)
    try:
        SimSettings.model_validate(settings.for_sim())
    except ValidationError as exc:
        raise SettingsError([_of_sim(error["msg"]) for error in exc.errors()]) from exc
    return settings


def of_service(settings: UpSettings, cls: type[Settings]) -> dict[str, object]:
    """What was given of a service's settings, in any source."""
    given = settings.model_fields_set & cls.model_fields.keys()
    return {name: getattr(settings, name) for name in cls.model_fields if name in given and name != "config"}


def as_arguments(values: Mapping[str, object]) -> tuple[list[str], dict[str, str]]:
    """Values as flags, and what must not be seen in a process list as environment variables."""
    flags, variables = [], {}
    for name, value in values.items():
        if isinstance(value, SecretStr):
            variables[env_of(name)] = value.get_secret_value()
        elif name == "nats_url":
            variables[env_of(name)] = str(value)
        elif value is not None:
            flags.append(f"{flag_of(name)}={_rendered(value)}")
    return flags, variables


def _rendered(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)


def _of_sim(message: str) -> str:
    """A contradiction between SimSettings, in the words of `up`."""
    flags = "|".join(name.replace("_", "-") for name in SimSettings.model_fields if name not in _NOT_FOR_SIM)
    return re.sub(rf"--({flags})\b(?!-)", r"--sim-\1", message.removeprefix("Value error, "))
