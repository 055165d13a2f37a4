"""What every worker of an ingress has open at each address, in memory that all of them see.

Each worker writes to a region of its own, a hash table by address; the others read it. Nobody locks: at the
same moment each worker may take one more than a bound allows, as Envoy's threads may.
"""

from __future__ import annotations

import mmap
from collections.abc import Hashable

import xxhash

# What is counted at an address.
CONNECTIONS, REQUESTS, PENDING, RETRIES = range(1, 5)
_FIELDS = 5
SLOTS = 4096
# Slots that are looked at for one address.
_PROBES = 32
REGION_BYTES = SLOTS * _FIELDS * 8
# Under which all addresses together are counted.
ALL = "*"


class SharedPools:
    """The regions of all workers; this one writes to that of `index`."""

    def __init__(self, fd: int, offset: int, workers: int, index: int) -> None:
        """`fd`: a file that is `offset` + `workers` * REGION_BYTES long."""
        self._numbers = memoryview(mmap.mmap(fd, offset + workers * REGION_BYTES))[offset:].cast("q")
        self.workers, self._index = workers, index
        self._live: set[int] = set()

    def claim(self, address: Hashable) -> Slot | None:
        """Where an address is counted, until it is given back; None if there is no room near its place: then
        it is counted by each worker for itself."""
        key, first = _key_of(address)
        empty = -1
        for step in range(_PROBES):
            at = _place(self._index, first + step)
            held = self._numbers[at]
            if held in (key, 0):
                empty = at if held == key or empty < 0 else empty
                break
            if empty < 0 and at not in self._live:
                # Nobody is counted there any more. It stays taken, so that what lies behind is found.
                empty = at
        if empty < 0:
            return None
        self._live.add(empty)
        self._numbers[empty : empty + _FIELDS] = memoryview(bytes(_FIELDS * 8)).cast("q")
        self._numbers[empty] = key
        others = [worker for worker in range(self.workers) if worker != self._index]
        return Slot(self, self._numbers, empty, key, [(worker, first) for worker in others])

    def give_back(self, slot: Slot) -> None:
        """Nothing is open there any more."""
        self._live.discard(slot.at)

    def clear(self, worker: int) -> None:
        """A worker ended."""
        first = worker * SLOTS * _FIELDS
        self._numbers[first : first + SLOTS * _FIELDS] = memoryview(bytes(REGION_BYTES)).cast("q")

    def find(self, worker: int, first: int, key: int) -> int:
        """Where another worker counts an address; -1 if it does not."""
        for step in range(_PROBES):
            at = _place(worker, first + step)
            held = self._numbers[at]
            if held == key:
                return at
            if held == 0:
                break
        return -1


class Slot:
    """One address in the regions."""

    def __init__(
        self, pools: SharedPools, numbers: memoryview[int], at: int, key: int, others: list[tuple[int, int]]
    ) -> None:
        self._pools, self._numbers, self.at, self._key = pools, numbers, at, key
        # Where the others were seen last, to look there first.
        self._others = [(worker, first, -1) for worker, first in others]

    def publish(self, connections: int, pending: int, retries: int) -> None:
        """This worker's numbers."""
        numbers, at = self._numbers, self.at
        numbers[at + CONNECTIONS], numbers[at + PENDING] = connections, pending
        numbers[at + RETRIES] = retries

    def claim(self, requests: int) -> None:
        """As many requests this worker takes for its own."""
        self._numbers[self.at + REQUESTS] = requests

    def others(self, field: int) -> int:
        """The sum over all other workers."""
        numbers, total = self._numbers, 0
        for index, (worker, first, seen) in enumerate(self._others):
            at = seen
            if at < 0 or numbers[at] != self._key:
                at = self._pools.find(worker, first, self._key)
                self._others[index] = worker, first, at
            if at >= 0:
                total += numbers[at + field]
        return total


class Claim:
    """The part of a bound of requests that this worker has taken for its own: a little more than it has under
    way, so that most requests need not look at the numbers of the others, nor change its own."""

    def __init__(self, slot: Slot, most: int, workers: int) -> None:
        self._slot, self._most = slot, most
        # What may lie idle at all workers together: a sixteenth of the bound, and nothing of a small one.
        self._step = max(1, most // (16 * workers))
        self._held = 0

    def reaches(self, requests: int) -> bool:
        """Whether there may be so many; more is taken if need be."""
        if requests <= self._held:
            return True
        free = self._most - self._slot.others(REQUESTS)
        if requests > free:
            return False
        self._hold(min(free, requests + self._step - 1))
        return True

    def fit(self, requests: int) -> None:
        """There are so many: let go of what is far beyond."""
        if self._held - requests >= 2 * self._step - 1:
            self._hold(requests + self._step - 1)

    def _hold(self, requests: int) -> None:
        self._held = requests
        self._slot.claim(requests)


def _place(worker: int, slot: int) -> int:
    return (worker * SLOTS + slot % SLOTS) * _FIELDS


def _key_of(address: Hashable) -> tuple[int, int]:
    digest = xxhash.xxh3_64_intdigest(repr(address).encode())
    # Never 0, which is an empty slot; signed, as the memory is.
    return (digest >> 1) or 1, digest % SLOTS
