"""Every way a service can prove to NATS who it is (DESIGN D13)."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import nkeys
import pytest
import trustme

from integration.servers import NatsServer, eventually
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.messages import Heartbeat
from penstock.common.settings import BusSettings
from penstock.common.subjects import HEARTBEAT
from penstock.common.telemetry import Metrics

pytestmark = pytest.mark.integration

BEAT = Heartbeat("test", "1", "x", True)


async def works(settings: BusSettings) -> bool:
    """Whether a message gets through a bus with these settings, within two seconds."""
    bus = NatsBus(settings, "test", Metrics())
    seen: list[Heartbeat] = []
    await bus.start()
    try:
        await bus.subscribe(HEARTBEAT, seen.append)
        await eventually(lambda: bus.connected, 2.0)
        bus.publish(HEARTBEAT, BEAT, "test")
        await eventually(lambda: seen, 2.0)
    except AssertionError:
        return False
    finally:
        await bus.close()
    return seen == [BEAT]


@pytest.mark.parametrize(
    ("given", "accepted"),
    [
        (lambda url: {"nats_url": url, "nats_user": "ann", "nats_password": "s%cret"}, True),
        (lambda url: {"nats_url": url.replace("//", "//ann:s%25cret@")}, True),
        (lambda url: {"nats_url": url, "nats_user": "ann", "nats_password": "wrong"}, False),
        (lambda url: {"nats_url": url}, False),
    ],
    ids=["by flags", "in the address", "wrong password", "nothing"],
)
async def test_a_user_and_password_are_asked_for(
    given: Callable[[str], dict[str, str]], accepted: bool
) -> None:
    with NatsServer("--user", "ann", "--pass", "s%cret") as nats:
        assert await works(BusSettings.model_validate(given(nats.url))) is accepted


async def test_a_client_certificate_is_asked_for(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name, certificate in (
        ("server", authority.issue_cert("127.0.0.1")),
        ("client", authority.issue_cert("me")),
    ):
        certificate.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        certificate.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
    flags = ("--tlsverify", f"--tlscert={tmp_path}/server.pem", f"--tlskey={tmp_path}/server.key")
    with NatsServer(*flags, f"--tlscacert={tmp_path}/ca.pem") as nats:
        ca = {"nats_url": nats.url, "nats_tls_ca": tmp_path / "ca.pem"}
        pair = {"nats_tls_cert": tmp_path / "client.pem", "nats_tls_key": tmp_path / "client.key"}
        assert await works(BusSettings.model_validate({**ca, **pair}))
        assert not await works(BusSettings.model_validate(ca))
        assert not await works(BusSettings.model_validate({"nats_url": nats.url, **pair}))


def key_pair(prefix: int) -> nkeys.KeyPair:
    """A fresh key: operator, account or user."""
    return nkeys.from_seed(nkeys.encode_seed(os.urandom(32), prefix))


def signed(issuer: nkeys.KeyPair, subject: bytes, name: str, nats: dict[str, object]) -> str:
    """A NATS JWT (ed25519-nkey)."""
    claims: dict[str, object] = {
        "iat": int(time.time()),
        "iss": issuer.public_key.decode(),
        "sub": subject.decode(),
        "name": name,
        "nats": {"version": 2, **nats},
    }
    claims["jti"] = (
        base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).decode().rstrip("=")
    )

    def part(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).decode().rstrip("=")

    head = part(json.dumps({"typ": "JWT", "alg": "ed25519-nkey"}).encode())
    content = f"{head}.{part(json.dumps(claims).encode())}"
    return f"{content}.{part(issuer.sign(content.encode()))}"


async def test_a_credentials_file_is_accepted(tmp_path: Path) -> None:
    operator, user = key_pair(nkeys.PREFIX_BYTE_OPERATOR), key_pair(nkeys.PREFIX_BYTE_USER)
    account, system = key_pair(nkeys.PREFIX_BYTE_ACCOUNT), key_pair(nkeys.PREFIX_BYTE_ACCOUNT)
    limits = {"subs": -1, "conn": -1, "leaf": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1}
    accounts = {
        key.public_key.decode(): signed(operator, key.public_key, "a", {"type": "account", "limits": limits})
        for key in (account, system)
    }
    preloaded = "\n".join(f"  {key}: {jwt}" for key, jwt in accounts.items())
    config = tmp_path / "nats.conf"
    config.write_text(
        f"operator: {signed(operator, operator.public_key, 'o', {'type': 'operator'})}\n"
        f"system_account: {system.public_key.decode()}\n"
        f"resolver: MEMORY\nresolver_preload: {{\n{preloaded}\n}}\n"
    )
    user_jwt = signed(account, user.public_key, "u", {"type": "user", "subs": -1, "data": -1, "payload": -1})
    creds = tmp_path / "user.creds"
    creds.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    with NatsServer("--config", str(config)) as nats:
        assert await works(BusSettings(nats_url=nats.url, nats_creds=creds))
        assert not await works(BusSettings(nats_url=nats.url))
