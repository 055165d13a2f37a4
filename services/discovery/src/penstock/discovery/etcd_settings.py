"""Settings of the etcd source."""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, SecretStr, model_validator

from penstock.discovery.record_settings import RecordSettings

DEFAULT_PORT = 2379
_HOST = re.compile(r"[A-Za-z0-9_.:-]{1,253}")


class EtcdSettings(RecordSettings):
    """How etcd is reached, and how its records are read."""

    discovery_etcd_endpoints: str = Field(
        "etcd:2379",
        max_length=8192,
        description="etcd members, comma-separated: [http[s]://]host[:port]; all of them are used",
    )
    discovery_etcd_username: str = Field(
        "", max_length=512, description="etcd user, with --discovery-etcd-password"
    )
    discovery_etcd_password: SecretStr = Field(SecretStr(""), description="etcd password")
    discovery_etcd_dial_timeout: float = Field(
        5.0,
        gt=0,
        le=300,
        description="seconds a member may take to connect and to answer, before the next one is asked",
    )
    discovery_etcd_lease_ttl: int = Field(
        60,
        ge=1,
        le=86400,
        description="seconds that a record without a lease counts from its own timestamp on, and that "
        "instances stay after etcd lost its data (records with a lease live as long as it)",
    )
    discovery_etcd_refresh_interval_sec: float = Field(
        3600, ge=0.1, le=604800, description="seconds between two full listings (the watch is the main way)"
    )
    discovery_etcd_prefix: str = Field(
        "",
        max_length=512,
        description="prefix of the records' keys; empty for that of --discovery-record-format",
    )
    discovery_etcd_tls_ca: Path | None = Field(
        None, description="CA certificates that etcd is verified with (PEM); the system's if not given"
    )
    discovery_etcd_tls_cert: Path | None = Field(
        None, description="client certificate for etcd (PEM), with --discovery-etcd-tls-key"
    )
    discovery_etcd_tls_key: Path | None = Field(
        None, description="key of the client certificate for etcd (PEM)"
    )

    @model_validator(mode="after")
    def _etcd(self) -> Self:
        faults = []
        if bool(self.discovery_etcd_username) != bool(self.discovery_etcd_password.get_secret_value()):
            faults.append("--discovery-etcd-username and --discovery-etcd-password go together")
        if self.discovery_etcd_tls_key and not self.discovery_etcd_tls_cert:
            faults.append("--discovery-etcd-tls-key needs --discovery-etcd-tls-cert")
        for check in (self.etcd_members, self.etcd_tls):
            try:
                check()
            except ValueError as exc:
                faults.append(str(exc))
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def etcd_members(self) -> tuple[str, ...]:
        """Base addresses such as `https://etcd-0:2379`; https by default when TLS files are given.

        Raises:
            ValueError: naming every faulty entry.
        """
        files = self.discovery_etcd_tls_ca or self.discovery_etcd_tls_cert
        members: list[str] = []
        faults = []
        for entry in filter(None, map(str.strip, self.discovery_etcd_endpoints.split(","))):
            try:
                member = _member(entry, "https" if files else "http")
                if files and member.startswith("http:"):
                    raise ValueError("is plain http, but --discovery-etcd-tls-* files are given")
            except ValueError as exc:
                faults.append(f"--discovery-etcd-endpoints: {_shown(entry)} {exc}")
                continue
            if member not in members:
                members.append(member)
        if faults:
            raise ValueError("; ".join(faults))
        if not members:
            raise ValueError("--discovery-etcd-endpoints names no member, e.g. etcd-0:2379,etcd-1:2379")
        return tuple(members)

    def etcd_tls(self) -> ssl.SSLContext | None:
        """What https members are verified with; None without files: then by the system's certificates.

        Raises:
            ValueError: a file cannot be used.
        """
        if not (self.discovery_etcd_tls_ca or self.discovery_etcd_tls_cert):
            return None
        try:
            context = ssl.create_default_context(cafile=self.discovery_etcd_tls_ca)
        except (OSError, ssl.SSLError) as exc:
            raise ValueError(f"--discovery-etcd-tls-ca {self.discovery_etcd_tls_ca}: {_why(exc)}") from None
        if cert := self.discovery_etcd_tls_cert:
            try:
                # A password is never asked for: nobody sits there to answer.
                context.load_cert_chain(cert, self.discovery_etcd_tls_key, password="")
            except (OSError, ssl.SSLError) as exc:
                raise ValueError(
                    f"--discovery-etcd-tls-cert {cert} with --discovery-etcd-tls-key: {_why(exc)}"
                ) from None
        return context


def _member(entry: str, scheme: str) -> str:
    parts = urlsplit(entry if "://" in entry else f"{scheme}://{entry}")
    if parts.scheme not in ("http", "https"):
        raise ValueError("has a scheme other than http and https")
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds credentials: give --discovery-etcd-username and --discovery-etcd-password")
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError("holds more than host and port")
    host = parts.hostname or ""
    if not _HOST.fullmatch(host):
        raise ValueError("has no valid host")
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{_port(parts)}"


def _port(parts: SplitResult) -> int:
    try:
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError("has a port that is not a number from 1 to 65535")
    return port


def _shown(entry: str) -> str:
    """Without what may be a password."""
    return repr(entry.rpartition("@")[2][:128])


def _why(exc: OSError) -> str:
    return exc.strerror or str(exc) or type(exc).__name__
