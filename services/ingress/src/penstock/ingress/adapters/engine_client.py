"""Connections to instances: HTTP/1.1 on asyncio protocols, pooled per instance, relayed as bytes."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from functools import cached_property

from penstock.common.model import Instance
from penstock.common.telemetry import Metrics
from penstock.ingress.adapters.engine_connection import EngineConnection
from penstock.ingress.ports import UpstreamListener
from penstock.ingress.settings import IngressSettings

log = logging.getLogger(__name__)

# Host, port, and "http" or "https".
Address = tuple[str, int, str]


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
        endpoint = instance.endpoint
        address = endpoint.host, endpoint.port, endpoint.scheme
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
        host, port, scheme = address
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                _, connection = await loop.create_connection(
                    lambda: EngineConnection(pool), host, port, ssl=self._tls if scheme == "https" else None
                )
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

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        # Made when the first instance needs it: the system's certificates are 2 MB.
        return self._settings.engine_tls()

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
