"""The bus, read into a Fleet: routing events out of the log, engines' status and heartbeats as they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, Generic, TypeVar

import msgspec

from penstock.cli.event_lines import BrokenEvent, split
from penstock.cli.top.fleet import Ended, Fleet, Placed, Refused
from penstock.common.bus import Bus, Stored
from penstock.common.routing_events import (
    BREAKER,
    DEGRADED,
    INSTANCE,
    OUTCOME,
    PLACEMENT,
    REJECTION,
    BreakerEvent,
    DegradedEvent,
    InstanceEvent,
)
from penstock.common.subjects import EVENTS, HEARTBEAT, STATUS, event_filter

T = TypeVar("T")
Take = Callable[[float, T], object]


class _Enclosed(msgspec.Struct, Generic[T], frozen=True):
    """An event of one type; what surrounds its data is of no account here."""

    data: T


class Reading:
    """Follows everything that is shown."""

    def __init__(self, bus: Bus, fleet: Fleet, model: str = "") -> None:
        self._bus, self._fleet, self._model = bus, fleet, model
        # By type, when its last message was read (monotonic), and what is read of it was written since.
        self._read_at: dict[str, float] = {}
        self._current: set[str] = set()

    @asynccontextmanager
    async def running(self, window_s: float) -> AsyncIterator[None]:
        """Read for the block: rates from the last `window_s`, states from as far back as the log goes."""
        self._bus.on_connection(self._on_connection)
        self._on_connection(self._bus.connected)
        heard = [
            await self._bus.subscribe(STATUS, lambda one: self._fleet.status(time.time(), one)),
            await self._bus.subscribe(HEARTBEAT, lambda one: self._fleet.heartbeat(time.time(), one)),
        ]
        whole = EVENTS.max_age_s
        fleet, tasks = self._fleet, []
        table: Mapping[str, tuple[float, type[Any], Take[Any]]] = {
            INSTANCE: (whole, InstanceEvent, lambda _, event: fleet.instance(event)),
            DEGRADED: (whole, DegradedEvent, fleet.degraded),
            BREAKER: (whole, BreakerEvent, lambda _, event: fleet.breaker(event)),
            PLACEMENT: (window_s, Placed, fleet.placed),
            OUTCOME: (window_s, Ended, fleet.ended),
            REJECTION: (window_s, Refused, fleet.refused),
        }
        for kind, (since_s, data, take) in table.items():
            model = self._model if since_s == window_s else ""
            self._read_at[kind] = time.monotonic()
            follow = self._follow(kind, event_filter(kind, model), since_s, data, take)
            tasks.append(asyncio.create_task(follow, name=f"follow {kind}"))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for subscription in heard:
                await subscription.close()

    async def caught_up(self, quiet_s: float, at_most_s: float) -> None:
        """Return once the past was read: of each type what is written at this time comes, or nothing came for
        `quiet_s`; or once `at_most_s` are over."""
        until = time.monotonic() + at_most_s
        while (now := time.monotonic()) < until:
            behind = [at for kind, at in self._read_at.items() if kind not in self._current]
            if all(now - at >= quiet_s for at in behind):
                return
            await asyncio.sleep(quiet_s / 10)

    def _on_connection(self, up: bool) -> None:
        self._fleet.connection(up, time.time())

    async def _follow(self, kind: str, subject: str, since_s: float, data: type[T], take: Take[T]) -> None:
        decoder = msgspec.json.Decoder(_Enclosed[data])  # type: ignore[valid-type]  # a type made at run time
        began = time.time()
        async with aclosing(self._bus.follow(EVENTS, subject, since_s)) as messages:
            async for message in messages:
                self._read_at[kind] = time.monotonic()
                if message.time_s >= began:
                    self._current.add(kind)
                self._take(message, decoder, take)

    def _take(self, message: Stored, decoder: msgspec.json.Decoder[Any], take: Take[T]) -> None:
        try:
            for raw in split(message.headers, message.payload):
                take(message.time_s, decoder.decode(raw).data)
        except (BrokenEvent, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self._fleet.broken += 1
