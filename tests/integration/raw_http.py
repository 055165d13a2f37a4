"""Bare bytes on both sides of the gateway: a strict reader of its answers, and an engine that breaks HTTP."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Self

from integration.servers import eventually

HOST = "127.0.0.1"
MODEL = b"sim-model"
WAIT_S = 60.0
BODY = b'{"model":"%b","messages":[{"role":"user","content":"hi"}]}' % MODEL
CHAT = b"POST /v1/chat/completions HTTP/1.1"


def request(*fields: bytes, body: bytes = BODY, start: bytes = CHAT, host: bool = True) -> bytes:
    """A request with the fields given; Content-Length is not among them unless it is given."""
    head = [start, *([b"Host: gateway"] if host else []), *fields]
    return b"".join(line + b"\r\n" for line in head) + b"\r\n" + body


def sized(*fields: bytes, body: bytes = BODY, start: bytes = CHAT, host: bool = True) -> bytes:
    """A request with its Content-Length."""
    return request(*fields, b"Content-Length: %d" % len(body), body=body, start=start, host=host)


def chunked(*chunks: bytes, fields: Sequence[bytes] = (), end: bytes = b"0\r\n\r\n") -> bytes:
    """A chat whose body is made of the bytes given, each a chunk as it stands on the wire."""
    return request(b"Transfer-Encoding: chunked", *fields, body=b"".join(chunks) + end)


def chunk(data: bytes = BODY, extension: bytes = b"") -> bytes:
    """One valid chunk."""
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


HEALTH = request(b"Connection: close", body=b"", start=b"GET /health HTTP/1.1")


class Answer(NamedTuple):
    """One response as the client saw it."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        """The code of an error of the gateway, after a check of its whole form (DESIGN 3.2)."""
        if self.status < 400 or "target-pod" in self.headers:
            return None
        assert self.headers["content-type"] == "application/json"
        assert self.headers["x-request-id"]
        if not self.body:
            return None
        error = json.loads(self.body)["error"]
        assert set(error) == {"message", "type", "code", "param"}
        assert isinstance(error["message"], str)
        assert error["type"] in ("invalid_request_error", "overloaded_error", "api_error")
        return str(error["code"])


async def read_answer(reader: asyncio.StreamReader, *, bodiless: bool = False) -> Answer:
    """The next response. AssertionError if it is not strict HTTP/1.1, IncompleteReadError or ConnectionError
    if it ends early."""
    async with asyncio.timeout(WAIT_S):
        raw = await reader.readuntil(b"\r\n\r\n")
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        pairs = [line.partition(": ") for line in lines]
        headers = {name.lower(): value for name, _, value in pairs}
        assert len(headers) == len(pairs), f"a header stands twice: {lines}"
        body = await _body(reader, int(status), headers, bodiless)
        return Answer(int(status), headers, body)


async def _body(reader: asyncio.StreamReader, status: int, headers: dict[str, str], bodiless: bool) -> bytes:
    if status in (100, 204, 304):
        assert "content-length" not in headers
        assert "transfer-encoding" not in headers
        return b""
    if "content-length" in headers:
        assert "transfer-encoding" not in headers
        return b"" if bodiless else await reader.readexactly(int(headers["content-length"]))
    if "transfer-encoding" not in headers:
        assert headers["connection"] == "close"
        return await reader.read()
    assert headers["transfer-encoding"] == "chunked"
    body = b""
    while size := int((await reader.readuntil(b"\r\n"))[:-2].partition(b";")[0], 16):
        body += await reader.readexactly(size)
        assert await reader.readexactly(2) == b"\r\n"
    assert await reader.readexactly(2) == b"\r\n"
    return body


class Client:
    """One connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int, tls: ssl.SSLContext | None = None) -> Self:
        return cls(*await asyncio.open_connection(HOST, port, ssl=tls))

    async def send(self, *pieces: bytes) -> None:
        """Each piece in a write of its own. A gateway that has hung up by then has answered already."""
        for piece in pieces:
            try:
                self.writer.write(piece)
                await self.writer.drain()
            except ConnectionError:
                return

    async def ended(self) -> bool:
        """Whether the gateway ends the connection without a further byte."""
        async with asyncio.timeout(WAIT_S):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.writer.close()


@dataclass(frozen=True)
class Behaviour:
    """What an engine sends in answer to a chat, write by write, and whether it hangs up afterwards.

    `early` answers before it reads the request's body; `afterwards` is sent once the client of the
    gateway has its answer (`HostileEngine.speak`).
    """

    pieces: tuple[bytes, ...]
    close: bool = False
    early: bool = False
    afterwards: bytes = b""


@dataclass
class HostileEngine:
    """Serves the prober properly and answers chats as their `x-case` header says; without one it echoes
    `x-nonce`. AssertionErrors of its own reading of requests are kept in `faults`."""

    behaviours: Mapping[str, Behaviour]
    chats: int = 0
    faults: list[str] = field(default_factory=list)
    _speakers: list[tuple[bytes, asyncio.StreamWriter]] = field(default_factory=list)
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    async def start(self) -> str:
        """Its address."""
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        return f"{HOST}:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        """End every connection."""
        self._server.close()
        for writer in self._open:
            writer.transport.abort()
        await eventually(lambda: not self._open)

    def speak(self) -> None:
        """Send what behaviours have kept for afterwards."""
        for data, writer in self._speakers:
            writer.write(data)
        self._speakers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while await self._answer(reader, writer):
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        except (AssertionError, ValueError, KeyError) as exc:
            self.faults.append(repr(exc))
        finally:
            self._open.discard(writer)
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ")
        names = [line.partition(":")[0].lower() for line in lines]
        headers = {name: line.partition(":")[2].strip() for name, line in zip(names, lines, strict=True)}
        if method == "GET":
            writer.write(_PROBES.get(path, _PROBES["/health"]))
            return True
        self.chats += 1
        assert names.count("content-length") == names.count("host") == 1, lines
        assert not {"transfer-encoding", "connection", "expect", "upgrade"} & set(names), lines
        behaviour = self.behaviours.get(headers.get("x-case", ""))
        if behaviour is None or not behaviour.early:
            await reader.readexactly(int(headers["content-length"]))
        if behaviour is None:
            writer.write(ok(b'{"nonce":"%b"}' % headers.get("x-nonce", "").encode()))
            return True
        for piece in behaviour.pieces:
            writer.write(piece)
            await writer.drain()
        if behaviour.afterwards:
            self._speakers.append((behaviour.afterwards, writer))
        return not behaviour.close


def ok(body: bytes, *fields: bytes) -> bytes:
    """A plain response."""
    head = [b"HTTP/1.1 200 OK", b"Content-Type: application/json", *fields, b"Content-Length: %d" % len(body)]
    return b"\r\n".join([*head, b"", body])


_PROBES = {
    "/health": ok(b"{}"),
    "/v1/models": ok(b'{"object":"list","data":[{"id":"%b","object":"model"}]}' % MODEL),
    "/metrics": ok(b"vllm:num_requests_running 0\nvllm:num_requests_waiting 0\n"),
}
