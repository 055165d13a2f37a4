"""The etcd source with TLS and with users, on real etcd."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from integration.etcd_lab import EtcdLab
from integration.etcd_store import PREFIX, EtcdStore, written
from integration.servers import eventually
from integration.source_contract import instance, reading
from penstock.discovery.adapters.etcd_source import Pace

pytestmark = pytest.mark.integration

SELDOM = Pace(prove_every_s=3600)
USER = ("--discovery-etcd-username", "penstock", "--discovery-etcd-password", "s3cret")


class Files:
    """Certificates of one authority, as PEM files."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca, self.cert, self.key = (str(folder / name) for name in ("ca.pem", "cert.pem", "key.pem"))
        authority.cert_pem.write_to_path(self.ca)
        issued = authority.issue_cert("127.0.0.1")
        issued.private_key_pem.write_to_path(self.key)
        for blob in issued.cert_chain_pems:
            blob.write_to_path(self.cert, append=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("etcd-tls"))


@pytest.fixture(scope="module")
def encrypted(files: Files) -> Iterator[EtcdLab]:
    """It asks its clients for certificates, too."""
    tls = ("--cert-file", files.cert, "--key-file", files.key)
    etcd = EtcdLab(1, (*tls, "--client-cert-auth", "--trusted-ca-file", files.ca), scheme="https")
    etcd.ctl_flags = ("--cacert", files.ca, "--cert", files.cert, "--key", files.key)
    try:
        etcd.start()
        etcd.ctl("put", PREFIX + "a", written(instance("a")).decode())
        yield etcd
    finally:
        etcd.close()


async def test_tls_with_a_client_certificate(encrypted: EtcdLab, files: Files) -> None:
    flags = ("--discovery-etcd-tls-ca", files.ca, "--discovery-etcd-tls-cert", files.cert)
    async with reading(EtcdStore(encrypted, *flags, "--discovery-etcd-tls-key", files.key)) as reader:
        await reader.until("a")


@pytest.mark.parametrize("case", ["no client certificate", "unknown authority", "plain http"])
async def test_tls_that_cannot_be_says_why_and_lists_nothing(
    encrypted: EtcdLab, files: Files, tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    ca = Files(tmp_path).ca if case == "unknown authority" else files.ca
    scheme = "http" if case == "plain http" else "https"
    flags = () if case == "plain http" else ("--discovery-etcd-tls-ca", ca)
    store = EtcdStore(encrypted, *flags, endpoints=f"{scheme}://{encrypted.endpoints}")
    async with reading(store) as reader:
        why = {
            "no client certificate": "TLS fails",
            "unknown authority": "its certificate is not accepted",
            "plain http": "does it want https?",
        }
        await eventually(lambda: why[case] in caplog.text)
        assert not reader.states


@pytest.fixture(scope="module")
def with_users() -> Iterator[EtcdLab]:
    """Root, and penstock, who may read our prefix; tokens end soon."""
    etcd = EtcdLab(1, ("--auth-token-ttl", "1", "--bcrypt-cost", "4"))
    try:
        etcd.start()
        etcd.ctl("put", PREFIX + "a", written(instance("a")).decode())
        for step in (
            "user add root:root",
            "role add reader",
            f"role grant-permission reader --prefix=true read {PREFIX}",
            "user add penstock:s3cret",
            "user grant-role penstock reader",
            "user grant-role root root",
            "auth enable",
        ):
            etcd.ctl(*step.split())
        etcd.ctl_flags = ("--user", "root:root")
        yield etcd
    finally:
        etcd.close()


@pytest.fixture
def guarded(with_users: EtcdLab) -> Iterator[EtcdLab]:
    """It holds `a`."""
    yield with_users
    with_users.ctl("del", PREFIX + "b")


async def test_a_user_reads_what_it_may_for_longer_than_its_token_lives(guarded: EtcdLab) -> None:
    """It asks more seldom than tokens live: its questions find the token gone."""
    member = guarded.members[0]
    store = EtcdStore(guarded, *USER, "--discovery-etcd-refresh-interval-sec", "2", pace=SELDOM)

    async def authenticated() -> float:
        return await member.metric("grpc_server_started_total", grpc_method="Authenticate")

    before = await authenticated()
    async with reading(store) as reader:
        await reader.until("a")

        async def anew() -> bool:
            return await authenticated() >= before + 2

        await eventually(anew)
        guarded.ctl("put", PREFIX + "b", written(instance("b")).decode())
        await reader.until("a", "b")


async def test_rights_that_are_taken_and_given_back_are_a_stale_list(guarded: EtcdLab) -> None:
    async with reading(EtcdStore(guarded, *USER)) as reader:
        await reader.until("a")
        guarded.ctl("user", "revoke-role", "penstock", "reader")
        await reader.until_stale(True)
        assert "permission denied" in reader.last.stale
        assert reader.lists("a")
        guarded.ctl("user", "grant-role", "penstock", "reader")
        await reader.until_stale(False)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (
            ("--discovery-etcd-username", "penstock", "--discovery-etcd-password", "wr0ng"),
            "invalid user ID or password",
        ),
        ((), "user name is empty"),
    ],
)
async def test_a_wrong_or_missing_user_is_told_without_its_password(
    guarded: EtcdLab, flags: tuple[str, ...], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with reading(EtcdStore(guarded, *flags)) as reader:
        await eventually(lambda: why in caplog.text)
        assert "wr0ng" not in caplog.text
        assert not reader.states


async def test_a_user_is_no_hindrance_where_etcd_asks_for_none(guarded: EtcdLab) -> None:
    guarded.ctl("auth", "disable")
    async with reading(EtcdStore(guarded, *USER)) as reader:
        await reader.until("a")
        guarded.ctl("auth", "enable")
        guarded.ctl_flags = ("--user", "root:root")
        guarded.ctl("put", PREFIX + "b", written(instance("b")).decode())
        await reader.until("a", "b")
