"""Which other parts of the suite are missing, told once when it begins and once when it ends."""

from __future__ import annotations

import logging

from penstock.common.bus import Lost, WatchEvent
from penstock.common.instances import InstanceTable
from penstock.scheduler.peers import SILENCE_S, Peers
from penstock.scheduler.telling import Teller

LOGGED_IDS = 20


class Absences:
    """Tells when the registry is lost, when discovery is silent, and when a scheduler has fallen silent."""

    def __init__(self, teller: Teller, table: InstanceTable, peers: Peers) -> None:
        self._teller, self._table, self._peers = teller, table, peers
        self._registry_lost = self._scheduler_lost = False
        self._discovery_heard = self._discovery_silent = False

    def registry(self, event: WatchEvent) -> None:
        """An event of the watch was applied to the table."""
        lost = self._table.lost
        if lost is self._registry_lost:
            return
        self._registry_lost = lost
        cause = event.cause if isinstance(event, Lost) else ""
        text = "registry lost, its last known state is used" if lost else "registry is back"
        self._teller.degraded("registry", lost, cause, text, logging.WARNING if lost else logging.INFO)

    def listen(self, hears: bool) -> None:
        """Look at the heartbeats; `hears`: the bus has been there for long enough to hear everybody."""
        self._listen_for_discovery(hears)
        self._listen_for_schedulers(hears)

    def _listen_for_discovery(self, hears: bool) -> None:
        """Nobody keeps the registry while discovery is silent."""
        heard = self._peers.discoveries > 0
        self._discovery_heard |= heard
        silent = self._discovery_heard and not heard
        if silent is self._discovery_silent or (silent and not hears):
            return
        self._discovery_silent = silent
        text = "discovery is silent, instances are not checked" if silent else "discovery is back"
        self._teller.degraded(
            "discovery", silent, f"no heartbeat for {SILENCE_S:g} s" if silent else "", text
        )

    def _listen_for_schedulers(self, hears: bool) -> None:
        """Requests go to fewer replicas once one fell silent that had not said that it leaves."""
        gone = self._peers.lost_schedulers
        if bool(gone) is self._scheduler_lost or (gone and not hears):
            return
        self._scheduler_lost = bool(gone)
        cause = f"no heartbeat for {SILENCE_S:g} s of {', '.join(sorted(gone)[:LOGGED_IDS])}" if gone else ""
        text = "a scheduler is silent" if gone else "a scheduler has joined"
        self._teller.degraded("a scheduler", bool(gone), cause, text)
