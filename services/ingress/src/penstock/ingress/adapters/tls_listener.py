"""Accepts connections that begin with a TLS handshake. Each counts from its first byte on: who only begins
handshakes takes room like everybody else."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

from penstock.common.telemetry import Metrics

log = logging.getLogger(__name__)

# After the system had no connection to give: it has run out of something.
PAUSE_S = 0.1


class TlsListener:
    """The handshakes of one worker."""

    def __init__(
        self,
        context: ssl.SSLContext,
        begin: Callable[[], asyncio.Protocol | None],
        over: Callable[[asyncio.Protocol], None],
        metrics: Metrics,
        *,
        handshake_s: float,
        shutdown_s: float,
    ) -> None:
        """`begin` makes what serves a connection, or None if there may be no more; `over` hears of one whose
        handshake failed."""
        # Of handshakes from here on.
        self.context = context
        self._begin, self._over = begin, over
        self._handshake_s, self._shutdown_s = handshake_s, shutdown_s
        self._socket: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._results = metrics.counter(
            "penstock_ingress_tls_handshakes_total", "TLS handshakes of clients by result", "result"
        )

    def listen(self, sock: socket.socket, backlog: int) -> None:
        """Accept on a bound socket, until `close`."""
        sock.listen(backlog)
        self._socket = sock
        self._keep(self._accept(sock), "tls accept")

    def close(self) -> None:
        """Accept nobody any more, and give up the handshakes under way."""
        for task in self._tasks:
            task.cancel()
        if self._socket is not None:
            self._socket.close()

    async def _accept(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(sock)
            except OSError as exc:
                log.warning("no connection could be accepted: %s", exc)
                await asyncio.sleep(PAUSE_S)
                continue
            protocol = self._begin()
            if protocol is None:
                client.close()
            else:
                self._keep(self._greet(client, protocol), "tls handshake")

    async def _greet(self, client: socket.socket, protocol: asyncio.Protocol) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                client,
                ssl=self.context,
                ssl_handshake_timeout=self._handshake_s,
                ssl_shutdown_timeout=self._shutdown_s,
            )
        except OSError as exc:
            # Whoever speaks plain HTTP here, has another idea of TLS, or leaves: nothing to tell of.
            log.debug("a TLS handshake failed: %s", exc)
            self._results.inc("failed")
            self._over(protocol)
        except BaseException:
            self._over(protocol)
            raise
        else:
            self._results.inc("done")

    def _keep(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
