"""Connections to one address, and how many of them and of their requests there may be."""

from __future__ import annotations

import math
import time
from collections.abc import Hashable
from enum import Enum
from typing import Any, Final, Protocol

from penstock.common.cells import Cell
from penstock.ingress.adapters.engine_connection import EngineConnection
from penstock.ingress.adapters.shared_pools import (
    ALL,
    CONNECTIONS,
    PENDING,
    RETRIES,
    Claim,
    SharedPools,
    Slot,
)
from penstock.ingress.ports import Upstream, UpstreamListener
from penstock.ingress.traffic_settings import TrafficSettings

_clock: Final = time.monotonic
# Host, port, and "http" or "https", and whatever else tells connections apart.
Address = tuple[Any, ...]


class Bound(Enum):
    """What a request can be over: the name of the setting."""

    PARALLEL_REQUESTS = "backend_max_parallel_requests"
    PENDING_REQUESTS = "backend_max_pending_requests"
    PARALLEL_RETRIES = "backend_max_parallel_retries"
    ALL_REQUESTS = "gateway_max_requests"
    ALL_PENDING = "gateway_max_pending_requests"


class Keeper(Protocol):
    """Who has the pools, and hears when one of them has room again."""

    bad_framing: Cell

    def freed(self) -> None:
        """A connection is idle, or there may be one more."""


class Bounds:
    """What may be open at each address and over all of them, and how much is, for all clients of a process;
    with `shared`, for all workers of the ingress."""

    def __init__(self, settings: TrafficSettings, shared: SharedPools | None = None) -> None:
        self.settings, self.shared = settings, shared
        self._parallel, self._requests = settings.backend_max_parallel_requests, settings.gateway_max_requests
        # With fewer connections than this, requests cannot be too many: most look at nothing else.
        self.least = min(self._parallel, self._requests) if shared is None else 0
        # Of this process, at all addresses.
        self.connections = self.idle = self.pending = self.retries = 0
        self._all = shared.claim(ALL) if shared is not None else None
        self._claim = self.claim(self._all, self._requests)

    @property
    def requests(self) -> int:
        """Those that have a connection or are getting one."""
        return self.connections - self.idle

    def slot(self, address: Hashable) -> Slot | None:
        """Where other workers see what is open at an address."""
        return self.shared.claim(address) if self.shared is not None else None

    def claim(self, slot: Slot | None, most: int = 0) -> Claim | None:
        """What counts the requests of this worker against a bound, that of one address unless it is given;
        None where it shares nothing."""
        if self.shared is None or slot is None:
            return None
        return Claim(slot, most or self._parallel, self.shared.workers)

    def give_back(self, slot: Slot | None) -> None:
        """Nothing is open there any more."""
        if self.shared is not None and slot is not None:
            self.shared.give_back(slot)

    def refuses(self, pool: Pool, retry: bool) -> Bound | None:
        """What keeps another request from an address."""
        here, everywhere = pool.active + 1, self.requests + 1
        if here > self._parallel or (pool.claim is not None and not pool.claim.reaches(here)):
            return Bound.PARALLEL_REQUESTS
        if everywhere > self._requests or (self._claim is not None and not self._claim.reaches(everywhere)):
            return Bound.ALL_REQUESTS
        if retry and pool.retries + pool.others(RETRIES) >= self.settings.backend_max_parallel_retries:
            return Bound.PARALLEL_RETRIES
        return None

    def refuses_to_wait(self, pool: Pool) -> Bound | None:
        """What keeps another request from waiting for a connection."""
        if len(pool.waiting) + pool.others(PENDING) >= self.settings.backend_max_pending_requests:
            return Bound.PENDING_REQUESTS
        if self.pending + self._others(PENDING) >= self.settings.gateway_max_pending_requests:
            return Bound.ALL_PENDING
        return None

    def full(self, pool: Pool) -> bool:
        """Whether an address has as many connections as it may. One in each worker is always allowed: what
        others keep idle would hold its requests up."""
        here = pool.connections
        return here > 0 and here + pool.others(CONNECTIONS) >= self.settings.backend_max_connections

    def all_full(self) -> bool:
        """Whether there are as many connections as there may be."""
        here = self.connections
        return here > 0 and here + self._others(CONNECTIONS) >= self.settings.gateway_max_connections

    def wanted_elsewhere(self, pool: Pool) -> bool:
        """Whether idle connections here keep the requests of other workers waiting."""
        if self.shared is None:
            return False
        return (pool.others(PENDING) > 0 and self.full(pool)) or (
            self._others(PENDING) > 0 and self.all_full()
        )

    def publish(self, pool: Pool) -> None:
        """Something changed: other workers are to see it."""
        if self._all is None:
            return
        self._all.publish(self.connections, self.pending, self.retries)
        if pool.slot is not None:
            pool.slot.publish(pool.connections, len(pool.waiting), pool.retries)

    def fewer(self, pool: Pool) -> None:
        """A request ended: other workers may have what is not needed here."""
        if self._claim is not None:
            self._claim.fit(self.requests)
        if pool.claim is not None:
            pool.claim.fit(pool.active)

    def _others(self, field: int) -> int:
        return self._all.others(field) if self._all is not None else 0


