"""How a client presents itself to a NATS server: what the server says first, TLS, credentials.

Apart from the client, which is compiled (decision 0066): records of msgspec need their annotations.
"""

from __future__ import annotations

import base64
import ssl

import msgspec
import nkeys

from penstock.common.settings import BusSettings


class ConnectError(Exception):
    """The server could not be connected to, or refused."""


class ServerInfo(msgspec.Struct):
    """What the server says of itself first (INFO)."""

    max_payload: int = 1024 * 1024
    tls_required: bool = False
    auth_required: bool = False
    nonce: str = ""
    headers: bool = False


def tls_context(settings: BusSettings) -> ssl.SSLContext:
    """What a connection is secured by."""
    ca = settings.nats_tls_ca
    context = ssl.create_default_context(cafile=str(ca) if ca else None)
    if settings.nats_tls_cert:
        context.load_cert_chain(str(settings.nats_tls_cert), str(settings.nats_tls_key))
    return context


def credentials(settings: BusSettings, nonce: str, user: str, password: str) -> dict[str, str]:
    """The options of CONNECT that say who we are; `user` and `password` are those of the address. Raises
    ConnectError."""
    if settings.nats_creds:
        return _signed(settings.nats_creds.read_text(encoding="utf-8"), nonce)
    if settings.nats_user:
        return {"user": settings.nats_user, "pass": settings.nats_password.get_secret_value()}
    if user and not password:
        return {"auth_token": user}
    return {"user": user, "pass": password} if user else {}


def _signed(credentials: str, nonce: str) -> dict[str, str]:
    """The file holds a user's JWT and the seed that signs the server's nonce, each between dashed lines."""
    lines = [line.strip() for line in credentials.splitlines()]
    content = [line for line in lines if line and not line.startswith(("-", "*", "NKEYs", "NEVER"))]
    jwt = next((line for line in content if line.count(".") == 2), "")
    seed = next((line for line in content if line.startswith("SU")), "")
    if not jwt or not seed:
        raise ConnectError("--nats-creds: the file holds no user JWT with its seed")
    signature = nkeys.from_seed(seed.encode()).sign(nonce.encode())
    return {"jwt": jwt, "sig": base64.urlsafe_b64encode(signature).rstrip(b"=").decode()}
