"""Settings: one frozen record per service, read once from flags, environment and a YAML file.

Precedence: flag, then environment (`PENSTOCK_` and the flag's name in upper snake case), then the
file named by `--config`, then the default. All faults of all sources are reported together.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from penstock.common.settings_sources import (
    ENV_PREFIX,
    env_of,
    explain,
    flag_of,
    read_environment,
    read_file,
    read_flags,
    shown,
)

MAX_TOKEN = 4096


class SettingsError(Exception):
    """Everything that is wrong with the settings, one line a fault."""

    def __init__(self, faults: Sequence[str]) -> None:
        # A field may have several, one a line.
        self.faults = tuple(line.strip() for fault in faults for line in fault.splitlines())
        super().__init__("\n".join(self.faults))


class Settings(BaseModel):
    """Base of every settings record; each field is a flag, a variable and a key of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: Path | None = Field(
        None, description="YAML file with any of these settings; keys as the flags' names"
    )


class BusSettings(Settings):
    """How a service reaches the bus (DESIGN D13)."""

    nats_url: str = Field(
        "nats://127.0.0.1:4222", description="NATS servers, comma-separated; may carry user:password@"
    )
    nats_user: str = Field("", description="NATS user, with --nats-password")
    nats_password: SecretStr = Field(SecretStr(""), description="NATS password")
    nats_creds: Path | None = Field(None, description="NATS credentials file (JWT and seed)")
    nats_tls_ca: Path | None = Field(
        None, description="CA certificates the NATS server is verified with (PEM)"
    )
    nats_tls_cert: Path | None = Field(
        None, description="client certificate for NATS (PEM), with --nats-tls-key"
    )
    nats_tls_key: Path | None = Field(None, description="key of the client certificate (PEM)")
    nats_replicas: int = Field(
        1, ge=1, le=5, description="copies that NATS keeps of the streams and buckets made by this service"
    )

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        if bool(self.nats_tls_cert) != bool(self.nats_tls_key):
            raise ValueError("--nats-tls-cert and --nats-tls-key go together: give both or neither")
        if self.nats_password.get_secret_value() and not self.nats_user:
            raise ValueError("--nats-password needs --nats-user")
        if self.nats_creds and self.nats_user:
            raise ValueError("--nats-creds and --nats-user exclude each other: give one")
        return self


class ServiceSettings(BusSettings):
    """What every service has: bus, admin listener, log, drain."""

    admin_host: str = Field(
        "127.0.0.1", description="address of the admin listener (/livez /readyz /metrics)"
    )
    admin_port: int = Field(0, ge=0, le=65535, description="port of the admin listener; 0 picks a free one")
    metrics_token: SecretStr = Field(
        SecretStr(""), description="bearer token that /metrics asks for; none if empty"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="least level that is logged"
    )
    event_buffer_mib: int = Field(
        8,
        ge=1,
        le=4096,
        description="MiB of routing events that a process (a worker of the ingress) keeps until they are "
        "stored; beyond it the oldest are dropped, and the log says which",
    )
    audit_spool: Path | None = Field(
        None,
        description="folder on a local disk that keeps routing events until they are stored, so that none is "
        "missing when a process or NATS is killed; none if empty",
    )
    audit_spool_mib: int = Field(
        256,
        ge=4,
        le=1_048_576,
        description="MiB that a process (a worker of the ingress) may have there; beyond it the oldest "
        "events go, and the log says which",
    )
    audit_spool_fsync: Literal["never", "second", "always"] = Field(
        "second",
        description="when the disk has to hold what is spooled, which counts if the machine crashes: never, "
        "within a second, or always at once, for which each write waits",
    )
    event_retention_hours: float = Field(
        168.0,
        gt=0,
        le=87_600,
        description="hours that routing events stay in their stream; the same for every service: who comes "
        "last sets it",
    )
    event_stream_mib: int = Field(
        1024,
        ge=16,
        le=1_048_576,
        description="MiB of routing events that the stream holds; beyond it the oldest go; as with "
        "--event-retention-hours the same for every service",
    )
    drain_timeout: float = Field(
        30.0, ge=0, le=3600, description="seconds that running work gets to finish after SIGTERM"
    )


class BlockHashSettings(Settings):
    """How prompts become block hashes: the same in every service that makes some."""

    block_hash_secret: SecretStr = Field(
        SecretStr(""),
        description="salt of the block hashes; the same on every ingress of a deployment, and "
        "on discovery with --kv-events blocks",
    )
    token_block_size: int = Field(
        16,
        ge=1,
        le=1024,
        description="tokens per block hash where a tokenizer is used; the engines' block size",
    )


class EngineKeySettings(Settings):
    """What engines are shown by whoever probes them, and in the place of clients' keys."""

    engine_api_key: SecretStr = Field(
        SecretStr(""),
        description="key sent to the engines as a bearer token, by the prober and, with --api-keys, in "
        "the place of clients' keys",
    )

    @field_validator("engine_api_key")
    @classmethod
    def _header_safe(cls, key: SecretStr) -> SecretStr:
        text = key.get_secret_value()
        if not (text.isascii() and text.isprintable()):
            raise ValueError("a key holds printable ASCII characters only")
        return key


