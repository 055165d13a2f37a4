"""Following the live configuration, writing to it, and giving a bucket back what it lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from penstock.common.bus import Bus, WatchEvent
from penstock.common.errors import BusError, BusUnavailable, PenstockError, RevisionConflict
from penstock.common.event_log import EventWriter
from penstock.common.live_config import USER, Changed, Document, LiveConfig, config_key, successor
from penstock.common.routing_events import CONFIG_CHANGE, ConfigEvent
from penstock.common.subjects import CONFIG

log = logging.getLogger(__name__)

KEEP_EVERY_S = 0.25
SWEEP_EVERY_S = 3600.0
# Marks of deleted documents go after this time; nobody sleeps so long and then writes back.
MARKS_LAST = timedelta(days=30)
ATTEMPTS = 5
# A write waits up to a second until its own watch shows it, so that who wrote reads what was written.
SEEN_CHECKS, SEEN_CHECK_S = 500, 0.002


class VersionConflict(PenstockError):
    """A document is not at the version that a change expected: `actual` is (0: there is none)."""

    def __init__(self, kind: str, name: str, expected: int | None, actual: int) -> None:
        self.kind, self.name, self.expected, self.actual = kind, name, expected, actual
        wanted = "others keep changing it" if expected is None else f"not {expected}"
        super().__init__(f"{kind} {name!r} is at version {actual}, {wanted}")


def _ignore(changed: Changed) -> None:
    """For followers that read the configuration when they need it."""


async def follow_config(bus: Bus, config: LiveConfig, on_change: Callable[[Changed], None] = _ignore) -> None:
    """Keep `config` in step, for ever: a loop of a service. `on_change` is called with what changed, and once
    with the first listing even if it is empty. A config that `keeps` also makes the bucket, and gives a new
    one what the last one held."""
    async with asyncio.TaskGroup() as loops:
        loops.create_task(_watch(bus, config, on_change), name="config-watch")
        if config.keeps:
            loops.create_task(_keep(bus, config), name="config-keep")


async def _watch(bus: Bus, config: LiveConfig, on_change: Callable[[Changed], None]) -> None:
    event: WatchEvent
    async for event in bus.watch(CONFIG):
        was_synced = config.synced
        changed = config.apply(event)
        if changed or config.synced != was_synced:
            on_change(changed)


async def _keep(bus: Bus, config: LiveConfig) -> None:
    loop = asyncio.get_running_loop()
    sweep_at, trouble = loop.time() + SWEEP_EVERY_S, ""
    while True:
        try:
            if bus.connected and config.lost:
                await bus.ensure_bucket(CONFIG)
            elif bus.connected and config.owed():
                await _write_back(bus, config)
            elif bus.connected and loop.time() >= sweep_at:
                sweep_at = loop.time() + SWEEP_EVERY_S
                await _sweep(bus, config)
            trouble = ""
        except BusError as exc:
            if str(exc) != trouble:
                log.warning("live configuration: %s", exc)
            trouble = str(exc)
        await asyncio.sleep(KEEP_EVERY_S)


async def _write_back(bus: Bus, config: LiveConfig) -> None:
    owed = config.owed()
    log.warning("%d documents of live configuration are written to a bucket without them", len(owed))
    for key, value, expected in owed:
        try:
            await bus.put(CONFIG, key, value, expected=expected)
        except RevisionConflict:
            # Another process was faster; the watch brings what it wrote.
            log.debug("%s is written already", key)


async def _sweep(bus: Bus, config: LiveConfig) -> None:
    for key, revision in list(config.marks(_stamp(datetime.now(UTC) - MARKS_LAST))):
        try:
            await bus.delete(CONFIG, key, expected=revision)
        except RevisionConflict:
            log.debug("%s is written again", key)


class ConfigWriter:
    """Changes documents: each over the version it was planned on, with a `config` event that says who."""

    def __init__(
        self,
        bus: Bus,
        config: LiveConfig,
        events: EventWriter | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        users: Callable[[str], str] | None = None,
    ) -> None:
        """`config` has to keep, and to be followed; `users` gives what stands for a user in the log."""
        self._bus, self._config, self._events, self._clock = bus, config, events, clock
        self._users = users

    async def put(
        self, kind: str, name: str, value: Any, by: str, origin: str, expected_version: int | None = None
    ) -> Document:
        """Write a document; one that says the same already stays as it is. `expected_version` is the one it
        must have (0: there is none yet), None for any.

        Raises:
            VersionConflict: it has another one.
            MessageTooLarge: over the bucket's bound.
            BusError: not known to be written.
        """
        held = self._config.get(kind, name)
        if held is not None and held.value == value and expected_version in (None, held.version):
            return held
        document = await self._change(kind, name, value, by, origin, expected_version, deleted=False)
        assert document is not None
        return document

    async def delete(
        self, kind: str, name: str, by: str, origin: str, expected_version: int | None = None
    ) -> bool:
        """Delete a document; False if there is none. Raises as `put` does."""
        return await self._change(kind, name, None, by, origin, expected_version, deleted=True) is not None

    async def _change(
        self,
        kind: str,
        name: str,
        value: Any,
        by: str,
        origin: str,
        expected_version: int | None,
        *,
        deleted: bool,
    ) -> Document | None:
        if not self._config.synced:
            raise BusUnavailable(CONFIG.name, "the live configuration is not listed yet")
        actual = 0
        for attempt in range(ATTEMPTS):
            record, revision = self._config.record(kind, name)
            actual = record.version if record and not record.deleted else 0
            if expected_version not in (None, actual):
                raise VersionConflict(kind, name, expected_version, actual)
            if deleted and not actual:
                return None
            stamp = max(_stamp(self._clock()), record.changed_at if record else "")
            document = Document(value, record.version + 1 if record else 1, by, stamp, origin)
            data = successor(
                record, document, kind=kind, name=name, deleted=deleted, limit_bytes=CONFIG.max_value_bytes
            )
            try:
                written = await self._bus.put(CONFIG, config_key(kind, name), data, expected=revision)
            except RevisionConflict:
                await asyncio.sleep(SEEN_CHECK_S * 4**attempt)
                continue
            await self._seen(written)
            self._tell(kind, name, document, "deleted" if deleted else "updated" if actual else "created")
            return document
        raise VersionConflict(kind, name, expected_version, actual)

    async def _seen(self, revision: int) -> None:
        for _ in range(SEEN_CHECKS):
            if self._config.sequence >= revision or self._config.lost:
                return
            await asyncio.sleep(SEEN_CHECK_S)

    def _tell(self, kind: str, name: str, document: Document, change: str) -> None:
        if kind == USER and self._users is not None:
            name = self._users(name)
        event = ConfigEvent(kind, name, change, document.version, document.by, document.origin)
        if self._events is not None:
            self._events.emit(CONFIG_CHANGE, "", f"{kind}/{name}", event)
        fields = {"kind": kind, "name": name, "version": document.version, "by": document.by}
        log.info("configuration %s", change, extra={"fields": fields})


def _stamp(moment: datetime) -> str:
    """Of fixed width, so that the order of texts is the order of moments."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
