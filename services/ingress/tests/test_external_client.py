"""External endpoints over TLS and through HTTP proxies, on real sockets."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from .conftest import LabOf
from .ingress_lab import HOST, Lab, Peer
from .scripted import Endpoint, config, refusing_port


class Secure(Endpoint):
    """An endpoint with a certificate."""

    def __init__(self, authority: trustme.CA, name: str = "localhost") -> None:
        super().__init__("ok")
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(name).configure_cert(self._tls)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]


class Tunnels:
    """An HTTP proxy: tunnels what it is asked to with CONNECT, or answers `refusal`."""

    def __init__(self, refusal: bytes = b"") -> None:
        self.refusal, self.port = refusal, 0
        self.requests: list[tuple[str, dict[str, str]]] = []
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        first, headers, _ = await Peer(reader, writer).head()
        self.requests.append((first, headers))
        if self.refusal:
            writer.write(self.refusal)
            if self.refusal.endswith(b"\r\n\r\n"):
                writer.close()
            return
        port = int(first.split()[1].rpartition(":")[2])
        far_reader, far_writer = await asyncio.open_connection(HOST, port)
        self._writers.append(far_writer)
        writer.write(b"HTTP/1.1 200 Connection established\r\nx: y\r\n\r\n")
        await asyncio.gather(self._pass(reader, far_writer), self._pass(far_reader, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        writer.close()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
async def secure(authority: trustme.CA) -> AsyncIterator[Secure]:
    one = Secure(authority)
    await one.start()
    yield one
    one.close()


def weighted(url: str) -> dict[str, Any]:
    return {"route_policy": "weight", "route_config": config({"base_url": url, "weight": 1})}


async def trusting(lab_of: LabOf, authority: trustme.CA, tmp_path: Path, url: str) -> Lab:
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return await lab_of(route_tls_ca=tmp_path / "ca.pem", **weighted(url))


async def test_an_endpoint_is_asked_over_verified_tls_and_its_connection_kept(
    lab_of: LabOf, secure: Secure, authority: trustme.CA, tmp_path: Path
) -> None:
    lab = await trusting(lab_of, authority, tmp_path, f"https://localhost:{secure.port}/v1")
    client = await lab.client()
    for _ in range(3):
        assert (await client.ask()).body == b'{"ok":true}'
    first, headers, _ = secure.requests[0]
    assert first == "POST /v1/chat/completions HTTP/1.1"
    assert headers["host"] == f"localhost:{secure.port}"
    assert lab.metric("penstock_ingress_external_connects_total", "connected") == 1


async def test_a_certificate_of_somebody_else_or_for_another_name_is_refused(
    lab_of: LabOf, secure: Secure, authority: trustme.CA, tmp_path: Path
) -> None:
    strange = await lab_of(**weighted(f"https://localhost:{secure.port}"))
    other = await trusting(lab_of, authority, tmp_path, f"https://{HOST}:{secure.port}")
    for lab in (strange, other):
        response = await (await lab.client()).ask()
        assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
        assert "certificate" in response.error["message"].lower()
    assert not secure.requests


async def test_tls_to_what_speaks_none_is_a_failed_attempt(lab_of: LabOf) -> None:
    plain = Endpoint("no HTTP")
    await plain.start()
    lab = await lab_of(connect_timeout=1.0, **weighted(f"https://{HOST}:{plain.port}"))
    assert (await (await lab.client()).ask()).status == 502
    plain.close()


async def test_a_name_that_does_not_resolve_is_a_failed_attempt(lab_of: LabOf) -> None:
    lab = await lab_of(**weighted("http://no-such-host.invalid"))
    assert (await (await lab.client()).ask()).status == 502


async def test_https_goes_through_a_tunnel_of_the_proxy(
    lab_of: LabOf,
    secure: Secure,
    authority: trustme.CA,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy = Tunnels()
    await proxy.start()
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:pw@{HOST}:{proxy.port}")
    lab = await trusting(lab_of, authority, tmp_path, f"https://localhost:{secure.port}")
    client = await lab.client()
    for _ in range(3):
        assert (await client.ask()).body == b'{"ok":true}'
    ((first, headers),) = proxy.requests
    assert first == f"CONNECT localhost:{secure.port} HTTP/1.1"
    assert headers["proxy-authorization"] == "Basic dXNlcjpwdw=="
    assert all("proxy-authorization" not in headers for _, headers, _ in secure.requests)
    proxy.close()


async def test_plain_http_goes_to_the_proxy_with_its_whole_url(
    lab_of: LabOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = Endpoint("ok")
    await proxy.start()
    monkeypatch.setenv("http_proxy", proxy.url)
    lab = await lab_of(**weighted("http://far.invalid:9000/base"))
    assert (await (await lab.client()).ask()).status == 200
    first, headers, _ = proxy.requests[0]
    assert first == "POST http://far.invalid:9000/base/v1/chat/completions HTTP/1.1"
    assert headers["host"] == "far.invalid:9000"
    proxy.close()


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "the proxy answered 407 to CONNECT"),
        (b"HTTP/1.1 200 OK\r\n\r\nmore", "the proxy answered 200 to CONNECT"),
        (b"SSH-2.0\r\n\r\n", "the proxy answered nonsense to CONNECT"),
        (b"x" * 10_000, "the proxy's answer is too large"),
        (b"HTTP/1.1 200", "no connection within 0.5 s"),
    ],
)
async def test_a_proxy_that_refuses_or_talks_nonsense_is_a_failed_attempt(
    lab_of: LabOf, monkeypatch: pytest.MonkeyPatch, refusal: bytes, words: str
) -> None:
    proxy = Tunnels(refusal)
    await proxy.start()
    monkeypatch.setenv("https_proxy", f"http://{HOST}:{proxy.port}")
    lab = await lab_of(connect_timeout=0.5, **weighted("https://far.invalid"))
    response = await (await lab.client()).ask()
    assert response.status == 502
    assert words in response.error["message"]
    proxy.close()


async def test_a_proxy_that_is_not_there_is_a_failed_attempt(
    lab_of: LabOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://{HOST}:{refusing_port()}")
    lab = await lab_of(**weighted("https://far.invalid"))
    assert (await (await lab.client()).ask()).status == 502
