"""Connections to external endpoints: those to instances, with DNS, TLS and HTTP proxies around them."""

from __future__ import annotations

import asyncio
from typing import cast

from penstock.common.telemetry import Metrics
from penstock.ingress.adapters.engine_client import ConnectionPools
from penstock.ingress.adapters.engine_connection import EngineConnection
from penstock.ingress.adapters.pool import Address, Bounds, Pool
from penstock.ingress.ports import UpstreamListener
from penstock.ingress.routes import External
from penstock.ingress.settings import IngressSettings

MAX_PROXY_HEAD = 8192


class ExternalClient(ConnectionPools):
    """The pools of one ingress process, by endpoint and proxy. TLS is verified, by name."""

    def __init__(self, settings: IngressSettings, metrics: Metrics, bounds: Bounds | None = None) -> None:
        super().__init__(settings, metrics, "external", "external endpoints", settings.external_tls, bounds)

    def acquire(self, external: External, listener: UpstreamListener) -> None:
        """See `penstock.ingress.ports.Externals`."""
        endpoint = external.endpoint
        pool = self._pool((endpoint.host, endpoint.port, endpoint.scheme, external.proxy))
        self._acquire(pool, listener)

    async def _open(self, pool: Pool, address: Address) -> EngineConnection:
        host, port, scheme, proxy = address
        if proxy is None:
            return await super()._open(pool, (host, port, scheme))
        if scheme == "http":
            # The proxy reads the request itself: its target is the whole URL.
            return await super()._open(pool, (proxy.host, proxy.port, "http"))
        loop = asyncio.get_running_loop()
        transport, tunnel = await loop.create_connection(
            lambda: _Tunnel(host, port, proxy.authorization), proxy.host, proxy.port
        )
        try:
            await tunnel.opened
            connection = EngineConnection(pool)
            protocol = cast(asyncio.Protocol, connection)
            wrapped = await loop.start_tls(transport, protocol, self._tls, server_hostname=host)
            if wrapped is None:
                raise OSError("the connection ended during the TLS handshake")
        except BaseException:
            transport.abort()
            raise
        connection.connection_made(wrapped)
        return connection


class _Tunnel(asyncio.Protocol):
    """Asks a proxy for a tunnel (RFC 9110 9.3.6); `opened` is done when there is one, or raises OSError."""

    def __init__(self, host: str, port: int, authorization: str) -> None:
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        shown = f"[{host}]" if ":" in host else host
        lines = [f"CONNECT {shown}:{port} HTTP/1.1", f"host: {shown}:{port}"]
        lines += [f"proxy-authorization: {authorization}"] if authorization else []
        self._request = "\r\n".join([*lines, "", ""]).encode()
        self._answer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.Transport, transport).write(self._request)

    def data_received(self, data: bytes) -> None:
        self._answer += data
        if self.opened.done():
            return
        head, end, rest = self._answer.partition(b"\r\n\r\n")
        if not end:
            if len(self._answer) > MAX_PROXY_HEAD:
                self.opened.set_exception(OSError("the proxy's answer is too large"))
            return
        words = head.split(b"\r\n", 1)[0].split(b" ", 2)
        status = words[1] if len(words) > 1 and words[0] in (b"HTTP/1.1", b"HTTP/1.0") else b""
        if not status.startswith(b"2") or rest:
            text = status.decode("ascii", "replace")[:8] or "nonsense"
            self.opened.set_exception(OSError(f"the proxy answered {text} to CONNECT"))
        else:
            self.opened.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(OSError("the proxy closed the connection"))
