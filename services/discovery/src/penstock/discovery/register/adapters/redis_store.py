"""The registration in Redis: one key that expires unless each heartbeat sets it again."""

from __future__ import annotations

from penstock.common.records import redis_prefix
from penstock.discovery.adapters.redis_client import RedisClient, RedisFailed
from penstock.discovery.register.ports import Store, StoreError
from penstock.discovery.register.settings import RegisterSettings


class RedisStore:
    """Fulfils `ports.Store`."""

    def __init__(self, client: RedisClient, key: bytes, ttl_ms: int) -> None:
        self._client, self._key, self._ttl_ms = client, key, ttl_ms

    async def open(self) -> None:
        """Connections open when they are needed."""

    async def write(self, value: bytes) -> None:
        await self._run("SET", self._key, value, "PX", self._ttl_ms)

    async def withdraw(self) -> None:
        await self._run("DEL", self._key)

    async def close(self) -> None:
        await self._client.close()

    async def _run(self, *command: bytes | str | int) -> None:
        try:
            await self._client.run(self._key, *command)
        except RedisFailed as exc:
            raise StoreError(f"Redis: {exc}") from exc


def redis_store(settings: RegisterSettings) -> Store:
    """The store of --store redis."""
    prefix = settings.discovery_redis_prefix.encode() or redis_prefix(settings.discovery_record_format)
    ttl_ms = settings.discovery_redis_status_ttl_ms
    return RedisStore(RedisClient(settings), prefix + settings.key_name.encode(), ttl_ms)
