"""What tests of rate limits share: ingresses by store, stores that count together, the ledger in Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from integration.redis_lab import RedisServer
from integration.servers import NatsServer, eventually
from integration.stack import Ingress, Stack
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.settings import BusSettings
from penstock.common.telemetry import Metrics
from penstock.ingress.adapters.limit_store import RedisLimitStore
from penstock.ingress.adapters.parent_limits import CountCall, ParentCounts, ParentLimitStore
from penstock.ingress.bus_limit_store import BusLimitStore
from penstock.ingress.limit_settings import LimitSettings
from penstock.ingress.limits import MINUTE_S, Correction, Part, Verdict, window
from penstock.ingress.ports import LimitStore, StoreLost

STORES = ("memory", "redis", "nats")


class StoreLab:
    """Stores that count together, of one kind."""

    def __init__(self, kind: str, redis: RedisServer, nats: NatsServer) -> None:
        self.kind = kind
        self._redis, self._nats = redis, nats
        self._parent = ParentCounts(time.time)
        self._stores: list[LimitStore] = []
        self._buses: list[NatsBus] = []

    async def store(self) -> LimitStore:
        """One more process."""
        store: LimitStore
        if self.kind == "redis":
            url = f"redis://{self._redis.address}/1"
            store = RedisLimitStore(LimitSettings(limits_store="redis", limits_redis_url=url))
        elif self.kind == "nats":
            bus = NatsBus(BusSettings(nats_url=self._nats.url), f"ingress/{len(self._buses)}", Metrics())
            self._buses.append(bus)
            await bus.start()
            await eventually(lambda: bus.connected)
            store = BusLimitStore(bus, 2.0)
        else:
            store = self._of_parent()
        self._stores.append(store)
        return store

    def _of_parent(self) -> LimitStore:
        async def send(call: CountCall) -> None:
            store.answered(self._parent.answer(call))

        store = ParentLimitStore(send)
        return store

    async def close(self) -> None:
        for store in self._stores:
            await store.close()
        for bus in self._buses:
            await bus.close()


async def counting_ingress(
    stack: Stack, redis: RedisServer, kind: str, workers: int | str, *flags: str
) -> Ingress:
    """The only ingress of `stack`, ready, which counts in a store of that kind."""
    of_redis = ("--limits-redis-url", f"redis://{redis.address}/0") if kind == "redis" else ()
    stack.ingresses.clear()
    ingress = stack.start_ingress("--workers", str(workers), "--limits-store", kind, *of_redis, *flags)
    await stack.ready()
    return ingress


async def within_a_minute(attempt: Callable[[str], Awaitable[None]]) -> None:
    """Run `attempt` under one name after the other until one ran within a window of the clock, which is that
    of the servers here too."""
    for number in range(3):
        begun = window(time.time(), 60)
        try:
            await attempt(f"{time.time_ns()} {number}")
        except AssertionError:
            if window(time.time(), 60) == begun:
                raise
        else:
            return
    raise AssertionError("no attempt ended within a minute")


# Of a minute, what a test needs that counts in one.
ROOM_S = 20


async def room_in_the_minute(redis: RedisServer) -> None:
    """Wait until enough of the minute is left: what is given back after its end is added to no count."""

    def there() -> bool:
        with redis.client() as client:
            seconds, _ = client.time()
        return bool(int(seconds) % MINUTE_S <= MINUTE_S - ROOM_S)

    await eventually(lambda: asyncio.to_thread(there))


def ledger(redis: RedisServer, user: str) -> int:
    """What Redis holds of a user's tokens, in all windows."""
    with redis.client() as client:
        keys = client.keys(f"penstock:limits:{len(user)}:{user}|t:*")
        return sum(int(client.get(key) or 0) for key in keys)


async def asked(
    store: LimitStore, claims: Sequence[Sequence[Part]], corrections: Sequence[Correction] = ()
) -> list[Verdict]:
    """What a store says. Raises StoreLost."""
    told: asyncio.Future[list[Verdict] | StoreLost] = asyncio.get_running_loop().create_future()
    store.settle(claims, corrections, told.set_result)
    verdicts = await told
    if isinstance(verdicts, StoreLost):
        raise verdicts
    return verdicts
