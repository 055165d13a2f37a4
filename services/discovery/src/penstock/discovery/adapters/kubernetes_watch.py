"""List and watch of one kind of object in one namespace, kept up for ever.

A listing gives a resource version; a watch goes on from there and moves it with each event and bookmark.
A watch that ends or falls silent is opened anew from the last version. A version that has expired (410)
means a new listing.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from penstock.common.codec import DecodeError, decode_record
from penstock.discovery.adapters.kubernetes_api import ApiFault
from penstock.discovery.adapters.kubernetes_resource import GONE, Resource
from penstock.discovery.kubernetes_instances import Found
from penstock.discovery.kubernetes_objects import Event, Head, Meta, Status

log = logging.getLogger(__name__)

# How long the API is asked to let a watch live; spread, so that those of many clients do not end together.
WATCH_S = (240, 300)
# A watch that ends sooner and without a word counts as failed.
SHORT_WATCH_S = 1.0
RETRY_FIRST_S = 0.1
# Whatever the API does, a round is begun no more often than this.
SHORTEST_ROUND_S = 0.1
# Failed watches in a row after which the version is not trusted any more.
MAX_FAILED_WATCHES = 3


@dataclass(frozen=True)
class Pace:
    """In seconds: how long a watch may be silent, and the time from a listing to the next."""

    silence_s: float
    refresh_s: float


class _Expired(Exception):
    """The version cannot be gone on from."""


class Watch:
    """`objects` by `kind/namespace/name`, complete after `listed` listings, last known ones while `stale`."""

    def __init__(
        self, resource: Resource, pace: Pace, *, find: Callable[[bytes], Found], changed: Callable[[], None]
    ) -> None:
        """`find` reads an object, `changed` is called after every change."""
        self._resource, self._pace = resource, pace
        self._find, self._changed = find, changed
        self._version = ""
        self._due = asyncio.Event()
        self._list_at = 0.0
        self._failed_watches = 0
        # Whether the API said something of use in this round; after a round without, the next one waits.
        self._progress = False
        self.objects: dict[str, Found] = {}
        self.listed = 0
        self.stale = ""

    def refresh(self) -> None:
        """List again now."""
        self._due.set()

    async def run(self) -> None:
        """For ever."""
        failures, loop = 0, asyncio.get_running_loop()
        while True:
            self._progress, begun_at, asked_s = False, loop.time(), 0.0
            try:
                await self._round()
            except ApiFault as fault:
                self._fail(fault)
                asked_s = fault.retry_after_s
            pause_s = max(asked_s, SHORTEST_ROUND_S - (loop.time() - begun_at))
            failures = 0 if self._progress else failures + 1
            if failures:
                longest_s = self._resource.bounds.retry_s
                backoff_s = min(longest_s, RETRY_FIRST_S * 2 ** min(failures, 16))
                pause_s = max(pause_s, backoff_s * random.uniform(0.5, 1.0))
            if pause_s > 0:
                # `refresh` ends the pause.
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._due.wait()

    async def _round(self) -> None:
        """A listing if one is due, then one watch."""
        now = asyncio.get_running_loop().time()
        if self._due.is_set() or not self._version or now >= self._list_at:
            await self._list()
        try:
            await _unless(self._due, self._watch())
        except _Expired:
            self._version = ""

    async def _list(self) -> None:
        """The objects listed take the place of those known. A listing that fails is asked for again."""
        self._due.clear()
        self._version = ""
        objects: dict[str, Found] = {}

        def take(item: bytes) -> None:
            try:
                objects[self._key(decode_record(Head, item).metadata)] = self._find(item)
            except DecodeError as exc:
                reason = f"its metadata cannot be read: {exc.__cause__}"
                objects[f"{self._resource.target.kind}/?"] = Found(skipped=reason)

        version = await self._resource.list(take)
        self.objects, self._version = objects, version
        self.listed += 1
        spread = random.uniform(0.9, 1.0)
        self._list_at = asyncio.get_running_loop().time() + self._pace.refresh_s * spread
        self._failed_watches = 0
        self._changed()

    async def _watch(self) -> None:
        """Until the API ends it, it falls silent, or its version expires."""
        self._failed_watches += 1
        if self._failed_watches > MAX_FAILED_WATCHES:
            raise _Expired
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(random.randint(*WATCH_S)),
        }
        loop = asyncio.get_running_loop()
        try:
            async with self._resource.ask("watch", query) as response:
                opened_at = loop.time()
                self._alive()
                sound = await self._follow(response.content.iter_any())
        except ApiFault as fault:
            if fault.status == GONE:
                raise _Expired from fault
            raise
        except (aiohttp.ClientError, OSError) as exc:
            # That a stream breaks off says nothing about the API; opening it again does.
            log.debug("kubernetes: the watch broke off: %s", exc)
            return
        if sound and loop.time() - opened_at >= SHORT_WATCH_S:
            self._heard()

    async def _follow(self, pieces: AsyncIterator[bytes]) -> bool:
        """Take the lines of the stream until it ends, or no whole line came for too long: the next watch
        tells whether nothing happened or nothing arrives. False if it stopped in the middle of a line."""
        held, bound = bytearray(), self._resource.bounds.line_bytes
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._pace.silence_s
        while loop.time() < self._list_at:
            try:
                async with asyncio.timeout_at(min(deadline, self._list_at)):
                    piece = await anext(pieces, b"")
            except TimeoutError:
                if not held:
                    self._heard()
                return False
            if not piece:
                return not held
            held += piece
            if len(held) > bound:
                raise ApiFault(f"the watch sent a line over {bound} bytes")
            *lines, held = held.split(b"\n")
            for line in filter(None, lines):
                self._take(bytes(line))
            if lines:
                deadline = loop.time() + self._pace.silence_s
                self._changed()
        return not held

    def _take(self, line: bytes) -> None:
        """One event."""
        try:
            event = decode_record(Event, line)
            data = bytes(event.object)
            if event.type == "ERROR":
                self._error(decode_record(Status, data))
            meta = decode_record(Head, data).metadata
        except DecodeError:
            raise ApiFault("the watch sent what cannot be read") from None
        self._heard()
        if event.type == "DELETED":
            self.objects.pop(self._key(meta), None)
        elif event.type in ("ADDED", "MODIFIED"):
            self.objects[self._key(meta)] = self._find(data)
            if len(self.objects) > self._resource.bounds.objects:
                raise _Expired
        self._version = meta.resource_version or self._version

    def _error(self, status: Status) -> None:
        if status.code == GONE or status.reason in ("Expired", "Gone"):
            raise _Expired
        raise ApiFault(f"the watch ends with an error: {status.message[:300]}", status=status.code)

    def _key(self, meta: Meta) -> str:
        return f"{self._resource.target.kind}/{meta.namespace}/{meta.name}"

    def _heard(self) -> None:
        self._progress, self._failed_watches = True, 0

    def _alive(self) -> None:
        if self.stale:
            self.stale = ""
            self._changed()

    def _fail(self, fault: ApiFault) -> None:
        if str(fault) == self.stale:
            return
        self.stale = str(fault)
        # Once there was a state, discovery tells of the next one's reason.
        level = logging.DEBUG if self.listed else logging.WARNING
        log.log(level, "kubernetes: %s: %s", self._resource.target.kind, fault)
        self._changed()


async def _unless(event: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, but stop it when the event is set; nothing is left running."""
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        working.cancel()
        waiting.cancel()
        await asyncio.wait({working, waiting})
    if not working.cancelled():
        working.result()
