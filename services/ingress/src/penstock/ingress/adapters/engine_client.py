"""Connections to instances: HTTP/1.1 on asyncio protocols, pooled per instance, relayed as bytes."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import cast

from penstock.common.model import Instance
from penstock.common.telemetry import Metrics
from penstock.ingress.http_wire import (
    CHUNKED,
    LAST_CHUNK,
    UNTIL_CLOSE,
    BadFraming,
    ChunkedBody,
    parse_response,
)
from penstock.ingress.ports import UpstreamListener
from penstock.ingress.settings import IngressSettings

log = logging.getLogger(__name__)

# A second write costs less than copying a body of this size behind its head.
JOIN_BYTES = 32 * 1024
MAX_INTERIM_RESPONSES = 8
Address = tuple[str, int]


class EngineConnection(asyncio.Protocol):
    """One connection; serves one exchange at a time."""

    __slots__ = (
        "_buffer",
        "_chunked",
        "_head_done",
        "_interim",
        "_keep_alive",
        "_listener",
        "_pool",
        "_remaining",
        "_transport",
        "idle_since",
        "reused",
    )

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._listener: UpstreamListener | None = None
        self._chunked: ChunkedBody | None = None
        self._buffer = b""
        self._remaining = 0
        self._interim = 0
        self._head_done = self._keep_alive = False
        self.reused = False
        self.idle_since = 0.0

    # -- the exchange's side -----------------------------------------------------------------------

    def attach(self, listener: UpstreamListener, *, reused: bool) -> None:
        """Serve `listener`."""
        self._listener, self.reused = listener, reused
        self._buffer = b""
        self._interim = 0
        self._head_done = False
        self._keep_alive = True
        listener.upstream_connected(self)

    def send(self, head: bytes, body: bytes) -> None:
        transport = self._transport
        if transport is None:
            return
        self._head_done = self._keep_alive = False
        if len(body) <= JOIN_BYTES:
            transport.write(head + body)
        else:
            transport.writelines((head, body))

    def pause(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def release(self) -> None:
        self._listener = None
        transport = self._transport
        if transport is None:
            return
        # Unsent request bytes mean that the instance answered without reading: not a clean end.
        if not self._keep_alive or transport.is_closing() or transport.get_write_buffer_size():
            self.abort()
            return
        transport.resume_reading()
        self._pool.give_back(self)

    def abort(self) -> None:
        self._listener = None
        if self._transport is not None:
            self._transport.abort()

    # -- the socket's side -------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._pool.forget(self)
        listener, self._listener = self._listener, None
        if listener is None:
            return
        if self._head_done and self._chunked is None and self._remaining == UNTIL_CLOSE and exc is None:
            listener.upstream_done()
        else:
            answered = self._head_done or bool(self._buffer) or self._interim > 0
            if self.reused and not answered:
                self._pool.close_idle()
            listener.upstream_lost(str(exc) if exc else "it closed the connection", answered=answered)

    def data_received(self, data: bytes) -> None:
        listener = self._listener
        if listener is None:
            # An idle connection that speaks is broken: what it says belongs to nobody.
            self.abort()
            return
        try:
            if self._head_done:
                self._body(listener, data)
            else:
                self._heads(listener, data)
        except BadFraming as exc:
            self.abort()
            self._pool.metrics_bad_framing.value += 1
            listener.upstream_lost(f"it broke HTTP: {exc}", answered=True)

    def _heads(self, listener: UpstreamListener, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        while not self._head_done:
            end = buffer.find(b"\r\n\r\n")
            if end < 0 or end > self._pool.max_header_bytes:
                if len(buffer) > self._pool.max_header_bytes:
                    raise BadFraming(f"headers of more than {self._pool.max_header_bytes} bytes")
                self._buffer = buffer
                return
            head = parse_response(buffer[: end + 2])
            buffer = buffer[end + 4 :]
            if head.status < 200:
                self._interim += 1
                if head.status == 101 or self._interim > MAX_INTERIM_RESPONSES:
                    raise BadFraming(f"an unexpected {head.status}")
                continue
            self._head_done = True
            self._keep_alive = head.keep_alive
            self._remaining = head.length
            self._chunked = ChunkedBody() if head.length == CHUNKED else None
            self._buffer = b""
            listener.upstream_head(head)
        # The exchange may have turned to another instance at the sight of the head.
        if self._listener is listener:
            if self._remaining == 0:
                self._done(listener, buffer)
            elif buffer:
                self._body(listener, buffer)
        if self._listener is listener:
            listener.upstream_flush()

    def _body(self, listener: UpstreamListener, data: bytes) -> None:
        chunked = self._chunked
        if chunked is not None:
            wire = chunked.feed(data)
            if chunked.done:
                wire += LAST_CHUNK
            if wire:
                listener.upstream_data(wire, chunked.between_chunks)
            if chunked.done and self._listener is listener:
                self._done(listener, chunked.rest)
        elif self._remaining == UNTIL_CLOSE:
            listener.upstream_data(data, True)
        else:
            rest = data[self._remaining :]
            if rest:
                data = data[: self._remaining]
            self._remaining -= len(data)
            listener.upstream_data(data, self._remaining == 0)
            if self._remaining == 0 and self._listener is listener:
                self._done(listener, rest)

    def _done(self, listener: UpstreamListener, rest: bytes) -> None:
        if rest:
            # Bytes after the end could be taken for the next exchange's response.
            self._keep_alive = False
        listener.upstream_done()

    @property
    def usable(self) -> bool:
        """Whether an idle connection can still serve; one that ended stays in its pool for a loop turn."""
        return self._transport is not None and not self._transport.is_closing()

    def close_idle(self) -> None:
        """Close a connection that serves nobody."""
        if self._transport is not None:
            self._transport.close()


class Pool:
    """Connections to one address."""

    def __init__(self, client: EngineClient, max_header_bytes: int) -> None:
        self._client = client
        self.idle: list[EngineConnection] = []
        self.open: set[EngineConnection] = set()
        self.connecting = 0
        self.max_header_bytes = max_header_bytes
        self.metrics_bad_framing = client.bad_framing

    def give_back(self, connection: EngineConnection) -> None:
        """Keep a connection for the next exchange; the most recently used one is taken first."""
        connection.idle_since = time.monotonic()
        self.idle.append(connection)

    def forget(self, connection: EngineConnection) -> None:
        """A connection ended."""
        self.open.discard(connection)
        if connection in self.idle:
            self.idle.remove(connection)

    def take(self) -> EngineConnection | None:
        """An idle connection."""
        while self.idle:
            connection = self.idle.pop()
            if connection.usable:
                return connection
        return None

    def close_idle(self) -> None:
        """One was found dead, and the others have been idle for longer: none of them is worth a try."""
        idle, self.idle = self.idle, []
        for connection in idle:
            connection.close_idle()


class EngineClient:
    """The pools of one ingress process."""

    def __init__(self, settings: IngressSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._pools: dict[Address, Pool] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.bad_framing = metrics.counter(
            "penstock_ingress_upstream_bad_framing_total", "Responses of instances that were not HTTP"
        ).labels()
        self._connects = metrics.counter(
            "penstock_ingress_upstream_connects_total", "Connections to instances by result", "result"
        )
        metrics.gauge(
            "penstock_ingress_upstream_connections",
            "Connections to instances, and how many of them serve nobody",
            lambda: [
                (("open",), float(sum(len(p.open) for p in self._pools.values()))),
                (("idle",), float(sum(len(p.idle) for p in self._pools.values()))),
            ],
            "state",
        )

    def acquire(self, instance: Instance, listener: UpstreamListener) -> None:
        """See `penstock.ingress.ports.Upstreams`."""
        address = instance.endpoint.host, instance.endpoint.port
        pool = self._pools.get(address)
        if pool is None:
            pool = self._pools[address] = Pool(self, self._settings.max_header_bytes)
        connection = pool.take()
        if connection is not None:
            connection.attach(listener, reused=True)
            return
        limit = self._settings.upstream_max_connections
        if len(pool.open) + pool.connecting >= limit:
            listener.upstream_refused(f"all {limit} connections to the instance are in use", overflow=True)
            return
        pool.connecting += 1
        task = asyncio.create_task(
            self._connect(address, pool, listener), name=f"connect {address[0]}:{address[1]}"
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, address: Address, pool: Pool, listener: UpstreamListener) -> None:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                _, connection = await loop.create_connection(lambda: EngineConnection(pool), *address)
        except TimeoutError:
            cause = f"no connection within {self._settings.connect_timeout:g} s"
        except (OSError, ValueError) as exc:
            cause = getattr(exc, "strerror", None) or str(exc)
        else:
            pool.open.add(connection)
            self._connects.inc("connected")
            connection.attach(listener, reused=False)
            return
        finally:
            pool.connecting -= 1
        self._connects.inc("refused")
        listener.upstream_refused(cause)

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long, and drop pools that are empty."""
        oldest = now - self._settings.upstream_idle_timeout
        for address, pool in list(self._pools.items()):
            for connection in [c for c in pool.idle if c.idle_since < oldest]:
                pool.idle.remove(connection)
                connection.close_idle()
            if not pool.open and not pool.connecting:
                del self._pools[address]

    async def close(self) -> None:
        """End every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pool in self._pools.values():
            for connection in list(pool.open):
                connection.abort()
