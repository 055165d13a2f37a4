"""The shadow over HTTP: what it is sent, and what it cannot do to us."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from typing import Self

import pytest
import trustme

from penstock.mirror.adapters.shadow_client import ShadowClient
from penstock.mirror.ports import ShadowFailed
from penstock.mirror.shadow_request import ShadowRequest

WAIT_S = 30.0


class Server:
    """Says what it is told to, whatever it is asked; `heard` are the requests."""

    def __init__(
        self, *pieces: bytes, endless: bytes = b"", hold: bool = False, tls: ssl.SSLContext | None = None
    ) -> None:
        self._pieces, self._endless, self._hold, self._tls = pieces, endless, hold, tls
        self.heard: list[bytes] = []
        self.connections = 0
        self.port = 0
        self._over = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._talk, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._over.set()
        self._server.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            self.heard.append(head + await reader.readexactly(4))
            for piece in self._pieces:
                writer.write(piece)
                await writer.drain()
            while self._endless and not self._over.is_set():
                writer.write(self._endless)
                await writer.drain()
            if self._hold:
                await self._over.wait()
        writer.transport.abort() if self._endless else writer.close()


@pytest.fixture
async def client() -> AsyncIterator[ShadowClient]:
    client = ShadowClient(4, max_response_bytes=100_000)
    yield client
    await client.close()


def request(port: int, path: str = "/v1/x?a=%2F") -> ShadowRequest:
    headers = (("Content-Type", "application/json"), ("x-own", "caf\xe9"), ("x-two", "1"), ("x-two", "2"))
    return ShadowRequest("POST", f"http://127.0.0.1:{port}{path}", headers, b"body")


async def test_it_is_sent_what_the_request_says_and_nothing_more(client: ShadowClient) -> None:
    answer = b'{"finish_reason":"stop","usage":{"completion_tokens":5}}'
    async with Server(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(answer), answer) as server:
        figures = await client.send(request(server.port), WAIT_S)
        first, *lines = server.heard[0].decode("latin-1").split("\r\n")
    assert (figures.status, figures.bytes_out) == (200, len(answer))
    assert (figures.completion_tokens, figures.finish_reason) == (5, "stop")
    assert 0 < figures.ttft_ms <= figures.total_ms
    assert first == "POST /v1/x?a=%2F HTTP/1.1"
    assert lines[-1] == "body"
    names = sorted(line.partition(":")[0].lower() for line in lines[:-2])
    assert names == ["content-length", "content-type", "host", "x-own", "x-two", "x-two"]


async def test_a_redirect_is_an_answer_and_is_not_followed(client: ShadowClient) -> None:
    async with Server() as elsewhere:
        head = (
            b"HTTP/1.1 307 X\r\nlocation: http://127.0.0.1:%d/\r\ncontent-length: 0\r\n\r\n" % elsewhere.port
        )
        async with Server(head) as server:
            figures = await client.send(request(server.port), WAIT_S)
        assert (figures.status, elsewhere.connections) == (307, 0)


async def test_a_cookie_is_not_kept(client: ShadowClient) -> None:
    head = b"HTTP/1.1 200 OK\r\nset-cookie: a=b; path=/\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
    async with Server(head) as server:
        for _ in range(2):
            await client.send(request(server.port), WAIT_S)
        assert b"cookie" not in server.heard[1].lower()


@pytest.mark.parametrize(
    "pieces",
    [(), (b"HTTP/1.1 200 OK\r\n",), (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n", b"a")],
    ids=["no head", "half a head", "half a body"],
)
async def test_one_that_stays_silent_is_left(client: ShadowClient, pieces: tuple[bytes, ...]) -> None:
    async with Server(*pieces, hold=True) as server:
        with pytest.raises(TimeoutError):
            await client.send(request(server.port), 0.05)


STREAM = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


async def test_a_response_that_never_ends_is_left_when_the_time_is_up() -> None:
    client = ShadowClient(1, max_response_bytes=2**60)
    async with Server(STREAM, endless=b"1\r\nx\r\n") as server:
        with pytest.raises(TimeoutError):
            await client.send(request(server.port), 0.1)
    await client.close()


@pytest.mark.parametrize(
    ("pieces", "endless", "reason"),
    [
        ((STREAM,), b"400\r\n" + b"x" * 1024 + b"\r\n", "oversize"),
        ((b"HTTP/1.1 200 OK\r\n",), b"a: " + b"x" * 1000 + b"\r\n", "broken"),
        ((b"\x00\xff" * 1000,), b"", "broken"),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",), b"", "broken"),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc",), b"", "broken"),
        ((STREAM, b"zz\r\n"), b"", "broken"),
        ((), b"", "broken"),
    ],
    ids=["endless body", "endless head", "nonsense", "length", "cut short", "chunk", "hang up"],
)
async def test_what_is_no_response_is_a_failure(
    client: ShadowClient, pieces: tuple[bytes, ...], endless: bytes, reason: str
) -> None:
    async with Server(*pieces, endless=endless) as server:
        with pytest.raises(ShadowFailed) as failed:
            await client.send(request(server.port), WAIT_S)
    assert failed.value.reason == reason


async def test_a_packed_body_is_not_unpacked(client: ShadowClient) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 9\r\n\r\nnot gzip!"
    async with Server(head) as server:
        assert (await client.send(request(server.port), WAIT_S)).bytes_out == 9


async def test_one_that_is_not_there_is_unreachable(client: ShadowClient) -> None:
    async with Server() as server:
        port = server.port
    with pytest.raises(ShadowFailed) as failed:
        await client.send(request(port), WAIT_S)
    assert failed.value.reason == "unreachable"
    with pytest.raises(ShadowFailed):
        await client.send(ShadowRequest("POST", "http://nowhere.invalid/", (), b""), WAIT_S)


async def test_a_certificate_that_cannot_be_verified_is_refused(client: ShadowClient) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(tls)
    async with Server(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", tls=tls) as server:
        url = f"https://127.0.0.1:{server.port}/"
        with pytest.raises(ShadowFailed, match="certificate verify failed"):
            await client.send(ShadowRequest("POST", url, (), b"body"), WAIT_S)
    assert server.heard == []