class Place(Upstream):
    """A place in the line for a connection, in its stead (`penstock.ingress.ports.Upstream`)."""

    def __init__(self, pool: Pool, listener: UpstreamListener) -> None:
        self._pool, self._listener, self.reused = pool, listener, False

    def send(self, head: bytes, body: bytes | bytearray) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def release(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._pool.leave(self._listener)


class Pool:
    """Connections to one address."""

    def __init__(
        self, keeper: Keeper, bounds: Bounds, address: Address, max_header_bytes: int, of: str = ""
    ) -> None:
        """`of`: what there is at the address, of kinds that are counted apart."""
        self._keeper, self._bounds, self.address = keeper, bounds, address
        self.slot, self._shared = bounds.slot((*address, of)), bounds.shared is not None
        self.claim = bounds.claim(self.slot)
        self.idle: list[EngineConnection] = []
        self.open: set[EngineConnection] = set()
        self.connecting = self.retries = 0
        # Requests that wait for a connection, in the order in which they came.
        self.waiting: dict[UpstreamListener, None] = {}
        self.max_header_bytes = max_header_bytes
        self.requests_per_connection = bounds.settings.backend_max_requests_per_connection
        self.metrics_bad_framing = keeper.bad_framing

    @property
    def connections(self) -> int:
        """Those there are, and those being made."""
        return len(self.open) + self.connecting

    @property
    def active(self) -> int:
        """Requests that have a connection or are getting one."""
        return len(self.open) + self.connecting - len(self.idle)

    def others(self, field: int) -> int:
        """What the other workers have here."""
        return self.slot.others(field) if self.slot is not None else 0

    def connect(self, *, retry: bool) -> None:
        """A connection is being made for a request."""
        self.connecting += 1
        self._bounds.connections += 1
        if retry:
            self.count_retry(1)
        self._bounds.publish(self)

    def connected(self, connection: EngineConnection) -> None:
        """It is made."""
        self.connecting -= 1
        self.open.add(connection)

    def failed(self, *, retry: bool) -> None:
        """It could not be made."""
        self.connecting -= 1
        self._bounds.connections -= 1
        if retry:
            self.count_retry(-1)
        self._changed()

    def count_retry(self, change: int) -> None:
        """One more retry is under way, or one less."""
        self.retries += change
        self._bounds.retries += change
        self._bounds.publish(self)

    def wait(self, listener: UpstreamListener) -> Place:
        """Wait for a connection."""
        self.waiting[listener] = None
        self._bounds.pending += 1
        self._bounds.publish(self)
        return Place(self, listener)

    def leave(self, listener: UpstreamListener) -> None:
        """It waits no more. More than once is once."""
        if listener in self.waiting:
            del self.waiting[listener]
            self._bounds.pending -= 1
            self._bounds.publish(self)

    def give_back(self, connection: EngineConnection) -> None:
        """Keep a connection for the next exchange; the most recently used one is taken first."""
        connection.left -= 1
        if not connection.left:
            self.forget(connection)
            connection.close_idle()
            return
        connection.idle_since = _clock()
        self.idle.append(connection)
        self._bounds.idle += 1
        if connection.retry:
            connection.retry = False
            self.count_retry(-1)
        if self._shared:
            self._bounds.fewer(self)
        if self._bounds.pending:
            self._keeper.freed()

    def take(self) -> EngineConnection | None:
        """An idle connection."""
        while self.idle:
            connection = self.idle.pop()
            self._bounds.idle -= 1
            if connection.usable:
                return connection
            self.forget(connection)
        return None

    def forget(self, connection: EngineConnection) -> None:
        """A connection ended, or is about to. More than once is once."""
        if connection not in self.open:
            return
        self.open.discard(connection)
        self._bounds.connections -= 1
        if connection in self.idle:
            self.idle.remove(connection)
            self._bounds.idle -= 1
        if connection.retry:
            connection.retry = False
            self.count_retry(-1)
        self._changed()

    def close_idle(self, until: float = math.inf) -> None:
        """Close those idle since before `until`. All, where one was found dead: the others have been idle for
        longer."""
        for connection in [c for c in self.idle if c.idle_since < until]:
            self.forget(connection)
            connection.close_idle()

    def evict(self) -> None:
        """Close the one that has been idle for longest, in favour of others."""
        connection = self.idle[0]
        self.forget(connection)
        connection.close_idle()

    def _changed(self) -> None:
        self._bounds.publish(self)
        self._bounds.fewer(self)
        if self._bounds.pending:
            self._keeper.freed()
