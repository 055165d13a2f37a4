"""Peers: which other services are alive, by their heartbeats."""

from __future__ import annotations

from penstock.common.identity import Identity
from penstock.common.messages import Heartbeat

# Heartbeats come every second; three missed ones and the process counts as gone.
SILENCE_S = 3.5
MAX_PEERS = 4096

SCHEDULER, INGRESS, DISCOVERY = "scheduler", "ingress", "discovery"


class Peers:
    """Heartbeats by service and id; `now` is a monotonic clock in seconds."""

    def __init__(self, own: Identity) -> None:
        self._own = own
        self._heard: dict[tuple[str, str], float] = {}

    def heard(self, beat: Heartbeat, now: float) -> None:
        """Note a heartbeat; a scheduler that takes no work is not one to count with. Past MAX_PEERS
        further processes are not noted."""
        key = beat.service, beat.id
        if (*key, beat.incarnation) == (self._own.service, self._own.id, self._own.incarnation):
            return
        if beat.service not in (SCHEDULER, INGRESS, DISCOVERY) or (
            beat.service == SCHEDULER and not beat.ready
        ):
            self._heard.pop(key, None)
        elif key in self._heard or len(self._heard) < MAX_PEERS:
            self._heard[key] = now

    def expire(self, now: float) -> None:
        """Forget those that fell silent."""
        for key in [key for key, at in self._heard.items() if now - at > SILENCE_S]:
            del self._heard[key]

    @property
    def replicas(self) -> int:
        """Schedulers alive, this one included."""
        return 1 + sum(service == SCHEDULER for service, _ in self._heard)

    @property
    def discoveries(self) -> int:
        """Replicas of discovery alive, ready or not."""
        return sum(service == DISCOVERY for service, _ in self._heard)

    @property
    def ingresses(self) -> list[str]:
        """Ids of the ingresses alive."""
        return [id_ for service, id_ in self._heard if service == INGRESS]
