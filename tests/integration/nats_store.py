"""The registrations bucket in NATS as the store of a source, for the contract of all sources."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from integration.servers import NatsServer, eventually
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.errors import BusError
from penstock.common.model import Instance
from penstock.common.records import PENSTOCK, write_record
from penstock.common.settings import BusSettings, load
from penstock.common.subjects import REGISTRATIONS, token
from penstock.common.telemetry import Metrics
from penstock.discovery.adapters.nats_source import nats_source
from penstock.discovery.ports import Source
from penstock.discovery.settings import DiscoverySettings

TTL_MS = 60_000
GARBAGE = "garbage"


class NatsStore:
    """Fulfils `source_contract.StoreLab` with a server of its own."""

    outages: Sequence[str] = ("stopped", "frozen")
    grace = True
    carries = frozenset(
        field
        for field in Instance.__struct_fields__
        if field not in ("id", "endpoint", "state", "reason", "source")
    )

    def __init__(self, ttl_ms: int = TTL_MS) -> None:
        self.server = NatsServer()
        self.server.start()
        self.bus = NatsBus(BusSettings(nats_url=self.server.url), "test", Metrics())
        self.register_flags = (
            *("--store", "nats", "--nats-url", self.server.url),
            *("--discovery-nats-status-ttl-ms", str(ttl_ms)),
        )
        self._ttl_ms = ttl_ms
        self._how = ""

    async def start(self) -> NatsStore:
        """Connect; the bucket is there, as it is where discovery runs."""
        await self.bus.start()
        await eventually(lambda: self.bus.connected)
        await self.bus.ensure_bucket(REGISTRATIONS)
        return self

    def id_of(self, name: str) -> str:
        return name

    def source(self) -> Source:
        argv = [
            *("--llm-backend-discovery", "nats"),
            *("--discovery-nats-status-ttl-ms", str(self._ttl_ms)),
        ]
        settings = load(DiscoverySettings, argv, prog="penstock discovery", environ={})
        return nats_source(settings, self.bus)

    async def put(self, *instances: Instance) -> None:
        for one in instances:
            value = write_record((one,), int(time.time() * 1000), PENSTOCK)
            await self._until_done(one.id, value)

    async def delete(self, instance_id: str) -> None:
        await self.bus.delete(REGISTRATIONS, token(instance_id))

    async def put_garbage(self) -> str:
        await self._until_done(GARBAGE, b"\x00\xff{")
        return GARBAGE

    async def delete_garbage(self) -> None:
        await self.delete(GARBAGE)

    async def away(self, how: str) -> None:
        self._how = how
        if how == "frozen":
            self.server.freeze()
        else:
            self.server.kill()
        await eventually(lambda: not self.bus.connected)

    async def back(self) -> None:
        if self._how == "frozen":
            self.server.thaw()
        elif self._how:
            await asyncio.to_thread(self.server.start)
        self._how = ""
        await eventually(lambda: self.bus.connected)

    async def lose_data(self) -> None:
        self.server.kill()
        await eventually(lambda: not self.bus.connected)
        await asyncio.to_thread(self.server.restart, keep_store=False)
        await eventually(lambda: self.bus.connected)

    async def close(self) -> None:
        if self._how:
            await self.back()
        await self.bus.close()
        self.server.__exit__()

    async def _until_done(self, key: str, value: bytes) -> None:
        """A bucket that is lost is made by the source, after a moment."""

        async def done() -> bool:
            try:
                await self.bus.put(REGISTRATIONS, token(key), value)
            except BusError as exc:
                raise AssertionError(str(exc)) from exc
            return True

        await eventually(done)
