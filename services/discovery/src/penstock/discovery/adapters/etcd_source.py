"""Instances from etcd: list, watch from the next revision on, prove that the watch is alive, start over."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

from penstock.common.records import etcd_prefix, parse_record
from penstock.discovery.adapters.etcd_client import EtcdClient, EtcdError, MemberFailed, Watch
from penstock.discovery.adapters.etcd_listing import ask_newest, list_prefix
from penstock.discovery.etcd_settings import EtcdSettings
from penstock.discovery.etcd_table import Bounds, EtcdTable
from penstock.discovery.etcd_wire import KeyChange
from penstock.discovery.moment import Moment
from penstock.discovery.ports import Source, SourceState, bounded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pace:
    """Seconds. A frozen member is found by asking, and a deaf watch by two doubts in a row. An election takes
    a second or two, in which no member answers: no reason to call anything stale."""

    prove_every_s: float = 2.0
    stale_after_s: float = 3.0
    retry_first_s: float = 0.1
    retry_max_s: float = 2.0


class EtcdSource:
    """Fulfils `ports.Source`."""

    name = "etcd"

    def __init__(
        self,
        client: EtcdClient,
        table: EtcdTable,
        *,
        prefix: bytes,
        refresh_s: float,
        bounds: Bounds,
        pace: Pace,
    ) -> None:
        self._client, self._table = client, table
        self._prefix, self._refresh_s, self._bounds = prefix, refresh_s, bounds
        self._pace = pace
        self._asked = asyncio.Event()
        self._wait: asyncio.Timeout | None = None
        self._stale = ""
        self._answered_at = time.monotonic()
        self._failures = 0

    async def states(self) -> AsyncGenerator[SourceState, None]:
        """See `ports.Source`."""
        while True:
            told = self._stale
            if await self._list():
                yield self._state()
                async with aclosing(self._follow()) as changes:
                    async for _ in changes:
                        yield self._state()
            elif self._table.listed and self._stale != told:
                yield self._state()
            await self._pause()

    async def refresh(self) -> None:
        """See `ports.Source`."""
        self._asked.set()
        if self._wait is not None and not self._wait.expired():
            self._wait.reschedule(asyncio.get_running_loop().time())

    async def close(self) -> None:
        """See `ports.Source`."""
        await self._client.close()

    def _state(self) -> SourceState:
        instances, skipped = self._table.state()
        return SourceState(instances, bounded(skipped), self._stale)

    async def _list(self) -> bool:
        """Whether there is a listing; if not, `_stale` says why once it lasts."""
        self._asked.clear()
        try:
            listing = await list_prefix(self._client, self._prefix, self._bounds)
        except EtcdError as exc:
            self._failures += 1
            self._tell(f"etcd cannot be read: {exc}")
            return False
        kept = self._table.replace(listing, _now(), was_away=bool(self._stale))
        if kept:
            log.warning("etcd lost its data: %d records of it are kept for now", kept)
        self._stale, self._answered_at = "", time.monotonic()
        return True

    def _tell(self, reason: str) -> None:
        """Of an outage that lasts, its first reason: it becomes part of every record. Nobody hears of a
        state before the first listing, so that the log has to say it then, and each other reason."""
        log.debug("%s", reason)
        lasts = time.monotonic() - self._answered_at >= self._pace.stale_after_s
        if lasts and not self._table.listed and self._stale != reason:
            log.warning("%s", reason)
            self._stale = reason
        elif lasts and not self._stale:
            self._stale = reason

    async def _follow(self) -> AsyncGenerator[None, None]:
        """A turn for each change, until it is time to list again."""
        member = self._client.member
        try:
            async with (
                self._client.watch(self._prefix, self._table.position + 1) as watch,
                aclosing(self._changes(watch)) as changes,
            ):
                async for _ in changes:
                    yield
        except EtcdError as exc:
            self._failures += 1
            if isinstance(exc, MemberFailed):
                self._client.leave(member)
            # One that ends again and again is a poll every two seconds, and one line.
            level = logging.INFO if self._failures == 1 else logging.DEBUG
            log.log(level, "etcd is listed again, its watch at %s ended: %s", member, exc)

    async def _changes(self, watch: Watch) -> AsyncGenerator[None, None]:
        refresh_at = time.monotonic() + self._refresh_s
        prove_at = time.monotonic() + self._pace.prove_every_s
        doubted = False
        while not self._asked.is_set() and time.monotonic() < refresh_at:
            events = await self._read(watch, min(prove_at, refresh_at))
            changed = self._table.apply(events, _now())
            if events:
                doubted = False
            if time.monotonic() >= prove_at:
                agrees = await self._prove(watch)
                if doubted and not agrees:
                    raise MemberFailed("it misses changes")
                doubted = not agrees
                prove_at = time.monotonic() + self._pace.prove_every_s
            if self._table.expire(time.monotonic()) or changed:
                yield

    async def _read(self, watch: Watch, until_s: float) -> list[KeyChange]:
        """What comes next; nothing when the time is over, or a listing is asked for."""
        left_s = max(0.0, until_s - time.monotonic())
        try:
            async with asyncio.timeout(left_s) as self._wait:
                return [event for answer in await watch.read() for event in answer.events]
        except TimeoutError:
            return []
        finally:
            self._wait = None

    async def _prove(self, watch: Watch) -> bool:
        """Whether the table holds what the member of the watch holds; it has to answer, too."""
        header, count, newest = await ask_newest(self._client, watch.member, self._prefix)
        self._answered_at, self._failures = time.monotonic(), 0
        return self._table.agrees(header, count, newest)

    async def _pause(self) -> None:
        """Longer after each failure in a row, at once when asked."""
        if not self._failures:
            return
        pause_s = min(self._pace.retry_max_s, self._pace.retry_first_s * 2 ** min(self._failures - 1, 16))
        try:
            async with asyncio.timeout(pause_s * random.uniform(0.75, 1.25)):
                await self._asked.wait()
        except TimeoutError:
            return


def etcd_source(settings: EtcdSettings, pace: Pace | None = None) -> Source:
    """The source that `settings` describe; its connections open when it is iterated."""
    client = EtcdClient(
        settings.etcd_members(),
        timeout_s=settings.discovery_etcd_dial_timeout,
        tls=settings.etcd_tls(),
        user=settings.discovery_etcd_username,
        password=settings.discovery_etcd_password.get_secret_value(),
    )
    bounds = Bounds()
    parse = partial(parse_record, record_format=settings.discovery_record_format)
    return EtcdSource(
        client,
        EtcdTable(parse, settings.discovery_etcd_lease_ttl, bounds),
        prefix=settings.discovery_etcd_prefix.encode() or etcd_prefix(settings.discovery_record_format),
        refresh_s=settings.discovery_etcd_refresh_interval_sec,
        bounds=bounds,
        pace=pace or Pace(),
    )


def _now() -> Moment:
    return Moment(time.monotonic(), time.time())
