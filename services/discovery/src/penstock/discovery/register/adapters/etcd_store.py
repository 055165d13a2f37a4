"""The registration in etcd: one key under a lease that each heartbeat keeps alive."""

from __future__ import annotations

import msgspec

from penstock.common.records import etcd_prefix
from penstock.discovery.adapters.etcd_client import EtcdClient, EtcdError
from penstock.discovery.register.ports import Store, StoreError
from penstock.discovery.register.settings import RegisterSettings


class _Lease(msgspec.Struct, frozen=True):
    ID: int = 0


class _Renewed(msgspec.Struct, frozen=True):
    """`TTL` is 0, or absent, when there is no such lease."""

    TTL: int = 0


class _Renewal(msgspec.Struct, frozen=True):
    result: _Renewed = _Renewed()


class _Done(msgspec.Struct, frozen=True):
    pass


class EtcdStore:
    """Fulfils `ports.Store`. A lease that ended, as after a loss of data, is replaced by a new one."""

    def __init__(self, client: EtcdClient, key: bytes, ttl_s: int) -> None:
        self._client, self._key, self._ttl_s = client, key, ttl_s
        self._lease = 0

    async def open(self) -> None:
        """Connections open when they are needed."""

    async def write(self, value: bytes) -> None:
        try:
            if not await self._renewed():
                self._lease = 0
                self._lease = (await self._client.call("/v3/lease/grant", {"TTL": self._ttl_s}, _Lease)).ID
            put = {"key": self._key, "value": value, "lease": self._lease}
            await self._client.call("/v3/kv/put", put, _Done)
        except EtcdError as exc:
            raise StoreError(f"etcd: {exc}") from exc

    async def withdraw(self) -> None:
        try:
            await self._client.call("/v3/kv/deleterange", {"key": self._key}, _Done)
        except EtcdError as exc:
            raise StoreError(f"etcd: {exc}") from exc

    async def close(self) -> None:
        await self._client.close()

    async def _renewed(self) -> bool:
        if not self._lease:
            return False
        answer = await self._client.call("/v3/lease/keepalive", {"ID": self._lease}, _Renewal)
        return answer.result.TTL > 0


def etcd_store(settings: RegisterSettings) -> Store:
    """The store of --store etcd."""
    client = EtcdClient(
        settings.etcd_members(),
        timeout_s=min(settings.discovery_etcd_dial_timeout, settings.store_timeout / 2),
        tls=settings.etcd_tls(),
        user=settings.discovery_etcd_username,
        password=settings.discovery_etcd_password.get_secret_value(),
    )
    prefix = settings.discovery_etcd_prefix.encode() or etcd_prefix(settings.discovery_record_format)
    return EtcdStore(client, prefix + settings.key_name.encode(), settings.discovery_etcd_lease_ttl)
