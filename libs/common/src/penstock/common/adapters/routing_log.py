"""A process's part in the routing log as its settings want it: writer, spool, spools of dead siblings."""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any

from penstock.common.adapters.event_spool import DiskSpool, keep_synced, leftovers
from penstock.common.bus import Bus
from penstock.common.errors import SpoolFault
from penstock.common.event_adoption import Adopter
from penstock.common.event_log import EventWriter
from penstock.common.identity import Identity
from penstock.common.routing_events import WRITER_CHANGE, WriterChange, WriterEvent
from penstock.common.settings import ServiceSettings, exit_with_faults
from penstock.common.subjects import EVENTS, MIB
from penstock.common.telemetry import Metrics


class RoutingLog:
    """Build it inside the loop, run its loops, `end` it, then `close` it."""

    def __init__(self, bus: Bus, identity: Identity, metrics: Metrics, settings: ServiceSettings) -> None:
        """Leaves with exit code 2 if the spool's folder cannot be used."""
        self._bus, self._identity, self._settings = bus, identity, settings
        self._stream = replace(
            EVENTS,
            max_bytes=settings.event_stream_mib * MIB,
            max_age_s=settings.event_retention_hours * 3600,
        )
        self._spool, self._stored = _spool_of(identity, settings), False
        self.events = EventWriter(
            bus,
            identity.writer,
            identity.incarnation,
            metrics,
            max_kept_bytes=settings.event_buffer_mib * MIB,
            stream=self._stream,
            spool=self._spool,
        )
        spool = self._spool
        metrics.gauge(
            "penstock_events_spooled_bytes",
            "Bytes of the audit spool on disk",
            lambda: spool.held_bytes if spool is not None else 0,
        )

    def loops(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """What goes on for as long as the process lives, by name."""
        self._say(WriterChange.BEGAN)
        yield "event-log", self.events.run()
        root, service = self._settings.audit_spool, self._identity.service
        if self._spool is not None and root is not None:
            adopter = Adopter(
                self._bus, self.events, self._stream, self._identity.id, lambda: leftovers(root, service)
            )
            yield "spool-sync", keep_synced(self._spool)
            yield "spool-adoption", adopter.run()

    async def end(self, deadline_s: float) -> None:
        """The last event of this process, and a chance to be stored."""
        self._say(WriterChange.ENDED)
        self._stored = await self.events.flush(deadline_s if self._bus.connected else 0)

    def _say(self, change: WriterChange) -> None:
        writer = self._identity.writer
        event = WriterEvent(writer, self._identity.incarnation, change, writer)
        self.events.emit(WRITER_CHANGE, "", writer, event)

    def close(self) -> None:
        """Let go of the spool, which stays for others if the stream does not hold all of it."""
        if self._spool is not None:
            self._spool.close(stored=self._stored)


def _spool_of(identity: Identity, settings: ServiceSettings) -> DiskSpool | None:
    if settings.audit_spool is None:
        return None
    size, fsync = settings.audit_spool_mib * MIB, settings.audit_spool_fsync
    try:
        return DiskSpool(settings.audit_spool, identity.writer, identity.incarnation, size, fsync)
    except SpoolFault as exc:
        fault = f"--audit-spool {exc}; give a folder on a local disk that this user may write to"
        exit_with_faults(f"penstock {identity.service}", [fault])
