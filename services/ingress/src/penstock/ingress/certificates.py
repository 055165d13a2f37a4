"""The certificate of the public listener: what its files hold, and whether that can be used."""

from __future__ import annotations

import os
import ssl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

MAX_FILE_BYTES = 1024 * 1024
Version = Literal["1.2", "1.3"]
_VERSIONS: dict[str, ssl.TLSVersion] = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}
# What clients may choose by ALPN. HTTP/2 belongs to a proxy in front.
PROTOCOLS = ["http/1.1"]


class BadCertificates(Exception):
    """Files that cannot be used; the text names them and holds nothing of the key."""


class Certificates(msgspec.Struct, frozen=True, tag="certificates"):
    """The files' content (PEM): the certificate with its chain, its key, and the authorities of clients'
    certificates, empty where clients need none."""

    cert: bytes
    key: bytes
    client_ca: bytes = b""
    min_version: Version = "1.2"

    def context(self) -> ssl.SSLContext:
        """For connections from here on. Raises BadCertificates."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = _VERSIONS[self.min_version]
        context.set_alpn_protocols(PROTOCOLS)
        try:
            with _file_of(self.cert) as cert, _file_of(self.key) as key:
                context.load_cert_chain(cert, key, _no_password)
        except (OSError, ValueError) as exc:
            raise BadCertificates(f"--tls-cert and --tls-key cannot be used: {_why(exc)}") from None
        if self.client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(cadata=self.client_ca.decode("ascii"))
            except (OSError, ValueError) as exc:
                raise BadCertificates(f"--tls-client-ca cannot be used: {_why(exc)}") from None
        return context


def read_certificates(
    cert: Path, key: Path, client_ca: Path | None, min_version: Version = "1.2"
) -> Certificates:
    """What the files hold now, unchecked. Raises BadCertificates."""
    return Certificates(_read(cert), _read(key), _read(client_ca) if client_ca else b"", min_version)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise BadCertificates(f"{path} cannot be read: {exc.strerror or exc}") from None
    if len(data) > MAX_FILE_BYTES:
        raise BadCertificates(f"{path} has more than {MAX_FILE_BYTES} bytes")
    return data


@contextmanager
def _file_of(data: bytes) -> Iterator[str]:
    """A name under which OpenSSL can read `data`, in memory where the system can do that; only ours."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("pem"), "wb", buffering=0) as file:
            file.write(data)
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile() as named:
            named.write(data)
            named.flush()
            yield named.name


def _no_password() -> str:
    raise ValueError("the key is encrypted, and nobody is there to type its password")


def _why(exc: OSError | ValueError) -> str:
    if isinstance(exc, ssl.SSLError) and exc.reason:
        return exc.reason.replace("_", " ").lower()
    return getattr(exc, "strerror", None) or str(exc)
