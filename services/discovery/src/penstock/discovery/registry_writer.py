"""Carries planned writes out: each over the revision it was planned on, so that nobody is overwritten."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from penstock.common.bus import Bus
from penstock.common.errors import BusError, RevisionConflict
from penstock.common.subjects import INSTANCES
from penstock.discovery.instruments import Instruments
from penstock.discovery.registry import RegistryView, Write


class RegistryWriter:
    """Writes to the bucket and notes in the view what was written."""

    def __init__(self, bus: Bus, view: RegistryView, instruments: Instruments) -> None:
        self._bus, self._view, self._count = bus, view, instruments.writes

    async def carry_out(self, writes: Iterable[Write]) -> list[str]:
        """All of these at one time; for each why it failed, empty if it is written."""
        return list(await asyncio.gather(*map(self._write, writes)))

    async def _write(self, write: Write) -> str:
        revision, incarnation = write.expected + 1, self._view.incarnation
        try:
            if write.value is None:
                await self._bus.delete(INSTANCES, write.key, expected=write.expected)
            else:
                revision = await self._bus.put(INSTANCES, write.key, write.value, expected=write.expected)
        except RevisionConflict as exc:
            # The watch brings what the other one wrote; the plan is made again from that.
            self._count.inc("conflict")
            return str(exc)
        except BusError as exc:
            self._count.inc("failed")
            return f"{write.key}: {exc}"
        self._count.inc("deleted" if write.value is None else "written")
        self._view.wrote(incarnation, write, revision)
        return ""
