"""How many clients an ingress has, over all of its workers, and whether it takes one more; and how many
requests wait there.

The limit is not dealt out in shares: the kernel spreads connections by a hash, so that one worker would
turn clients away while others have room. Every worker writes its number into memory that all of them see.
"""

from __future__ import annotations

import logging
import mmap
import tempfile
from collections.abc import Callable
from typing import IO, Self

from penstock.common.telemetry import Metrics
from penstock.ingress.adapters.shared_pools import REGION_BYTES

log = logging.getLogger(__name__)

_SLOT_BYTES = 8
# What is counted over all workers, a row of slots each.
CONNECTIONS, WAITING = range(2)
ROWS = 2
WARN_EVERY_S = 10.0


class SharedCounts:
    """One number per worker. The sum is exact but for what others write at that moment: a limit may be
    passed by one per further worker."""

    def __init__(self, fd: int, slots: int, index: int = 0, row: int = CONNECTIONS) -> None:
        """`fd`: a file from `counts_file`, -1 for memory of this process alone; `row`: what is counted."""
        numbers = memoryview(mmap.mmap(fd, counts_bytes(slots))).cast("q")
        self._numbers, self._index = numbers[row * slots : (row + 1) * slots], index

    @classmethod
    def alone(cls) -> Self:
        """For a process that shares nothing."""
        return cls(-1, 1)

    def own(self, count: int) -> None:
        """Set this process's number."""
        self._numbers[self._index] = count

    def clear(self, index: int) -> None:
        """A worker ended."""
        self._numbers[index] = 0

    def total(self) -> int:
        """The sum over all processes."""
        return sum(self._numbers)


def counts_bytes(slots: int) -> int:
    """What the numbers take of the file; what is open at each address lies behind (`SharedPools`)."""
    return ROWS * slots * _SLOT_BYTES


def counts_file(slots: int) -> IO[bytes]:
    """A file without a name for `slots` processes; the memory lives as long as one of them has it."""
    file = tempfile.TemporaryFile()  # noqa: SIM115  # the parent holds it for as long as it lives
    file.truncate(counts_bytes(slots) + slots * REGION_BYTES)
    return file


class ConnectionLimit:
    """Counts one worker's connections, and turns away what is beyond the limit of all."""

    def __init__(self, counts: SharedCounts, most: int, metrics: Metrics, clock: Callable[[], float]) -> None:
        self._counts, self._most, self._clock = counts, most, clock
        self._next_warning = 0.0
        self._turned_away = metrics.counter(
            "penstock_ingress_connections_refused_total", "Client connections beyond --connection-limit"
        ).labels()

    def allows_one_more(self) -> bool:
        """Whether another connection may be taken; one that may not is counted."""
        if self._counts.total() < self._most:
            return True
        self._turned_away.value += 1
        if (now := self._clock()) >= self._next_warning:
            self._next_warning = now + WARN_EVERY_S
            text = "%d client connections, as --connection-limit says: further ones are closed"
            log.warning(text, self._most)
        return False

    def holds(self, count: int) -> None:
        """This worker has `count` connections."""
        self._counts.own(count)
