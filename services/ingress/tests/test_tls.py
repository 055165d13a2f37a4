"""HTTPS on the public listener: the same HTTP, and handshakes that hold nothing up."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trustme
from integration.servers import eventually

from penstock.common.settings import SettingsError, load
from penstock.common.telemetry import Metrics
from penstock.ingress.certificate_keeping import CertificateKeeper
from penstock.ingress.certificates import BadCertificates, Certificates, read_certificates
from penstock.ingress.settings import IngressSettings

from .conftest import LabOf
from .ingress_lab import BODY, HOST, STREAM_BODY, WAIT_S, Lab, Peer

LARGE = b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % (b"x" * 3_000_000)


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> dict[str, str]:
    """The flags' values."""
    return written(authority, tmp_path)


def written(authority: trustme.CA, folder: Path, name: str = HOST) -> dict[str, str]:
    pair = authority.issue_cert(name)
    cert, key = folder / "tls.crt", folder / "tls.key"
    cert.write_bytes(b"".join(part.bytes() for part in pair.cert_chain_pems))
    key.write_bytes(pair.private_key_pem.bytes())
    return {"tls_cert": str(cert), "tls_key": str(key)}


@pytest.fixture
def trust(authority: trustme.CA) -> ssl.SSLContext:
    """What a client knows."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


Connect = Callable[[Lab], Awaitable[Peer]]


@pytest.fixture
def connect(trust: ssl.SSLContext) -> Connect:
    async def connected(lab: Lab) -> Peer:
        reader, writer = await asyncio.open_connection(HOST, lab.port, ssl=trust, limit=2**20)
        return lab.keep(Peer(reader, writer))

    return connected


def handshakes(lab: Lab, result: str) -> float:
    return lab.metric("penstock_ingress_tls_handshakes_total", result)


async def test_requests_follow_each_other_on_one_connection(
    lab_of: LabOf, files: dict[str, str], connect: Connect
) -> None:
    lab = await lab_of(**files)
    engine = await lab.engine()
    client = await connect(lab)
    # The first comes with the end of the handshake, the second before the first is answered.
    client.post()
    client.post(STREAM_BODY)
    peer = await engine.accept()
    assert (await peer.request())[2] == BODY
    peer.answer(b"first")
    assert (await client.response()).body == b"first"
    assert (await peer.request())[2] == STREAM_BODY
    peer.begin_stream()
    for word in ("a", "b"):
        wire = peer.event(word)
        if word == "a":
            await client.head()
        # Each piece comes when it is sent, not at the end.
        assert await client.exactly(len(wire)) == wire
    peer.send(b"0\r\n\r\n")
    assert await client.exactly(5) == b"0\r\n\r\n"
    client.send(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
    assert (await client.response()).status == 200
    assert handshakes(lab, "done") == 1


async def test_large_bodies_pass_in_both_directions(
    lab_of: LabOf, files: dict[str, str], connect: Connect
) -> None:
    lab = await lab_of(**files)
    engine = await lab.engine()
    client = await connect(lab)
    client.post(LARGE)
    peer = await engine.accept()
    assert (await peer.request())[2] == LARGE
    large = bytes(range(256)) * 40_000
    peer.answer(large)
    assert (await client.response()).body == large
    # In chunks, which the gateway reads by turns.
    pieces = [LARGE[at : at + 100_000] for at in range(0, len(LARGE), 100_000)]
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n"
    client.send(head + b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n")
    assert (await peer.request())[2] == LARGE
    peer.answer()
    assert (await client.response()).status == 200


async def test_a_client_that_reads_slowly_pauses_its_upstream_and_loses_nothing(
    lab_of: LabOf, files: dict[str, str], connect: Connect
) -> None:
    lab = await lab_of(**files)
    engine = await lab.engine(send_buffer=65536)
    client = await connect(lab)
    client.writer.transport.pause_reading()  # type: ignore[attr-defined]
    client.post()
    peer = await engine.accept()
    await peer.request()
    large = b"0123456789abcdef" * 2_000_000
    peer.answer(large)
    buffered = peer.writer.transport.get_write_buffer_size
    last = -1
    while (now := buffered()) != last or not now:
        last = now
        async with asyncio.timeout(WAIT_S):
            other = await connect(lab)
            other.send(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
            assert (await other.response()).status == 200
    assert now > 0
    client.writer.transport.resume_reading()  # type: ignore[attr-defined]
    assert (await client.response()).body == large


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_a_client_that_leaves_cancels_its_request(
    lab_of: LabOf, files: dict[str, str], connect: Connect, end: str
) -> None:
    lab = await lab_of(**files)
    engine = await lab.engine()
    client = await connect(lab)
    client.post(STREAM_BODY)
    peer = await engine.accept()
    await peer.request()
    peer.begin_stream()
    peer.event("a")
    await client.head()
    getattr(client, end)()
    await peer.gone()
    assert (await lab.outcome())["outcome"] == "client_gone"


async def test_what_an_engine_breaks_off_is_no_clean_end(
    lab_of: LabOf, files: dict[str, str], connect: Connect
) -> None:
    lab = await lab_of(**files)
    engine = await lab.engine()
    client = await connect(lab)
    client.post()
    peer = await engine.accept()
    await peer.request()
    peer.send(b"HTTP/1.1 200 OK\r\n\r\nhalf of")
    await client.until(b"half of")
    peer.reset()
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await client.rest()


@pytest.mark.parametrize(
    ("wire", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-length: 9999999\r\n\r\n", 413),
    ],
)
async def test_what_is_refused_is_answered_before_the_end(
    lab_of: LabOf, files: dict[str, str], connect: Connect, wire: bytes, status: int
) -> None:
    lab = await lab_of(**files)
    client = await connect(lab)
    client.send(wire)
    response = await client.response()
    assert (response.status, response.headers["connection"]) == (status, "close")
    client.close()
    await eventually(lambda: not lab.server.connections)


async def test_who_speaks_no_tls_or_another_version_is_let_go(
    lab_of: LabOf, files: dict[str, str], trust: ssl.SSLContext, connect: Connect
) -> None:
    lab = await lab_of(**files, tls_min_version="1.3")
    plain = await lab.client()
    plain.send(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
    await plain.gone()
    trust.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await connect(lab)
    await eventually(lambda: handshakes(lab, "failed") == 2)
    trust.maximum_version = ssl.TLSVersion.MAXIMUM_SUPPORTED
    await connect(lab)


async def test_handshakes_count_as_connections_and_end_in_time(
    lab_of: LabOf, files: dict[str, str], connect: Connect
) -> None:
    lab = await lab_of(**files, connection_limit=2, header_timeout=1.0)
    silent = [await lab.client() for _ in range(2)]
    third = await lab.client()
    await third.gone()
    assert lab.metric("penstock_ingress_connections_refused_total") == 1
    for peer in silent:
        await peer.gone()
    client = await connect(lab)
    client.send(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
    assert (await client.response()).status == 200


async def test_clients_prove_themselves_if_they_are_to(
    lab_of: LabOf,
    authority: trustme.CA,
    files: dict[str, str],
    tmp_path: Path,
    trust: ssl.SSLContext,
    connect: Connect,
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    lab = await lab_of(**files, tls_client_ca=str(tmp_path / "ca.pem"))
    with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
        # Under TLS 1.3 the client is through before the gateway has looked.
        await (await connect(lab)).until(b"\n")
    stranger = trustme.CA().issue_cert("client@example.org")
    stranger.configure_cert(trust)
    with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
        await (await connect(lab)).until(b"\n")
    authority.issue_cert("client@example.org").configure_cert(trust)
    client = await connect(lab)
    client.send(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
    assert (await client.response()).status == 200


async def test_a_fresh_certificate_is_shown_to_new_clients_and_old_ones_stay(
    lab_of: LabOf, authority: trustme.CA, files: dict[str, str], tmp_path: Path, connect: Connect
) -> None:
    lab = await lab_of(**files)

    def serial(peer: Peer) -> str:
        return str(peer.writer.get_extra_info("peercert")["serialNumber"])

    old = await connect(lab)
    written(authority, tmp_path)
    found = lab.settings.certificates()
    assert found is not None
    lab.server.use(found.context())
    new = await connect(lab)
    assert serial(old) != serial(new)
    for client in (old, new):
        client.send(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
        assert (await client.response()).status == 200


# -- files ---------------------------------------------------------------------------------------------


def faults(files: dict[str, str]) -> str:
    flags = [part for name, value in files.items() for part in (f"--{name.replace('_', '-')}", value)]
    with pytest.raises(SettingsError) as caught:
        load(IngressSettings, flags, prog="p", environ={})
    return str(caught.value)


def test_a_pair_that_cannot_be_used_stops_the_start(
    authority: trustme.CA, files: dict[str, str], tmp_path: Path
) -> None:
    cert, key = files["tls_cert"], files["tls_key"]
    assert "go together" in faults({"tls_cert": cert})
    assert "needs --tls-cert" in faults({"tls_client_ca": cert})
    assert "nowhere cannot be read" in faults({"tls_cert": cert, "tls_key": str(tmp_path / "nowhere")})
    Path(cert).write_bytes(authority.issue_cert("other").cert_chain_pems[0].bytes())
    assert "key values mismatch" in faults(files)
    Path(cert).write_bytes(b"nonsense")
    assert "--tls-cert and --tls-key cannot be used" in faults(files)
    written(authority, tmp_path)
    assert "--tls-client-ca cannot be used" in faults({**files, "tls_client_ca": key})


def test_an_encrypted_key_is_refused_and_nobody_is_asked(
    authority: trustme.CA, files: dict[str, str]
) -> None:
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key(Path(files["tls_key"]).read_bytes(), None)
    encrypted = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
    Path(files["tls_key"]).write_bytes(encrypted)
    assert "encrypted" in faults(files)


class Watch:
    """A keeper, and what it told."""

    def __init__(self, files: dict[str, str]) -> None:
        self.told: list[tuple[bool, str]] = []
        self.used: list[Certificates] = []
        self.metrics = Metrics()

        def read() -> Certificates:
            return read_certificates(Path(files["tls_cert"]), Path(files["tls_key"]), None)

        def degraded(what: str, active: bool, cause: str) -> None:
            assert what == "the TLS certificate"
            self.told.append((active, cause))

        self.keeper = CertificateKeeper(read(), read, self.metrics, degraded)

    async def use(self, found: Certificates) -> None:
        self.used.append(found)

    def stale(self) -> float:
        (family,) = [f for f in self.metrics.snapshot() if f.name == "penstock_ingress_tls_stale"]
        return family.samples[0].value


def put(path: str, data: bytes) -> None:
    """Write a file in place."""
    Path(path).write_bytes(data)


async def test_a_broken_pair_leaves_the_last_one_and_is_told_once(
    authority: trustme.CA, files: dict[str, str], tmp_path: Path
) -> None:
    watch = Watch(files)
    first = watch.keeper.current
    task = asyncio.create_task(watch.keeper.follow(watch.use))
    try:
        put(files["tls_key"], b"half of a key")
        await eventually(lambda: watch.told)
        assert (watch.keeper.current, watch.stale(), watch.used) == (first, 1, [])
        os.unlink(files["tls_key"])
        await eventually(lambda: len(watch.told) == 2)
        assert [active for active, _ in watch.told] == [True, True]
        assert "cannot be read" in watch.told[1][1]
        written(authority, tmp_path)
        await eventually(lambda: watch.used)
        await eventually(lambda: not watch.stale())
        assert watch.told[2:] == [(False, "")]
        assert watch.keeper.current == watch.used[0] != first
    finally:
        task.cancel()


async def test_the_old_pair_put_back_is_no_fault_any_more(
    authority: trustme.CA, files: dict[str, str]
) -> None:
    watch = Watch(files)
    task = asyncio.create_task(watch.keeper.follow(watch.use))
    try:
        put(files["tls_cert"], b"")
        await eventually(watch.stale)
        put(files["tls_cert"], watch.keeper.current.cert)
        watch.keeper.look()
        await eventually(lambda: not watch.stale())
        assert watch.used == []
    finally:
        task.cancel()


def test_no_certificate_is_read_beyond_its_bound(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(b"x" * (1024 * 1024 + 1))
    with pytest.raises(BadCertificates, match="more than"):
        read_certificates(large, large, None)