class InstanceLimitSettings(Settings):
    """How much an instance takes at a time, for those who place requests."""

    max_requests_per_instance: int = Field(
        0,
        ge=0,
        le=1_000_000,
        description="requests that an instance may have in flight, unless its label penstock/max-requests "
        "says otherwise; with all at their limit further requests wait; 0: no limit",
    )


class EngineTlsSettings(Settings):
    """How instances with an https endpoint are verified: always, and by name."""

    engine_tls_ca: Path | None = Field(
        None, description="CA certificates that engines with https are verified with (PEM); else the system's"
    )

    @field_validator("engine_tls_ca")
    @classmethod
    def _readable(cls, path: Path | None) -> Path | None:
        if path is not None:
            try:
                ssl.create_default_context(cafile=path)
            except OSError as exc:
                raise ValueError(f"cannot be read as PEM certificates: {exc.strerror or exc}") from exc
        return path

    def engine_tls(self) -> ssl.SSLContext:
        """For connections to engines. Raises OSError if the file is gone."""
        return ssl.create_default_context(cafile=self.engine_tls_ca)


def is_loopback(host: str) -> bool:
    """Whether a listener on `host` is reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def sane_token(token: str) -> str:
    """A token that a header can carry. Raises ValueError."""
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError("a token holds printable ASCII characters only, and no spaces")
    return token


def read_token(path: Path) -> str:
    """The token in a file: its one line. Raises ValueError."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MAX_TOKEN + 2).strip()
    except (OSError, UnicodeDecodeError) as exc:
        raise ValueError(f"cannot be read: {exc.strerror if isinstance(exc, OSError) else exc}") from exc
    if not 0 < len(text) <= MAX_TOKEN:
        raise ValueError(f"holds no token of 1 to {MAX_TOKEN} characters")
    return sane_token(text)


T = TypeVar("T", bound=Settings)


def load(
    cls: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    environ: Mapping[str, str] | None = None,
    description: str | None = None,
) -> T:
    """Read `cls` from all sources.

    Raises:
        SettingsError: with every fault found in any source.
        SystemExit: 0 after `--help`.
    """
    environ = os.environ if environ is None else environ
    faults: list[str] = []
    flags = read_flags(cls, sys.argv[1:] if argv is None else argv, prog, description, faults)
    variables = read_environment(cls, environ)
    path = flags.get("config") or variables.get("config")
    file = read_file(cls, Path(path), faults) if path else {}
    merged = {**file, **variables, **flags}
    origin = {
        name: flag_of(name) if name in flags else env_of(name) if name in variables else f"{path}: {name}"
        for name in merged
    }
    settings = _validate(cls, merged, origin, faults)
    if settings is None or faults:
        raise SettingsError(faults)
    return settings


def _validate(cls: type[T], values: dict[str, Any], origin: Mapping[str, str], faults: list[str]) -> T | None:
    """Rules over several fields see right ones only: for them, wrong ones stand aside."""
    try:
        return cls.model_validate(values)
    except ValidationError as exc:
        errors = exc.errors()
    faults.extend(explain(cls, error, origin) for error in errors)
    wrong = {str(error["loc"][0]) for error in errors if error["loc"]}
    if wrong & values.keys():
        _validate(cls, {name: values[name] for name in values.keys() - wrong}, origin, faults)
    return None


def load_or_exit(
    cls: type[T], argv: Sequence[str] | None = None, *, prog: str, description: str | None = None
) -> T:
    """`load`, with the faults printed for a person and exit code 2."""
    try:
        return load(cls, argv, prog=prog, description=description)
    except SettingsError as exc:
        exit_with_faults(prog, exc.faults)


def exit_with_faults(prog: str, faults: Sequence[str]) -> NoReturn:
    """Print every fault and leave with the exit code of bad settings."""
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    print(f"{prog}: bad settings ({count}):", file=sys.stderr)
    for fault in faults:
        print(f"  {fault}", file=sys.stderr)
    print(f"See {prog} --help.", file=sys.stderr)
    raise SystemExit(2)


def unknown_variables(known: Sequence[type[Settings]], environ: Mapping[str, str] | None = None) -> list[str]:
    """`PENSTOCK_*` variables that no record in `known` reads; worth a warning, never fatal."""
    environ = os.environ if environ is None else environ
    names = {env_of(name) for cls in known for name in cls.model_fields}
    return sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in names)


def reveal(settings: Settings) -> dict[str, Any]:
    """Every value as plain JSON types, secrets included: for handing a record to a process of one's own."""

    def plain(value: Any) -> Any:
        if isinstance(value, SecretStr):
            return value.get_secret_value()
        return str(value) if isinstance(value, Path) else value

    return {name: plain(getattr(settings, name)) for name in type(settings).model_fields}


def describe(cls: type[Settings]) -> Iterator[tuple[str, str, str, str]]:
    """Rows (flag, variable, default, description) for the generated flag tables."""
    for name, field in cls.model_fields.items():
        yield flag_of(name), env_of(name), shown(field), field.description or ""
