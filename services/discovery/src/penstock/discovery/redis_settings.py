"""Settings of the Redis source."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, model_validator

from penstock.discovery.record_settings import RecordSettings

STANDALONE, SENTINEL, CLUSTER = "standalone", "sentinel", "cluster"
_PORTS = {STANDALONE: 6379, SENTINEL: 26379, CLUSTER: 6379}
_KINDS = {"": STANDALONE, "sentinel": SENTINEL, "cluster": CLUSTER}
_HOST = re.compile(r"[A-Za-z0-9_.:-]{1,253}")
_MASTER = re.compile(r"[A-Za-z0-9_.-]{1,128}")
MAX_MEMBERS = 64
MAX_DB = 2**31 - 1
_EXAMPLES = "redis://host:6379/0, rediss+sentinel://host:26379,host:26379/mymaster, redis+cluster://host:6379"


@dataclass(frozen=True)
class RedisAddress:
    """Where Redis is. `members` are the server itself, the sentinels, or some nodes of the cluster; `master`
    is the name that sentinels know the server by."""

    kind: str
    tls: bool
    members: tuple[tuple[str, int], ...]
    master: str = ""
    db: int = 0


class RedisSettings(RecordSettings):
    """How Redis is reached, and how its records are read."""

    discovery_redis_host: str = Field("redis", max_length=253, description="Redis host")
    discovery_redis_port: int = Field(6379, ge=1, le=65535, description="Redis port")
    discovery_redis_url: str = Field(
        "",
        max_length=8192,
        description="Redis by URL, in place of host and port; rediss for TLS: redis[s]://host[:port][/db], "
        "redis[s]+sentinel://host[:port],.../master[/db], redis[s]+cluster://host[:port],...",
    )
    discovery_redis_username: str = Field(
        "", max_length=512, description="Redis user (ACL); the default user if empty"
    )
    discovery_redis_password: SecretStr = Field(SecretStr(""), description="Redis password")
    discovery_redis_sentinel_username: str = Field(
        "", max_length=512, description="user at the sentinels, where they ask for one"
    )
    discovery_redis_sentinel_password: SecretStr = Field(
        SecretStr(""), description="password at the sentinels, where they ask for one"
    )
    discovery_redis_socket_timeout: float = Field(
        1.0, gt=0, le=300, description="seconds that Redis may take to connect and to answer one command"
    )
    discovery_redis_retry_times: int = Field(
        1, ge=0, le=100, description="how often a command is tried again on a failure of the connection"
    )
    discovery_redis_status_ttl_ms: int = Field(
        60_000,
        ge=100,
        le=86_400_000,
        description="milliseconds after which a record ends by its own timestamp unless it is written again, "
        "and that instances stay after Redis lost its data",
    )
    discovery_redis_refresh_interval_ms: int = Field(
        1000,
        ge=10,
        le=3_600_000,
        description="milliseconds between two readings of all records",
    )
    discovery_redis_notifications: bool = Field(
        True,
        description="subscribe to keyspace notifications: where the server has them on "
        "(notify-keyspace-events Kg$x), a change is seen at once",
    )
    discovery_redis_prefix: str = Field(
        "",
        max_length=512,
        description="prefix of the records' keys; empty for that of --discovery-record-format",
    )
    discovery_redis_tls_ca: Path | None = Field(
        None, description="CA certificates that Redis is verified with (PEM); the system's if not given"
    )
    discovery_redis_tls_cert: Path | None = Field(
        None, description="client certificate for Redis (PEM), with --discovery-redis-tls-key"
    )
    discovery_redis_tls_key: Path | None = Field(
        None, description="key of the client certificate for Redis (PEM)"
    )

    @model_validator(mode="after")
    def _redis(self) -> Self:
        faults = []
        if self.discovery_redis_username and not self.discovery_redis_password.get_secret_value():
            faults.append("--discovery-redis-username needs --discovery-redis-password")
        named = {"discovery_redis_host", "discovery_redis_port"} & self.model_fields_set
        if self.discovery_redis_url and named:
            faults.append("--discovery-redis-url and --discovery-redis-host or -port exclude each other")
        try:
            self._check_address(self.redis_address())
        except ValueError as exc:
            faults.append(str(exc))
        try:
            self._check_tls_files()
        except ValueError as exc:
            faults.append(str(exc))
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def redis_address(self) -> RedisAddress:
        """Where Redis is.

        Raises:
            ValueError: host or URL is not an address; the message holds no credentials.
        """
        if self.discovery_redis_url:
            try:
                return _parse_url(self.discovery_redis_url)
            except ValueError as exc:
                raise ValueError(f"--discovery-redis-url {exc}; such as {_EXAMPLES}") from None
        host = self.discovery_redis_host
        if not _HOST.fullmatch(host):
            raise ValueError("--discovery-redis-host is not a host name or address")
        return RedisAddress(STANDALONE, False, ((host, self.discovery_redis_port),))

    def _check_address(self, address: RedisAddress) -> None:
        if not address.tls and (self.discovery_redis_tls_ca or self.discovery_redis_tls_cert):
            raise ValueError("--discovery-redis-tls-* files need a rediss:// --discovery-redis-url")
        sentinel = self.discovery_redis_sentinel_password.get_secret_value()
        if (sentinel or self.discovery_redis_sentinel_username) and address.kind != SENTINEL:
            raise ValueError(
                "--discovery-redis-sentinel-username and -password need a redis+sentinel:// "
                "--discovery-redis-url"
            )

    def _check_tls_files(self) -> None:
        ca, cert, key = (
            self.discovery_redis_tls_ca,
            self.discovery_redis_tls_cert,
            self.discovery_redis_tls_key,
        )
        if bool(cert) != bool(key):
            raise ValueError("--discovery-redis-tls-cert and --discovery-redis-tls-key go together")
        try:
            context = ssl.create_default_context(cafile=ca)
        except (OSError, ssl.SSLError) as exc:
            raise ValueError(f"--discovery-redis-tls-ca {ca}: {_why(exc)}") from None
        if cert and key:
            try:
                # A password is never asked for: nobody sits there to answer.
                context.load_cert_chain(cert, key, password="")
            except (OSError, ssl.SSLError) as exc:
                raise ValueError(
                    f"--discovery-redis-tls-cert {cert} with --discovery-redis-tls-key: {_why(exc)}"
                ) from None


def _parse_url(url: str) -> RedisAddress:
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    if scheme not in ("redis", "rediss") or kind not in _KINDS:
        raise ValueError("has a scheme other than redis, rediss, and these with +sentinel and +cluster")
    if "@" in parts.netloc:
        raise ValueError(
            "holds credentials: give --discovery-redis-username and --discovery-redis-password instead"
        )
    if parts.query or parts.fragment:
        raise ValueError("holds more than addresses, master and database")
    kind = _KINDS[kind]
    entries = [entry for entry in parts.netloc.split(",") if entry]
    members = tuple(dict.fromkeys(_member(entry, _PORTS[kind]) for entry in entries))
    if not 1 <= len(members) <= (1 if kind == STANDALONE else MAX_MEMBERS):
        raise ValueError(f"names {len(members)} hosts")
    path = [part for part in parts.path.split("/") if part]
    master = path.pop(0) if kind == SENTINEL and path else ""
    if kind == SENTINEL and not _MASTER.fullmatch(master):
        raise ValueError("names no master")
    db = path.pop(0) if path and kind != CLUSTER else "0"
    if path or not db.isdecimal() or int(db) > MAX_DB:
        raise ValueError("has a path that is not a database's number (a cluster has none)")
    return RedisAddress(kind, scheme == "rediss", members, master, int(db))


def _member(entry: str, default_port: int) -> tuple[str, int]:
    parts: SplitResult = urlsplit(f"//{entry}")
    try:
        port = default_port if parts.port is None else parts.port
    except ValueError:
        port = 0
    host = parts.hostname or ""
    if port == 0 or not _HOST.fullmatch(host):
        raise ValueError(f"names {entry[:128]!r}, which is not a host with a port")
    return host, port


def _why(exc: OSError) -> str:
    return exc.strerror or str(exc) or type(exc).__name__
