"""Settings of TLS on the public listener."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from penstock.common.settings import Settings
from penstock.ingress.certificates import BadCertificates, Certificates, read_certificates


class TlsSettings(Settings):
    """HTTPS on the public port, in the place of HTTP."""

    tls_cert: Path | None = Field(
        None,
        description="certificate of the public listener with its chain (PEM), with --tls-key: it speaks "
        "HTTPS; read again when it changes",
    )
    tls_key: Path | None = Field(None, description="key of that certificate (PEM, not encrypted)")
    tls_min_version: Literal["1.2", "1.3"] = Field("1.2", description="oldest version of TLS that is spoken")
    tls_client_ca: Path | None = Field(
        None,
        description="CA certificates that clients' certificates are verified with (PEM); without one of "
        "those no client gets in",
    )

    @model_validator(mode="after")
    def _usable_certificates(self) -> Self:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("--tls-cert and --tls-key go together: give both or neither")
        if self.tls_client_ca and not self.tls_cert:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        try:
            found = self.certificates()
            if found is not None:
                found.context()
        except BadCertificates as exc:
            raise ValueError(f"{exc}; give a PEM certificate and its own key") from None
        return self

    def certificates(self) -> Certificates | None:
        """What the files hold now; None without TLS. Raises BadCertificates."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return read_certificates(self.tls_cert, self.tls_key, self.tls_client_ca, self.tls_min_version)
