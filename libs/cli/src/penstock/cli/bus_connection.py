"""How commands that read the bus reach it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.errors import BusUnavailable
from penstock.common.identity import new_identity
from penstock.common.settings import BusSettings
from penstock.common.telemetry import Metrics

CONNECT_WITHIN_S = 5.0


@asynccontextmanager
async def connected(
    settings: BusSettings, command: str, stop: asyncio.Event | None = None
) -> AsyncIterator[NatsBus]:
    """A bus that answers, until the block ends. Raises BusUnavailable after 5 s, or once `stop` is set."""
    bus = NatsBus(settings, new_identity(command).writer, Metrics())
    await bus.start()
    try:
        deadline = time.monotonic() + CONNECT_WITHIN_S
        while not bus.connected and time.monotonic() < deadline:
            if stop is not None and stop.is_set():
                break
            await asyncio.sleep(0.02)
        if not bus.connected:
            raise BusUnavailable("the bus", "does not answer; is --nats-url right?")
        yield bus
    finally:
        await bus.close()
