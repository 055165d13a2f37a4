"""One connection to an engine, for a few small GETs: asyncio's protocol directly, because a probe through
aiohttp's client costs several times the CPU (docs/guide/discovery.md has the figures)."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property

from penstock.common.model import Endpoint
from penstock.discovery.allowed import AllowedHosts, is_address
from penstock.discovery.http_answer import Answer, BadAnswer

NAME_TTL_S = 10.0
MAX_NAMES = 4096
MAX_ADDRESSES = 4


class HostRefused(Exception):
    """A host name resolves to an address where no instance may be."""


class Link(asyncio.Protocol):
    """Carries one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._answer = Answer()
        self._waiter: asyncio.Future[Answer] | None = None
        self.usable = True
        self.used = False

    async def get(self, head: bytes) -> Answer:
        """Send a request's head and wait for the whole answer.

        Raises:
            BadAnswer: it is not HTTP, is cut short, or too large.
            ConnectionError: the connection ended before the answer began.
        """
        transport = self._transport
        if transport is None or not self.usable:
            raise ConnectionResetError
        self._answer, self.usable = Answer(), False
        self._waiter = asyncio.get_running_loop().create_future()
        transport.write(head)
        try:
            answer = await self._waiter
        finally:
            self._waiter = None
        self.usable, self.used = answer.reusable and self._transport is not None, True
        return answer

    def close(self) -> None:
        """End it at once."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's does not inherit from asyncio's

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._waiter.done():
            # Nothing was asked: what comes now belongs to no request.
            self.close()
            return
        try:
            self._answer.feed(data)
        except BadAnswer as exc:
            self._fail(exc)
            return
        if self._answer.done:
            self._waiter.set_result(self._answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable, self._transport = False, None
        if self._waiter is None or self._waiter.done():
            return
        if not self._answer.begun:
            self._waiter.set_exception(exc if isinstance(exc, ConnectionError) else ConnectionResetError())
            return
        try:
            self._answer.end()
        except BadAnswer as bad:
            self._waiter.set_exception(bad)
        else:
            self._waiter.set_result(self._answer)

    def _fail(self, exc: BadAnswer) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(exc)
        self.close()


class Dialer:
    """Opens links, to allowed addresses only."""

    def __init__(
        self,
        allowed: AllowedHosts,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allowed, self._given_tls, self._clock = allowed, tls, clock
        self._resolved: OrderedDict[str, tuple[float, tuple[str, ...]]] = OrderedDict()

    async def open(self, endpoint: Endpoint) -> Link:
        """A new connection to the first address that accepts one.

        Raises:
            HostRefused: no instance may be there.
            OSError: no connection can be made; socket.gaierror if the name cannot be resolved.
        """
        fault: OSError | None = None
        for address in await self._addresses(endpoint.host):
            try:
                return await self._connect(endpoint, address)
            except OSError as exc:
                fault = exc
        raise fault or OSError("no address")

    async def _connect(self, endpoint: Endpoint, address: str) -> Link:
        secure = endpoint.scheme == "https"
        _, link = await asyncio.get_running_loop().create_connection(
            Link,
            address,
            endpoint.port,
            ssl=self._tls if secure else None,
            server_hostname=endpoint.host if secure else None,
        )
        return link

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return self._given_tls or ssl.create_default_context()

    async def _addresses(self, host: str) -> tuple[str, ...]:
        """The host itself if it is an address, else what it resolves to, remembered for a while."""
        addresses = (host,) if is_address(host) else await self._resolve(host)
        refusals = [refusal for address in addresses if (refusal := self._allowed.refusal(address))]
        if refusals:
            raise HostRefused(refusals[0])
        return addresses

    async def _resolve(self, host: str) -> tuple[str, ...]:
        now = self._clock()
        until, addresses = self._resolved.get(host, (now, ()))
        if now < until:
            return addresses
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=1)
        addresses = tuple(dict.fromkeys(str(info[4][0]) for info in found))[:MAX_ADDRESSES]
        self._resolved[host] = now + NAME_TTL_S, addresses
        if len(self._resolved) > MAX_NAMES:
            self._resolved.popitem(last=False)
        return addresses
