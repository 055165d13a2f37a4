"""The public listener: HTTP/1.1 on asyncio protocols, one exchange at a time per connection."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import cast

import msgspec

from penstock.common.telemetry import Metrics
from penstock.ingress.adapters.admin_relay import AdminRelay
from penstock.ingress.adapters.client_connection import MODELS, ClientConnection
from penstock.ingress.adapters.connection_limit import ConnectionLimit, SharedCounts
from penstock.ingress.adapters.tls_listener import TlsListener
from penstock.ingress.failures import GatewayError
from penstock.ingress.gateway import Gateway
from penstock.ingress.http_wire import RequestHead
from penstock.ingress.openai import GENERATION
from penstock.ingress.owners import IN_QUERY

BACKLOG = 1024
FLUSH_CHECK_S = 0.05
INFO = frozenset({MODELS, b"/health", b"/healthz", b"/readyz"})


class HttpServer:
    """The listener of one process and the requests that need no instance."""

    def __init__(self, gateway: Gateway, metrics: Metrics, counts: SharedCounts | None = None) -> None:
        """`counts`: the connections of every worker of the ingress, this one's among them."""
        self._gateway = gateway
        most = gateway.settings.connection_limit
        self._limit = ConnectionLimit(counts or SharedCounts.alone(), most, metrics, gateway.clock)
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._tls: TlsListener | None = None
        # Connections before the end of their TLS handshake.
        self._greeted: set[ClientConnection] = set()
        # Set where the admin API is on the public port too.
        self.admin: AdminRelay | None = None
        self.connections: set[ClientConnection] = set()
        self.refused = metrics.counter(
            "penstock_ingress_refused_total", "Bytes that were no request, by error code", "code"
        )
        self.answers = metrics.counter(
            "penstock_ingress_answers_total", "Requests that the ingress answered by itself"
        ).labels()
        metrics.gauge("penstock_ingress_connections", "Client connections", lambda: len(self.connections))

    async def listen(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Accept on a bound socket: HTTP, or HTTPS with `tls`."""
        loop = asyncio.get_running_loop()
        if tls is not None:
            settings = self._gateway.settings
            self._tls = TlsListener(
                tls,
                self._greet,
                self.forget,
                self._metrics,
                handshake_s=settings.header_timeout,
                shutdown_s=settings.idle_timeout,
            )
            self._tls.listen(sock, BACKLOG)
            return
        self._server = await loop.create_server(
            lambda: cast(asyncio.Protocol, ClientConnection(self, self._gateway)), sock=sock, backlog=BACKLOG
        )

    def use(self, tls: ssl.SSLContext) -> None:
        """For handshakes from here on."""
        if self._tls is not None:
            self._tls.context = tls

    def admit(self, connection: ClientConnection) -> bool:
        """Take a connection in; False if the ingress has as many as it may."""
        if connection in self._greeted:
            self._greeted.discard(connection)
        elif not self._limit.allows_one_more():
            return False
        self.connections.add(connection)
        self._counted()
        return True

    def forget(self, connection: ClientConnection | asyncio.Protocol) -> None:
        """A connection ended, or never was one."""
        if isinstance(connection, ClientConnection):
            self.connections.discard(connection)
            self._greeted.discard(connection)
            self._counted()

    def _greet(self) -> asyncio.Protocol | None:
        if not self._limit.allows_one_more():
            return None
        connection = ClientConnection(self, self._gateway)
        self._greeted.add(connection)
        self._counted()
        return cast(asyncio.Protocol, connection)

    def _counted(self) -> None:
        self._limit.holds(len(self.connections) + len(self._greeted))

    def stop_accepting(self) -> None:
        """Take no new connection, and end those that wait for a request."""
        if self._server is not None:
            self._server.close()
        if self._tls is not None:
            self._tls.close()
        for connection in list(self.connections):
            connection.drain()

    async def close(self, flush_s: float) -> None:
        """End every connection, each as soon as its client has what was written, all after `flush_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + flush_s
        for connection in list(self.connections):
            connection.end()
        while self.connections and loop.time() < deadline:  # noqa: ASYNC110  # they end in many places
            await asyncio.sleep(FLUSH_CHECK_S)
        for connection in list(self.connections):
            connection.abort()

    def sweep(self, now: float) -> None:
        """End connections whose time is over."""
        for connection in [c for c in self.connections if c.deadline and c.deadline < now]:
            connection.expire()

    def answer(self, head: RequestHead, path: bytes, request_id: str) -> bytes:
        """A response without an instance. Raises GatewayError."""
        known = path in INFO or path in GENERATION
        if not known:
            raise GatewayError("not_found", f"there is no {path.decode('ascii', 'replace')[:200]} here")
        if path in GENERATION or head.method not in (b"GET", b"HEAD"):
            allowed = "POST" if path in GENERATION else "GET, HEAD"
            text = f"{head.method.decode('ascii')[:40]} is not allowed here, use {allowed}"
            raise GatewayError("method_not_allowed", text, allow=allowed)
        status, content = 200, dict[str, object](status="ok")
        if path == MODELS:
            content = self._models(head)
        elif path == b"/readyz" and (not self._gateway.table.synced or self._gateway.draining):
            status, content = 503, {"status": "not ready"}
        return _json_response(status, content, request_id, head)

    def _models(self, head: RequestHead) -> dict[str, object]:
        wanted = head.header(IN_QUERY)
        data = [
            {"id": model, "object": "model", "created": 0, "owned_by": owner or "penstock"}
            | ({"parent": parent} if parent else {})
            for model, owner, parent in self._gateway.live_models(head.caller)
            if not wanted or owner.lower() == wanted.lower()
        ]
        return {"object": "list", "data": data}


def _json_response(status: int, content: object, request_id: str, head: RequestHead) -> bytes:
    body = msgspec.json.encode(content)
    close = b"" if head.keep_alive else b"connection: close\r\n"
    reason = b"OK" if status == 200 else b"Service Unavailable"
    response = (
        b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
        b"x-request-id: %b\r\n%b\r\n"
    ) % (status, reason, len(body), request_id.encode(), close)
    return response if head.method == b"HEAD" else response + body
