"""Two buses to experiment on, one behaviour suite for both: the memory broker and a real NATS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import nats
from nats.aio.msg import Msg

from integration.servers import NatsServer, eventually
from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.bus import Bus
from penstock.common.settings import BusSettings
from penstock.common.telemetry import Metrics

T = TypeVar("T")


@dataclass
class Member:
    """One process's bus, and what it counted."""

    bus: Bus
    metrics: Metrics
    connection: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bus.on_connection(self.connection.append)

    def dropped(self, subject: str, reason: str) -> float:
        """Messages dropped, by the pattern of the subject and the reason."""
        return sum(
            sample.value
            for family in self.metrics.snapshot()
            if family.name == "penstock_bus_dropped_total"
            for sample in family.samples
            if sample.labels == (subject, reason)
        )


class Lab(Protocol):
    """A bus whose faults are at hand."""

    async def member(self, name: str = "test") -> Member:
        """Another process on the bus, connected."""

    async def deliver(self, subject: str, *payloads: bytes) -> None:
        """Bytes from somebody who does not use our code."""

    async def down(self) -> None:
        """The broker dies; returns when every member knows."""

    async def up(self, *, keep_store: bool = True) -> None:
        """It is back, with its store or an empty one; returns when every member knows."""

    async def services(self) -> set[str]:
        """Names in the directory of services."""

    async def close(self) -> None:
        """Disconnect every member and end the broker."""


class MemoryLab:
    def __init__(self) -> None:
        self.broker = MemoryBroker()

    async def member(self, name: str = "test") -> Member:
        metrics = Metrics()
        return Member(MemoryBus(self.broker, metrics), metrics)

    async def deliver(self, subject: str, *payloads: bytes) -> None:
        for payload in payloads:
            self.broker.deliver(subject, payload, None)

    async def down(self) -> None:
        self.broker.set_up(False)

    async def up(self, *, keep_store: bool = True) -> None:
        if not keep_store:
            self.broker.drop_storage()
        self.broker.set_up(True)

    async def services(self) -> set[str]:
        return {f"penstock-{service}" for service, _ in self.broker.services}

    async def close(self) -> None:
        for bus in list(self.broker.buses):
            await bus.close()


class NatsLab:
    def __init__(self) -> None:
        self.server = NatsServer()
        self.server.start()
        self._buses: list[NatsBus] = []

    async def member(self, name: str = "test") -> Member:
        metrics = Metrics()
        bus = NatsBus(BusSettings(nats_url=self.server.url), name, metrics)
        self._buses.append(bus)
        await bus.start()
        await eventually(lambda: bus.connected)
        return Member(bus, metrics)

    async def deliver(self, subject: str, *payloads: bytes) -> None:
        client = await nats.connect(self.server.url)
        for payload in payloads:
            await client.publish(subject, payload)
        await client.flush()
        await client.close()

    async def down(self) -> None:
        self.server.kill()
        await eventually(lambda: not any(bus.connected for bus in self._buses))

    async def up(self, *, keep_store: bool = True) -> None:
        self.server.restart(keep_store=keep_store)
        await eventually(lambda: all(bus.connected for bus in self._buses))

    async def services(self) -> set[str]:
        client = await nats.connect(self.server.url)
        names: set[str] = set()

        async def note(message: Msg) -> None:
            names.update(part for part in message.data.decode().split('"') if part.startswith("penstock-"))

        inbox = client.new_inbox()
        await client.subscribe(inbox, cb=note)
        await client.publish("$SRV.INFO", reply=inbox)
        await client.flush()
        await client.flush()
        await client.close()
        return names

    async def close(self) -> None:
        for bus in self._buses:
            await bus.close()
        self.server.__exit__()


LABS: dict[str, Callable[[], Lab]] = {"memory": MemoryLab, "nats": NatsLab}


@asynccontextmanager
async def collecting(source: AsyncGenerator[T, None]) -> AsyncIterator[list[T]]:
    """A list that grows as `source` yields; what made the source fail fails the test."""
    items: list[T] = []

    async def collect() -> None:
        async for item in source:
            items.append(item)

    task = asyncio.create_task(collect(), name="collecting")
    try:
        yield items
    finally:
        ended = task.done()
        task.cancel()
        outcome = (await asyncio.gather(task, return_exceptions=True))[0]
        await source.aclose()
        if ended:
            raise AssertionError(f"the source ended: {outcome!r}")
