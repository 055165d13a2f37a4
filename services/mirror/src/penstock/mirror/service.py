"""The mirror's presence on the bus. It takes no copies and replays nothing."""

from __future__ import annotations

from penstock.common.bus import Bus


class Mirror:
    """Ready while the bus answers; holds no work, so there is nothing to drain."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def missing(self) -> str:
        """Why it is not ready; empty when it is."""
        return "" if self._bus.connected else "no connection"

    async def drain(self) -> None:
        """Nothing is under way."""
