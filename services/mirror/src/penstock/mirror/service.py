"""The mirror's configuration: from its file to everybody, and from everybody's word to its own work."""

from __future__ import annotations

import asyncio
import logging

from penstock.common.bus import Bus
from penstock.common.config_keeping import ConfigWriter, VersionConflict, follow_config
from penstock.common.errors import BusError
from penstock.common.live_config import MIRROR, Changed, LiveConfig
from penstock.common.mirroring import NAME, BadMirrorConfig, MirrorConfig, of_document
from penstock.mirror.file_rule import ORIGIN, FileRule
from penstock.mirror.ports import ConfigFile, FileMissing, FileUnusable
from penstock.mirror.report import Report

log = logging.getLogger(__name__)

LOOK_EVERY_S = 0.25
# Read whatever its time stamps say.
CHECK_EVERY_S = 10.0
FAULT = "mirror configuration"


class Configuration:
    """Keeps `config`, the effective one; gives everybody what the file says when it is the file's turn."""

    def __init__(
        self,
        bus: Bus,
        live: LiveConfig,
        writer: ConfigWriter,
        report: Report,
        file: ConfigFile,
        by: str,
        *,
        look_every_s: float = LOOK_EVERY_S,
        check_every_s: float = CHECK_EVERY_S,
    ) -> None:
        """`by` is who writes what the file says."""
        self._bus, self._live, self._writer, self._report = bus, live, writer, report
        self._file, self._by = file, by
        self._look_every_s, self._check_every_s = look_every_s, check_every_s
        self._rule = FileRule()
        self.config = MirrorConfig()
        # Why the file cannot be used; empty while it can.
        self.file_fault = ""
        self._file_was_there = False

    async def follow(self) -> None:
        """Keep up with the live configuration: a loop of the service."""
        await follow_config(self._bus, self._live, self._on_change)

    def _on_change(self, changed: Changed) -> None:
        document = self._live.get(MIRROR, NAME)
        try:
            self.config = of_document(document)
        except BadMirrorConfig as exc:
            log.error("the live mirror configuration is not valid, the last good one stays: %s", exc)
            return
        self._report.log_copies = self.config.EnableLog
        if (MIRROR, NAME) in changed:
            fields = {
                "active": self.config.active,
                "target": self.config.Target,
                "ratio": self.config.Ratio,
                "version": document.version if document else 0,
                "origin": document.origin if document else "",
            }
            log.info("mirror configuration", extra={"fields": fields})

    async def watch_file(self) -> None:
        """Look at the file, for ever: a loop of the service."""
        loop = asyncio.get_running_loop()
        check_at = 0.0
        while True:
            again = loop.time() >= check_at
            if again:
                check_at = loop.time() + self._check_every_s
            await self._look(again)
            await self._give()
            await asyncio.sleep(self._look_every_s)

    async def _look(self, again: bool) -> None:
        try:
            said = await self._file.look(again=again)
        except FileMissing:
            # A deployment without a mirror has none; one that had one keeps what it said.
            self._fault("it is gone, what it said last counts" if self._file_was_there else "")
        except FileUnusable as exc:
            self._file_was_there = True
            self._fault(str(exc))
        else:
            if said is not None:
                self._file_was_there = True
                self._fault("")
                self._rule.read(said.value, said.modified_at)

    async def _give(self) -> None:
        if not self._live.synced or self._live.lost or not self._bus.connected:
            return
        held = self._live.get(MIRROR, NAME)
        if not self._rule.due(held):
            return
        expected = held.version if held else 0
        try:
            await self._writer.put(MIRROR, NAME, self._rule.value, self._by, ORIGIN, expected)
        except (VersionConflict, BusError) as exc:
            # Looked at again in a moment, against what stands there then.
            log.debug("mirror configuration not written: %s", exc)
            return
        self._rule.written()

    def _fault(self, cause: str) -> None:
        if cause == self.file_fault:
            return
        self.file_fault = cause
        if cause:
            log.warning("%s cannot be used, the last good configuration stays: %s", self._file.name, cause)
        else:
            log.info("%s can be used again", self._file.name)
        self._report.degraded(FAULT, bool(cause), f"{self._file.name}: {cause}" if cause else "")
