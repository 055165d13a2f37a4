"""How often instances fell of late: one that keeps falling has to prove itself longer."""

from __future__ import annotations

from collections import OrderedDict, deque

from penstock.common.model import InstanceId

# The first fall of a window costs nothing; each further one doubles the good probes asked for, up to this.
MAX_RISE = 64
MAX_FALLS = 8
# Instances remembered, those that fell last; removed ones stay, so that coming back is no fresh start.
MAX_REMEMBERED = 4096


class Flaps:
    """The falls of each instance within the last `window_s` seconds; 0 asks for no more than `rise` ever."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._falls: OrderedDict[InstanceId, deque[float]] = OrderedDict()

    def fell(self, instance_id: InstanceId, now: float) -> None:
        """A ready instance became unhealthy or was removed."""
        self._falls.setdefault(instance_id, deque(maxlen=MAX_FALLS)).append(now)
        self._falls.move_to_end(instance_id)
        if len(self._falls) > MAX_REMEMBERED:
            self._falls.popitem(last=False)

    def recent(self, instance_id: InstanceId, now: float) -> int:
        """How often it fell within the window."""
        falls = self._falls.get(instance_id, ())
        return sum(now - at < self._window_s for at in falls) if self._window_s else 0

    def rise(self, instance_id: InstanceId, least: int, now: float) -> int:
        """Good probes in a row that it needs, `least` for one that does not flap."""
        doublings = max(0, self.recent(instance_id, now) - 1)
        return min(least << doublings, max(least, MAX_RISE))
