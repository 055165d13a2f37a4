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
        self._own, self.own = own, own.id
        self._heard: dict[tuple[str, str], float] = {}
        # Ids of the schedulers alive, this one included, in order; made anew when one comes or goes.
        self.schedulers: tuple[str, ...] = (own.id,)
        # Schedulers that fell silent without having said that they leave, until one joins.
        self.lost_schedulers: set[str] = set()

    def heard(self, beat: Heartbeat, now: float) -> None:
        """Note a heartbeat; a scheduler that takes no work is not one to count with. Past MAX_PEERS
        further processes are not noted."""
        key = beat.service, beat.id
        if (*key, beat.incarnation) == (self._own.service, self._own.id, self._own.incarnation):
            return
        if beat.service not in (SCHEDULER, INGRESS, DISCOVERY) or (
            beat.service == SCHEDULER and not beat.ready
        ):
            if self._heard.pop(key, None) is not None:
                self._count()
        elif key in self._heard or len(self._heard) < MAX_PEERS:
            joins = beat.service == SCHEDULER and key not in self._heard
            self._heard[key] = now
            if joins:
                self.lost_schedulers.clear()
                self._count()

    def expire(self, now: float) -> None:
        """Forget those that fell silent."""
        for key in [key for key, at in self._heard.items() if now - at > SILENCE_S]:
            del self._heard[key]
            if key[0] == SCHEDULER and len(self.lost_schedulers) < MAX_PEERS:
                self.lost_schedulers.add(key[1])
        self._count()

    def grace(self, now: float) -> None:
        """Everybody counts as heard now."""
        self._heard = dict.fromkeys(self._heard, now)

    def _count(self) -> None:
        others = {id_ for service, id_ in self._heard if service == SCHEDULER}
        self.schedulers = tuple(sorted(others | {self.own}))

    @property
    def replicas(self) -> int:
        """Schedulers alive, this one included."""
        return len(self.schedulers)

    @property
    def discoveries(self) -> int:
        """Replicas of discovery alive, ready or not."""
        return sum(service == DISCOVERY for service, _ in self._heard)

    @property
    def ingresses(self) -> list[str]:
        """Ids of the ingresses alive."""
        return [id_ for service, id_ in self._heard if service == INGRESS]
