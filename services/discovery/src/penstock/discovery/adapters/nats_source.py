"""The NATS source: registrations in a bucket of their own, written by `penstock register`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from functools import partial

from penstock.common.bus import Bus
from penstock.common.errors import BusError
from penstock.common.records import PENSTOCK, parse_record
from penstock.common.subjects import REGISTRATIONS
from penstock.discovery.ports import Source, SourceState, bounded
from penstock.discovery.registrations import Parse, Registrations
from penstock.discovery.settings import NATS, DiscoverySettings

log = logging.getLogger(__name__)

BUCKET_RETRY_S = 0.5


class NatsSource:
    """Fulfils `ports.Source` with the registrations bucket, which it creates when it is not there."""

    def __init__(
        self,
        bus: Bus,
        parse: Parse,
        ttl_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`parse` raises RecordError; a registration that is not written again within `ttl_s` ends."""
        self.name = NATS
        self._bus, self._clock, self._wall = bus, clock, wall
        self._table = Registrations(parse, ttl_s)
        self._moved = asyncio.Event()

    async def states(self) -> AsyncGenerator[SourceState, None]:
        """A state after each change; heartbeats, which change nothing, yield none."""
        tasks = [
            asyncio.create_task(self._watch(), name="nats source watch"),
            asyncio.create_task(self._keep_bucket(), name="nats source bucket"),
        ]
        for task in tasks:
            task.add_done_callback(lambda _: self._moved.set())
        last: SourceState | None = None
        try:
            while True:
                await self._movement()
                for ended in (task for task in tasks if task.done()):
                    ended.result()
                self._table.expire(self._clock())
                instances, skipped = self._table.state()
                state = SourceState(instances, bounded(skipped), self._table.stale)
                if self._table.listed and state != last:
                    last = state
                    yield state
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def refresh(self) -> None:
        """Nothing to do: the bus's watch proves itself every two seconds, and lists when it cannot."""

    async def close(self) -> None:
        """The bus belongs to the process."""

    async def _movement(self) -> None:
        """Until an event of the watch, or until something may end by its age."""
        ends_s = self._table.next_expiry_s()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(None if ends_s is None else max(0.0, ends_s - self._clock())):
                await self._moved.wait()
        self._moved.clear()

    async def _watch(self) -> None:
        async with contextlib.aclosing(self._bus.watch(REGISTRATIONS)) as events:
            async for event in events:
                self._table.apply(event, self._clock(), self._wall())
                self._moved.set()

    async def _keep_bucket(self) -> None:
        """Whenever the bucket cannot be watched, it may be gone: make it unless it exists."""
        trouble = ""
        while True:
            if self._bus.connected and (self._table.stale or not self._table.listed):
                try:
                    await self._bus.ensure_bucket(REGISTRATIONS)
                    trouble = ""
                except BusError as exc:
                    if str(exc) != trouble:
                        log.warning("bucket of registrations: %s", exc)
                    trouble = str(exc)
            await asyncio.sleep(BUCKET_RETRY_S)


def nats_source(settings: DiscoverySettings, bus: Bus) -> Source:
    """The source of --llm-backend-discovery nats; its records are always in Penstock's own format."""
    parse = partial(parse_record, record_format=PENSTOCK)
    return NatsSource(bus, parse, settings.discovery_nats_status_ttl_ms / 1000)
