"""Connections to instances: HTTP/1.1 on asyncio protocols, pooled per instance, relayed as bytes."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

from penstock.common.model import Instance, InstanceId
from penstock.common.telemetry import Metrics
from penstock.ingress.adapters.engine_connection import EngineConnection
from penstock.ingress.ports import UpstreamListener
from penstock.ingress.settings import IngressSettings

log = logging.getLogger(__name__)

# Host, port, and "http" or "https", and whatever else tells connections apart.
Address = tuple[Any, ...]


class Pool:
    """Connections to one address."""

    def __init__(self, client: ConnectionPools, address: Address, max_header_bytes: int) -> None:
        self.address = address
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


class ConnectionPools:
    """Pools by address, bounded and kept."""

    def __init__(
        self,
        settings: IngressSettings,
        metrics: Metrics,
        kind: str,
        of: str,
        tls: Callable[[], ssl.SSLContext],
    ) -> None:
        """`kind` names the metrics, `of` says in words what is connected to."""
        self._settings, self._of, self._make_tls = settings, of, tls
        self._pools: dict[Address, Pool] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.bad_framing = metrics.counter(
            f"penstock_ingress_{kind}_bad_framing_total", f"Responses of {of} that were not HTTP"
        ).labels()
        self._connects = metrics.counter(
            f"penstock_ingress_{kind}_connects_total", f"Connections to {of} by result", "result"
        )
        metrics.gauge(
            f"penstock_ingress_{kind}_connections",
            f"Connections to {of}, and how many of them serve nobody",
            lambda: [
                (("open",), float(sum(len(p.open) for p in self._pools.values()))),
                (("idle",), float(sum(len(p.idle) for p in self._pools.values()))),
            ],
            "state",
        )

    def _pool(self, address: Address) -> Pool:
        pool = self._pools.get(address)
        if pool is None:
            pool = self._pools[address] = Pool(self, address, self._settings.max_header_bytes)
        return pool

    def _acquire(self, pool: Pool, listener: UpstreamListener) -> None:
        """A connection of the pool, or one that `_open` makes."""
        connection = pool.take()
        if connection is not None:
            connection.attach(listener, reused=True)
            return
        limit = self._settings.upstream_max_connections
        if len(pool.open) + pool.connecting >= limit:
            listener.upstream_refused(f"all {limit} connections are in use", overflow=True)
            return
        pool.connecting += 1
        name = f"connect {pool.address[0]}:{pool.address[1]}"
        task = asyncio.create_task(self._make(pool, listener), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make(self, pool: Pool, listener: UpstreamListener) -> None:
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                connection = await self._open(pool, pool.address)
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

    async def _open(self, pool: Pool, address: Address) -> EngineConnection:
        """Raises OSError or ValueError."""
        host, port, scheme = address
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: EngineConnection(pool), host, port, ssl=self._tls if scheme == "https" else None
        )
        return connection

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        # Made when the first of them needs it: the system's certificates are 2 MB.
        return self._make_tls()

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long, and drop pools that are empty."""
        oldest = now - self._settings.upstream_idle_timeout
        for address, pool in list(self._pools.items()):
            for connection in [c for c in pool.idle if c.idle_since < oldest]:
                pool.idle.remove(connection)
                connection.close_idle()
            if not pool.open and not pool.connecting:
                del self._pools[address]
                self._dropped()

    def _dropped(self) -> None:
        """A pool is no longer one of the pools."""

    async def close(self) -> None:
        """End every connection."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pool in self._pools.values():
            for connection in list(pool.open):
                connection.abort()


class EngineClient(ConnectionPools):
    """Connections to the instances, of one ingress process."""

    def __init__(self, settings: IngressSettings, metrics: Metrics) -> None:
        super().__init__(settings, metrics, "upstream", "instances", settings.engine_tls)
        # By instance: to put an address together and look it up costs 0.3 us.
        self._by_instance: dict[InstanceId, tuple[Instance, Pool]] = {}

    def acquire(self, instance: Instance, listener: UpstreamListener) -> None:
        """See `penstock.ingress.ports.Upstreams`."""
        known = self._by_instance.get(instance.id)
        if known is None or known[0] is not instance:
            endpoint = instance.endpoint
            pool = self._pool((endpoint.host, endpoint.port, endpoint.scheme))
            known = self._by_instance[instance.id] = instance, pool
        self._acquire(known[1], listener)

    def _dropped(self) -> None:
        # Instances that have left go with their pools.
        self._by_instance.clear()
