"""Which scheduler replica to ask: the next of those that are heard and answer (DESIGN D5).

A queue group goes on delivering to a member that hangs, for as long as the bus believes in its
connection. Asked by name, a replica that does not answer costs one attempt and is left alone.
"""

from __future__ import annotations

import msgspec

from penstock.common.messages import Heartbeat

# Heartbeats come every second: two may be lost.
SILENCE_S = 2.5
# Longer than SILENCE_S, so that a frozen replica is not tried again before it has to be heard anew.
SUSPECT_S = 3.0
MAX_REPLICAS = 1024
ANY = ""


class _Replica(msgspec.Struct):
    heard_at: float
    suspect_until: float = 0.0


class Replicas:
    """The ready replicas of one shard, as their heartbeats tell."""

    def __init__(self) -> None:
        self._known: dict[str, _Replica] = {}
        self._turn = 0

    def heard(self, beat: Heartbeat, now: float) -> None:
        """Take a scheduler's heartbeat."""
        if not beat.ready:
            self._known.pop(beat.id, None)
        elif (replica := self._known.get(beat.id)) is not None:
            replica.heard_at = now
        elif len(self._known) < MAX_REPLICAS:
            self._known[beat.id] = _Replica(now)

    def pick(self, now: float) -> str:
        """The replica whose turn it is; ANY if none is heard that answers: then the queue group decides."""
        for name in [name for name, replica in self._known.items() if now - replica.heard_at > SILENCE_S]:
            del self._known[name]
        trusted = [name for name, replica in self._known.items() if now >= replica.suspect_until]
        if not trusted:
            return ANY
        self._turn += 1
        return trusted[self._turn % len(trusted)]

    def silent(self, name: str, now: float) -> None:
        """A replica did not answer in time."""
        if name in self._known:
            self._known[name].suspect_until = now + SUSPECT_S

    def suspects(self, now: float) -> int:
        """Replicas that are left alone at `now`."""
        return sum(now < replica.suspect_until for replica in self._known.values())

    def gone(self, name: str) -> None:
        """Nobody listens under this name any more."""
        self._known.pop(name, None)

    def __len__(self) -> int:
        return len(self._known)
