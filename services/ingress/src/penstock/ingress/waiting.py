"""Who waits for capacity, and in which order: by priority, by turns among users, first come first served.

A line holds requests that the same instances could take. Turns are rounds, as in start-time fair queueing
with equal costs: a user's next request belongs to the round after that of its last waiting one, the first
one to the round after the last served. Whoever waits is passed at most once per round by each other user of
its priority, and keeps its place when a placement that was tried for it fails.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

# A place in a line: the smallest is served first. (-priority, round, number in order of arrival)
Place = tuple[int, int, int]

# Weight of the last interval in the mean time between two requests that leave a line for an instance.
PACE_WEIGHT = 0.2
# Seconds that a client may be told to stay away: at least the resolution of the header, at most a minute,
# because the estimate knows nothing of capacity to come.
MIN_RETRY_S, MAX_RETRY_S, UNKNOWN_PACE_S = 1.0, 60.0, 1.0


class Ticket(Generic[T]):
    """One waiting request. `asking`: a placement is tried for it; `since`, `until`: seconds of the clock."""

    __slots__ = ("asking", "holder", "line", "place", "since", "until", "user")

    def __init__(self, holder: T, line: Line[T], place: Place, user: str, since: float, until: float) -> None:
        self.holder, self.line, self.place, self.user = holder, line, place, user
        self.since, self.until, self.asking = since, until, False


class Line(Generic[T]):
    """Requests that compete for the same instances; `key` says which; `owner` and `model` are theirs."""

    def __init__(self, key: Hashable, model: str, owner: str) -> None:
        self.key, self.model, self.owner = key, model, owner
        self.tickets: dict[Place, Ticket[T]] = {}
        self._ready: list[Place] = []
        # By priority: the round last served, and by user those of its waiting requests.
        self._served: dict[int, int] = {}
        self._rounds: dict[int, dict[str, list[int]]] = {}
        self._left_at: float | None = None
        self._pace_s = 0.0

    def __len__(self) -> int:
        return len(self.tickets)

    def place_for(self, priority: int, user: str, number: int) -> Place:
        """Where a request that comes at this moment would stand."""
        mine = self._rounds.get(priority, {}).get(user)
        after = mine[-1] if mine else self._served.get(priority, 0)
        return -priority, max(after, self._served.get(priority, 0)) + 1, number

    def add(self, ticket: Ticket[T]) -> None:
        """Stand in line."""
        priority, turn, _ = ticket.place
        self.tickets[ticket.place] = ticket
        self._rounds.setdefault(-priority, {}).setdefault(ticket.user, []).append(turn)
        insort(self._ready, ticket.place)

    def remove(self, ticket: Ticket[T]) -> None:
        """Leave the line, from whatever place."""
        del self.tickets[ticket.place]
        self._unready(ticket.place)
        priority, turn, _ = ticket.place
        users = self._rounds[-priority]
        rounds = users[ticket.user]
        rounds.remove(turn)
        if not rounds:
            del users[ticket.user]
        if not users:
            # Nobody is left who could be passed: the level begins anew.
            del self._rounds[-priority]
            self._served.pop(-priority, None)

    def served(self, ticket: Ticket[T], now: float) -> None:
        """It has an instance: leave the line, which is one step further."""
        priority, turn, _ = ticket.place
        self._served[-priority] = max(self._served.get(-priority, 0), turn)
        self.remove(ticket)
        if self._left_at is not None:
            interval = now - self._left_at
            weight = PACE_WEIGHT if self._pace_s else 1.0
            self._pace_s += weight * (interval - self._pace_s)
        self._left_at = now

    def first(self) -> Ticket[T] | None:
        """Whom a free slot belongs to."""
        return self.tickets[self._ready[0]] if self._ready else None

    def last(self) -> Ticket[T] | None:
        """Who would be served last of all for whom no placement is tried."""
        return self.tickets[self._ready[-1]] if self._ready else None

    def ask(self, ticket: Ticket[T]) -> None:
        """A placement is being tried for it."""
        ticket.asking = True
        self._unready(ticket.place)

    def back(self, ticket: Ticket[T]) -> None:
        """There was none: it has its place again."""
        if not ticket.asking:
            return
        ticket.asking = False
        insort(self._ready, ticket.place)

    def retry_after_s(self) -> float:
        """When one who comes at the end of the line might be served, by the pace of the last ones."""
        pace = self._pace_s or UNKNOWN_PACE_S
        return min(MAX_RETRY_S, max(MIN_RETRY_S, pace * len(self.tickets)))

    def _unready(self, place: Place) -> None:
        at = bisect_left(self._ready, place)
        if at < len(self._ready) and self._ready[at] == place:
            del self._ready[at]


class Lines(Generic[T]):
    """All lines of a process. A line exists while somebody stands in it."""

    def __init__(self) -> None:
        self._lines: dict[Hashable, Line[T]] = {}
        self._number = 0
        self.count = 0

    def __iter__(self) -> Iterator[Line[T]]:
        return iter(self._lines.values())

    def find(self, key: Hashable) -> Line[T] | None:
        """The line of this key, if anybody stands in it."""
        return self._lines.get(key)

    def open(self, key: Hashable, model: str, owner: str) -> Line[T]:
        """The line of this key; one without anybody is not kept before somebody joins."""
        return self._lines.get(key) or Line(key, model, owner)

    def join(
        self, line: Line[T], holder: T, *, priority: int, user: str, since: float, until: float
    ) -> Ticket[T]:
        """Stand in line."""
        self._number += 1
        place = line.place_for(priority, user, self._number)
        ticket = Ticket(holder, line, place, user, since, until)
        line.add(ticket)
        self._lines[line.key] = line
        self.count += 1
        return ticket

    def leave(self, ticket: Ticket[T], served_at: float | None = None) -> None:
        """Out of the line; `served_at`: when it got an instance."""
        line = ticket.line
        if served_at is None:
            line.remove(ticket)
        else:
            line.served(ticket, served_at)
        self.count -= 1
        if not line.tickets:
            del self._lines[line.key]

    def first(self, matches: Callable[[Line[T]], bool]) -> Ticket[T] | None:
        """Whom a slot belongs to that several lines may use: the highest priority, then the longest wait."""
        heads = [head for line in self._lines.values() if matches(line) and (head := line.first())]
        return min(heads, key=lambda head: (head.place[0], head.since, head.place[2]), default=None)

    def to_displace(self, line: Line[T], priority: int, user: str) -> Ticket[T] | None:
        """Who makes room for a request that comes while all places are taken: the last of the longest line,
        if its own is shorter by two or more; else the last of its own line that stands behind it."""
        longest = max(self._lines.values(), key=len, default=None)
        if longest is None:
            return None
        if longest is not line and len(longest) > len(line) + 1:
            return longest.last()
        last = line.last()
        place = line.place_for(priority, user, self._number + 1)
        return last if last is not None and place < last.place else None

    def overdue(self, now: float) -> list[Ticket[T]]:
        """Whose time is over."""
        return [t for line in self._lines.values() for t in line.tickets.values() if t.until <= now]
