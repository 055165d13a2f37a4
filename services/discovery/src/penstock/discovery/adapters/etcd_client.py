"""etcd over its JSON gateway (aiohttp): calls that any member may answer, and watches of one member.

Source: etcd's rpc.proto; the gateway carries 64-bit numbers as text and bytes as base64, and a watch as one
JSON document a line.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp

from penstock.discovery.etcd_wire import (
    AUTH_LOST,
    COMMON_TO_ALL,
    MAX_ANSWER_BYTES,
    OUT_OF_RANGE,
    Failure,
    Frame,
    TokenAnswer,
    WatchAnswer,
    decode_answer,
    encode_call,
)

T = TypeVar("T")

# Not served by a member that has lost its leader: it would answer from the past, or wait.
REQUIRE_LEADER = {"Grpc-Metadata-hasleader": "true"}


NO_ANSWER = (TimeoutError, aiohttp.ClientError, OSError, UnicodeError)


class EtcdError(Exception):
    """etcd cannot be read; the text says why, to a person."""


class EtcdRefused(EtcdError):
    """An answer that every member would give: no permission, a wrong password, a compacted revision."""

    def __init__(self, code: int, message: str) -> None:
        self.code = code
        super().__init__(message)


class MemberFailed(EtcdError):
    """One member did not answer, or answered that it cannot now."""


class AnswerTooLarge(EtcdError):
    """More than MAX_ANSWER_BYTES."""


class EtcdClient:
    """Talks to one member until it fails, then to the next one."""

    def __init__(
        self,
        members: tuple[str, ...],
        *,
        timeout_s: float,
        tls: ssl.SSLContext | None = None,
        user: str = "",
        password: str = "",
    ) -> None:
        """`members` are base addresses; `timeout_s` bounds each call to one of them. Without `tls`, https
        members are verified by the system's certificates."""
        self._members, self._at = members, 0
        self._timeout_s, self._tls = timeout_s, tls or True
        self._user, self._password, self._token = user, password, ""
        self._session: aiohttp.ClientSession | None = None

    @property
    def member(self) -> str:
        """The one that is asked now."""
        return self._members[self._at]

    def leave(self, member: str) -> None:
        """Ask the next one from here on, if `member` is the one asked now."""
        if member == self.member:
            self._at = (self._at + 1) % len(self._members)

    async def call(self, path: str, message: Mapping[str, Any], answer: type[T]) -> T:
        """The first member that answers, each asked once.

        Raises:
            EtcdRefused: the answer is no, from all of them.
            AnswerTooLarge: the answer is not read to its end.
            EtcdError: none of them answers; the text names each with its reason.
        """
        faults = []
        for _ in self._members:
            member = self.member
            try:
                return await self.ask(member, path, message, answer)
            except MemberFailed as exc:
                faults.append(f"{member.partition('://')[2]}: {exc}")
                self.leave(member)
        raise EtcdError("no member answers: " + "; ".join(faults))

    async def ask(self, member: str, path: str, message: Mapping[str, Any], answer: type[T]) -> T:
        """The answer of `member` alone; raises as `call`, and MemberFailed."""
        try:
            async with asyncio.timeout(self._timeout_s), self._post(member, path, message) as response:
                return _decode(answer, await _read(response))
        except NO_ANSWER as exc:
            raise MemberFailed(self._explain(member, exc)) from exc

    @asynccontextmanager
    async def watch(self, prefix: bytes, revision: int) -> AsyncIterator[Watch]:
        """Changes of keys with `prefix` from `revision` on, by the member asked now; raises as `ask`."""
        member = self.member
        create = {
            "key": prefix,
            "range_end": prefix_end(prefix),
            "start_revision": revision,
            "fragment": True,
        }
        try:
            async with asyncio.timeout(self._timeout_s) as opening:
                async with self._post(member, "/v3/watch", {"create_request": create}) as response:
                    opening.reschedule(None)
                    yield Watch(member, response)
        except NO_ANSWER as exc:
            raise MemberFailed(self._explain(member, exc)) from exc

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _explain(self, member: str, exc: Exception) -> str:
        match exc:
            case TimeoutError():
                return f"no answer within {self._timeout_s:g} s"
            case aiohttp.ClientConnectorDNSError() | UnicodeError():
                return "its host name cannot be resolved"
            case aiohttp.ClientConnectorCertificateError():
                return f"its certificate is not accepted ({exc.certificate_error})"
            case aiohttp.ClientConnectorError(os_error=ssl.SSLError() as fault):
                return f"TLS fails ({fault.reason or fault})"
            case aiohttp.ClientConnectorError():
                # The error's own text repeats the address.
                number = exc.os_error.errno
                return os.strerror(number).lower() if number else "no connection can be made"
            case aiohttp.ServerDisconnectedError() | aiohttp.ClientOSError() | aiohttp.ClientPayloadError():
                hint = " (does it want https?)" if member.startswith("http:") else ""
                return f"it closed the connection{hint}"
        return f"its answer is not understood ({type(exc).__name__})"

    @asynccontextmanager
    async def _post(
        self, member: str, path: str, message: Mapping[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response with status 200; a lost authentication is renewed once."""
        for attempt in range(2):
            if self._user and not self._token:
                self._token = await self._authenticate(member)
            async with self._send(member, path, message) as response:
                if response.status == 200:
                    yield response
                    return
                refusal = _refusal(response, await _read(response))
            if attempt or not self._user or not AUTH_LOST.search(str(refusal)):
                raise refusal
            self._token = ""

    async def _authenticate(self, member: str) -> str:
        """A token for further calls; empty if etcd asks for none."""
        message = {"name": self._user, "password": self._password}
        async with self._send(member, "/v3/auth/authenticate", message) as response:
            body = await _read(response)
            if response.status == 200:
                return _decode(TokenAnswer, body).token
            refusal = _refusal(response, body)
        if "authentication is not enabled" in str(refusal):
            return ""
        raise refusal

    @asynccontextmanager
    async def _send(
        self, member: str, path: str, message: Mapping[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=self._tls),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None),
                headers={"Accept-Encoding": "identity", "User-Agent": "penstock-discovery", **REQUIRE_LEADER},
                auto_decompress=False,
            )
        headers = {"Authorization": self._token} if self._token else {}
        async with self._session.post(
            member + path, data=encode_call(message), headers=headers, allow_redirects=False
        ) as response:
            yield response


class Watch:
    """What one member streams."""

    def __init__(self, member: str, response: aiohttp.ClientResponse) -> None:
        self.member, self._response = member, response
        self._rest = bytearray()

    async def read(self) -> list[WatchAnswer]:
        """What came since the last call, at least one; giving up the wait loses nothing.

        Raises:
            MemberFailed: the stream ended.
            EtcdRefused: etcd ended the watch, e.g. because its revision is compacted.
            AnswerTooLarge: one change is larger than any record may be.
        """
        while b"\n" not in self._rest:
            if len(self._rest) > MAX_ANSWER_BYTES:
                raise AnswerTooLarge(f"a change has more than {MAX_ANSWER_BYTES} bytes")
            piece = await self._response.content.readany()
            if not piece:
                raise MemberFailed("it closed the watch")
            self._rest += piece
        lines = self._rest.split(b"\n")
        self._rest = lines.pop()
        return [_watched(bytes(line)) for line in lines if line.strip()]


async def _read(response: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise AnswerTooLarge(f"an answer has more than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _decode(kind: type[T], body: bytes) -> T:
    try:
        return decode_answer(kind, body)
    except ValueError as exc:
        raise MemberFailed(f"its answer is not understood: {exc}") from exc


def _refusal(response: aiohttp.ClientResponse, body: bytes) -> EtcdError:
    """What an answer other than 200 means."""
    if response.content_type == "application/json":
        failure = _decode(Failure, body)
        return _failure(failure.code, failure.message)
    hint = " (its JSON gateway is off, see --enable-grpc-gateway of etcd)" if response.status == 404 else ""
    return MemberFailed(f"HTTP {response.status} {_printable(body.decode('utf-8', 'replace'))}{hint}")


def _watched(line: bytes) -> WatchAnswer:
    frame = _decode(Frame, line)
    if frame.error is not None:
        raise _failure(frame.error.code or frame.error.grpc_code, frame.error.message)
    answer = frame.result or WatchAnswer()
    if answer.compact_revision:
        raise EtcdRefused(OUT_OF_RANGE, f"the history before {answer.compact_revision} is compacted")
    if answer.canceled:
        raise EtcdRefused(0, f"the watch is cancelled: {_printable(answer.cancel_reason)}")
    return answer


def _failure(code: int, message: str) -> EtcdError:
    text = _printable(message) or f"gRPC code {code}"
    return EtcdRefused(code, text) if code in COMMON_TO_ALL else MemberFailed(text)


def _printable(text: str) -> str:
    """What a log line may hold of a text from outside."""
    return "".join(c if c.isprintable() else "?" for c in text.strip()[:200])


def prefix_end(prefix: bytes) -> bytes:
    """The first key after all keys with `prefix`; etcd's \\0 (no end) if there is none."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes([trimmed[-1] + 1]) if trimmed else b"\0"
