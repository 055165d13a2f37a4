"""Connections to instances: HTTP/1.1 on asyncio protocols, pooled per instance, relayed as bytes."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable
from typing import cast

from penstock.common.model import Instance, InstanceId
from penstock.common.telemetry import Metrics
from penstock.ingress.adapters.engine_connection import EngineConnection
from penstock.ingress.adapters.pool import Address, Bound, Bounds, Pool
from penstock.ingress.ports import UpstreamListener
from penstock.ingress.settings import IngressSettings

log = logging.getLogger(__name__)


class ConnectionPools:
    """Pools by address, bounded and kept."""

    def __init__(
        self,
        settings: IngressSettings,
        metrics: Metrics,
        kind: str,
        of: str,
        tls: Callable[[], ssl.SSLContext],
        bounds: Bounds | None,
    ) -> None:
        """`kind` names the metrics, `of` says in words what is connected to; `bounds` are those that the
        clients of a process share."""
        self._bounds = bounds or Bounds(settings)
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
        metrics.gauge(
            f"penstock_ingress_{kind}_pending",
            f"Requests that wait for a connection to {of}",
            lambda: sum(len(pool.waiting) for pool in self._pools.values()),
        )
        self._overflows = metrics.counter(
            f"penstock_ingress_{kind}_overflow_total",
            f"Requests that found too many at {of}, by the setting that bounds them",
            "bound",
        )
        self._woken = False
        # Made when the first of them needs it: the system's certificates are 2 MB.
        self._tls_context: ssl.SSLContext | None = None

    def _pool(self, address: Address) -> Pool:
        pool = self._pools.get(address)
        if pool is None:
            limit = self._settings.max_header_bytes
            pool = self._pools[address] = Pool(self, self._bounds, address, limit, self._of)
        return pool

    def _acquire(self, pool: Pool, listener: UpstreamListener) -> None:
        """A connection of the pool, one that `_open` makes, or a place among those that wait for one."""
        bound = None
        if self._bounds.connections >= self._bounds.least or listener.retry:
            bound = self._bounds.refuses(pool, listener.retry)
        elif not pool.waiting and (connection := pool.take()) is not None:
            connection.attach(listener, reused=True)
            return
        if bound is None and (pool.waiting or not self._serve(pool, listener)):
            bound = self._bounds.refuses_to_wait(pool)
            if bound is None:
                listener.upstream_waits(pool.wait(listener))
        if bound is not None:
            self._overflow(bound, listener)

    def _overflow(self, bound: Bound, listener: UpstreamListener) -> None:
        name = bound.value
        self._overflows.inc(name)
        most = getattr(self._settings, name)
        cause = f"there are as many requests as may be (--{name.replace('_', '-')} {most})"
        listener.upstream_refused(cause, overflow=True)

    def _serve(self, pool: Pool, listener: UpstreamListener) -> bool:
        """A connection for a request; False if it has to wait."""
        connection = pool.take()
        if connection is not None:
            if listener.retry:
                connection.retry = True
                pool.count_retry(1)
            connection.attach(listener, reused=True)
            return True
        if self._bounds.full(pool) or (self._bounds.all_full() and not self._evict()):
            return False
        pool.connect(retry=listener.retry)
        name = f"connect {pool.address[0]}:{pool.address[1]}"
        task = asyncio.create_task(self._make(pool, listener), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return True

    def _evict(self) -> bool:
        idle = [pool for pool in self._pools.values() if pool.idle]
        if idle:
            min(idle, key=lambda pool: pool.idle[0].idle_since).evict()
        return bool(idle)

    def freed(self) -> None:
        """See `penstock.ingress.adapters.pool.Keeper`. In a later turn: where a connection becomes free, its
        own affairs come first."""
        if not self._woken:
            self._woken = True
            asyncio.get_running_loop().call_soon(self._serve_waiting)

    def _serve_waiting(self) -> None:
        self._woken = False
        for pool in [pool for pool in self._pools.values() if pool.waiting]:
            while pool.waiting:
                listener = next(iter(pool.waiting))
                if self._bounds.refuses(pool, listener.retry) or not self._serve(pool, listener):
                    break
                pool.leave(listener)

    async def _make(self, pool: Pool, listener: UpstreamListener) -> None:
        connection = None
        try:
            async with asyncio.timeout(self._settings.connect_timeout):
                connection = await self._open(pool, pool.address)
            if not connection.usable:
                raise OSError("it closed the connection")
        except TimeoutError:
            cause = f"no connection within {self._settings.connect_timeout:g} s"
        except (OSError, ValueError) as exc:
            cause = getattr(exc, "strerror", None) or str(exc)
        except BaseException:
            pool.failed(retry=listener.retry)
            raise
        else:
            connection.retry = listener.retry
            pool.connected(connection)
            self._connects.inc("connected")
            connection.attach(listener, reused=False)
            return
        pool.failed(retry=listener.retry)
        self._connects.inc("refused")
        listener.upstream_refused(cause)
        if not pool.connections:
            # Those behind it would find out one by one.
            for waiting in list(pool.waiting):
                pool.leave(waiting)
                waiting.upstream_refused(cause)

    async def _open(self, pool: Pool, address: Address) -> EngineConnection:
        """Raises OSError or ValueError."""
        host, port, scheme = address
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: cast(asyncio.Protocol, EngineConnection(pool)),
            host,
            port,
            ssl=self._tls if scheme == "https" else None,
        )
        return cast(EngineConnection, connection)

    @property
    def _tls(self) -> ssl.SSLContext:
        if self._tls_context is None:
            self._tls_context = self._make_tls()
        return self._tls_context

    def sweep(self, now: float) -> None:
        """Close what has been idle for too long, and drop pools that are empty."""
        oldest = now - self._settings.upstream_idle_timeout
        for address, pool in list(self._pools.items()):
            pool.close_idle(oldest)
            if pool.idle and self._bounds.wanted_elsewhere(pool):
                pool.evict()
            if not pool.connections and not pool.waiting:
                del self._pools[address]
                self._bounds.give_back(pool.slot)
                self._dropped()
        if self._bounds.pending:
            # Another worker may have made room, or another client of this one.
            self._serve_waiting()

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

    def __init__(self, settings: IngressSettings, metrics: Metrics, bounds: Bounds | None = None) -> None:
        super().__init__(settings, metrics, "upstream", "instances", settings.engine_tls, bounds)
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
