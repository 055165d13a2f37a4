"""Two sources that both write one instance: an end to the quarrel.

Replicas with the same settings agree on who speaks for an instance. Those with different ones, as in a
rolling restart that changes the order of sources, could overwrite each other for ever.
"""

from __future__ import annotations

from collections import OrderedDict

TAKINGS, WINDOW_S = 3, 60.0
MAX_REMEMBERED = 4096


class Claims:
    """How often a source took a record from another one: `TAKINGS` times in `WINDOW_S`, then it yields
    for the rest of that time. Times are seconds of one clock."""

    def __init__(self) -> None:
        self._taken: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def may_take(self, key: str, now: float) -> bool:
        """Whether the record may be taken over from another source."""
        since, count = self._taken.get(key, (now, 0))
        return count < TAKINGS or not 0 <= now - since < WINDOW_S

    def took(self, key: str, now: float) -> None:
        """It was."""
        since, count = self._taken.get(key, (now, 0))
        fresh = not 0 <= now - since < WINDOW_S
        self._taken[key] = (now, 1) if fresh else (since, count + 1)
        self._taken.move_to_end(key)
        if len(self._taken) > MAX_REMEMBERED:
            self._taken.popitem(last=False)
