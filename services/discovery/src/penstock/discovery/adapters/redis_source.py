"""Instances from Redis: read at an interval, and at once where notifications tell of a change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial

from penstock.common.records import parse_record, redis_prefix
from penstock.discovery.adapters.redis_client import RedisClient, RedisFailed
from penstock.discovery.adapters.redis_listing import read_all, read_some
from penstock.discovery.adapters.redis_notices import Notices
from penstock.discovery.allowed import AllowedHosts
from penstock.discovery.moment import Moment
from penstock.discovery.ports import Source, SourceState, bounded
from penstock.discovery.redis_settings import RedisSettings
from penstock.discovery.redis_table import RedisTable

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """Seconds. A restart or the election of a master is no reason to call anything stale."""

    stale_after_s: float = 2.0
    retry_first_s: float = 0.1
    retry_max_s: float = 2.0


class RedisSource:
    """Fulfils `ports.Source`."""

    name = "redis"

    def __init__(
        self,
        client: RedisClient,
        table: RedisTable,
        *,
        prefix: bytes,
        refresh_s: float,
        pace: Pace,
        notices: Notices | None,
        woken: asyncio.Event,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Without `notices`, no notifications are asked for; they set `woken`."""
        self._client, self._table = client, table
        self._prefix, self._refresh_s, self._pace = prefix, refresh_s, pace
        self._notices, self._woken, self._wall = notices, woken, wall
        self._asked = False
        self._stale = ""
        self._warned = ""
        self._answered_at = time.monotonic()
        self._failures = 0

    async def states(self) -> AsyncGenerator[SourceState, None]:
        """See `ports.Source`."""
        while True:
            due_at = time.monotonic() + self._refresh_s
            if await self._list():
                yield self._state()
            async for _ in self._until(due_at):
                yield self._state()

    async def refresh(self) -> None:
        """See `ports.Source`."""
        self._asked = True
        self._woken.set()

    async def close(self) -> None:
        """See `ports.Source`."""
        if self._notices is not None:
            await self._notices.close()
        await self._client.close()

    def _state(self) -> SourceState:
        instances, skipped = self._table.state()
        return SourceState(instances, bounded(skipped), self._stale)

    def _now(self) -> Moment:
        return Moment(time.monotonic(), self._wall())

    async def _list(self) -> bool:
        """Read everything; whether there is something else to say than before."""
        self._asked = False
        first, told = not self._table.listed, self._stale
        try:
            await self._follow_nodes()
            reading = await read_all(self._client, self._prefix, self._table.holds)
        except RedisFailed as exc:
            self._fail(exc)
            return self._table.listed and self._stale != told
        away = bool(self._stale)
        changed = self._table.replace(reading, self._now(), was_away=away)
        if away or self._warned:
            log.info("Redis is read again")
        self._stale, self._warned, self._failures = "", "", 0
        self._answered_at = time.monotonic()
        return first or changed or away

    async def _follow_nodes(self) -> None:
        """Before the reading, so that no change falls in between."""
        if self._notices is not None:
            self._notices.follow(await self._client.nodes())

    def _fail(self, failure: RedisFailed) -> None:
        """Of an outage that lasts, its first reason: it becomes part of every record. Nobody hears of a
        state before the first reading, so that the log has to say it."""
        self._failures += 1
        if self._stale or time.monotonic() - self._answered_at < self._pace.stale_after_s:
            return
        reason = f"Redis cannot be read: {failure}"
        if self._table.listed:
            self._stale = reason
        elif reason != self._warned:
            log.warning("%s", reason)
            self._warned = reason

    async def _until(self, due_at: float) -> AsyncGenerator[None, None]:
        """A turn for each change, until it is time to read everything."""
        if self._failures:
            pause_s = self._pace.retry_first_s * 2 ** min(self._failures - 1, 16)
            due_at = time.monotonic() + min(self._pace.retry_max_s, pause_s) * random.uniform(0.75, 1.25)
        while not self._asked and time.monotonic() < due_at:
            await self._wait(due_at)
            # While Redis is away nobody can write: nothing ends by its age.
            ended = not self._failures and self._table.expire(time.monotonic())
            if await self._take_notices() or ended:
                yield

    async def _wait(self, due_at: float) -> None:
        """Until then, until a record may end, or until woken."""
        ends_at = None if self._failures else self._table.next_expiry_s()
        until_s = due_at if ends_at is None else min(due_at, ends_at)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, until_s - time.monotonic())):
                await self._woken.wait()
        self._woken.clear()

    async def _take_notices(self) -> bool:
        """Read what changed; whether anything is different then. If in doubt, all is read soon."""
        if not self._notices or not self._table.listed:
            return False
        self._asked = self._asked or self._notices.overflowed
        changed = False
        for node, keys in self._notices.take().items():
            try:
                values = await read_some(node, [*keys])
            except RedisFailed as exc:
                log.debug("%s", exc)
                self._asked = True
                continue
            for key, gone in keys.items():
                if key in values:
                    changed = self._table.put(key, values[key], self._now()) or changed
                elif gone:
                    changed = self._table.drop(key) or changed
                else:
                    # Perhaps the server was emptied meanwhile.
                    self._asked = True
        return changed


def redis_source(settings: RedisSettings, allowed: AllowedHosts, pace: Pace | None = None) -> Source:
    """The source that `settings` describe; its connections open when it is iterated. Which addresses are
    `allowed` is judged where all sources meet."""
    prefix = settings.discovery_redis_prefix.encode() or redis_prefix(settings.discovery_record_format)
    parse = partial(parse_record, record_format=settings.discovery_record_format)
    woken, db = asyncio.Event(), settings.redis_address().db
    return RedisSource(
        RedisClient(settings),
        RedisTable(parse, settings.discovery_redis_status_ttl_ms / 1000),
        prefix=prefix,
        refresh_s=settings.discovery_redis_refresh_interval_ms / 1000,
        pace=pace or Pace(),
        notices=Notices(prefix, db, woken) if settings.discovery_redis_notifications else None,
        woken=woken,
    )
