"""The registration in NATS: one key of the registrations bucket, which discovery creates."""

from __future__ import annotations

import asyncio
import contextlib

from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.errors import BusError
from penstock.common.identity import new_identity
from penstock.common.permissions import REGISTER
from penstock.common.subjects import REGISTRATIONS, token
from penstock.common.telemetry import Metrics
from penstock.discovery.register.ports import Store, StoreError
from penstock.discovery.register.settings import RegisterSettings

CONNECT_S = 1.0


class NatsStore:
    """Fulfils `ports.Store`."""

    def __init__(self, bus: NatsBus, key: str) -> None:
        self._bus, self._key = bus, key

    async def open(self) -> None:
        """Waits for the connection a moment: the first write would else come before it."""
        connected = asyncio.Event()
        self._bus.on_connection(lambda up: connected.set() if up else None)
        await self._bus.start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CONNECT_S):
                await connected.wait()

    async def write(self, value: bytes) -> None:
        try:
            await self._bus.put(REGISTRATIONS, self._key, value)
        except BusError as exc:
            raise StoreError(f"NATS: {exc}") from exc

    async def withdraw(self) -> None:
        try:
            await self._bus.delete(REGISTRATIONS, self._key)
        except BusError as exc:
            raise StoreError(f"NATS: {exc}") from exc

    async def close(self) -> None:
        await self._bus.close()


def nats_store(settings: RegisterSettings, metrics: Metrics) -> Store:
    """The store of --store nats."""
    bus = NatsBus(settings, new_identity(REGISTER).writer, metrics)
    return NatsStore(bus, token(settings.key_name))
