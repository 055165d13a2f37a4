"""KV blocks of one engine: prefix cache by chained block hash, reference counts, LRU eviction."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import xxhash


def chain_hashes(tokens: bytes, token_bytes: int, block_size: int, root: str = "") -> tuple[int, ...]:
    """Hash of each full block, every one seeded by its parent's.

    `tokens` holds `token_bytes` bytes a token, `block_size` is in tokens; a partial last block has no hash.
    `root` (LoRA adapter, cache salt) separates caches.
    """
    width = token_bytes * block_size
    parent = xxhash.xxh3_64_intdigest(root.encode()) if root else 0
    hashes = []
    for start in range(0, len(tokens) - width + 1, width):
        parent = xxhash.xxh3_64_intdigest(tokens[start : start + width], seed=parent)
        hashes.append(parent)
    return tuple(hashes)


class BlockPool:
    """Counts blocks instead of naming them: a block is private to a request, shared under its hash, or free.

    Shared blocks nobody references stay as cache until their room is needed. Invariant:
    free + shared + private (held by the caller) = total.
    """

    __slots__ = ("_evicted", "_free", "_idle", "_references", "total")

    def __init__(self, total: int, evicted: Callable[[int], None] | None = None) -> None:
        """`evicted` is told the hash of each cached block whose room is taken."""
        self.total = total
        self._evicted = evicted
        self._free = total
        self._references: dict[int, int] = {}
        # Shared blocks without a reference, the one to evict first in front.
        self._idle: dict[int, None] = {}

    @property
    def used(self) -> int:
        """Blocks that requests hold; cached blocks that may be evicted do not count, as in vLLM's gauge."""
        return self.total - self._free - len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks kept under a hash, referenced or not."""
        return len(self._references)

    def match(self, hashes: Sequence[int], limit: int) -> int:
        """Number of leading hashes, at most `limit`, whose blocks are present."""
        count = 0
        for block_hash in islice(hashes, limit):
            if block_hash not in self._references:
                break
            count += 1
        return count

    def acquire(self, hashes: Iterable[int]) -> None:
        """Reference blocks that `match` found."""
        for block_hash in hashes:
            references = self._references[block_hash]
            if references == 0:
                del self._idle[block_hash]
            self._references[block_hash] = references + 1

    def allocate(self, count: int) -> bool:
        """Take `count` private blocks, evicting cached ones as needed; all or nothing."""
        if count > self._free + len(self._idle):
            return False
        while self._free < count:
            oldest = next(iter(self._idle))
            del self._idle[oldest]
            del self._references[oldest]
            self._free += 1
            if self._evicted is not None:
                self._evicted(oldest)
        self._free -= count
        return True

    def publish(self, block_hash: int) -> bool:
        """Turn one private block of the caller into a shared one that the caller references; True if it was
        none. If the hash is present already, the caller joins it and its private copy is given back.
        """
        if block_hash in self._references:
            self.acquire((block_hash,))
            self._free += 1
            return False
        self._references[block_hash] = 1
        return True

    def reset(self) -> bool:
        """Empty the cache; False, and nothing is done, while a request holds a block."""
        if self.used:
            return False
        self._free = self.total
        self._references.clear()
        self._idle.clear()
        return True

    def release(self, hashes: Sequence[int], private: int) -> None:
        """Give back shared blocks, in prompt order, and private ones; a chain is evicted from its end."""
        self._free += private
        for block_hash in reversed(hashes):
            references = self._references[block_hash] - 1
            self._references[block_hash] = references
            if references == 0:
                self._idle[block_hash] = None
