"""KvBlocks: which blocks one instance's KV cache holds, by the engine's own hashes and by the gateway's.

The gateway's hash of a block chains its tokens with its parent's hash (`penstock.common.block_hash`). A block
counts while all blocks before it are held: when a parent goes before its children, they are forgotten with
it, since no prompt finds them any more. So every block is added once and taken away once, whatever a
publisher sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import msgspec

from penstock.common.block_hash import pack_tokens, token_chain
from penstock.discovery.kv_events import BlockKey, BlockRemoved, BlockStored

# Names that a model is served under: a prompt's hashes differ by the name that its client uses.
MAX_NAMES = 4


class _Block(msgspec.Struct):
    """`hashes` under each name of the model."""

    hashes: tuple[int, ...]
    parent: BlockKey | None
    children: set[BlockKey] | None = None


class KvBlocks:
    """Follows one engine from an empty KV cache on. `seed` gives the seed of a chain (model, salt)."""

    def __init__(
        self, models: tuple[str, ...], block_size: int, most: int, seed: Callable[[str, str], int]
    ) -> None:
        """At `most` blocks further ones are not followed, until others go."""
        self._models, self._block_size, self._most, self._seed = models[:MAX_NAMES], block_size, most, seed
        self._held: dict[BlockKey, _Block] = {}
        # Blocks that were not followed: by why.
        self.passed_over: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        """Nothing is held."""
        self._held.clear()

    def snapshot(self) -> Iterator[list[int]]:
        """The hashes of all blocks, parents before their children, under one name after the other."""
        for place in range(max((len(block.hashes) for block in self._held.values()), default=0)):
            yield [b.hashes[place] for b in self._held.values() if place < len(b.hashes)]

    def store(self, event: BlockStored) -> list[list[int]]:
        """The gateway's hashes of what was added, parents first, for each name of the model."""
        parents = self._parents(event)
        if parents is None:
            return []
        chains = [
            token_chain(pack_tokens(event.tokens), parent, self._block_size, len(event.keys))
            for parent in parents
        ]
        added: list[list[int]] = [[] for _ in chains]
        parent_key = event.parent
        for position, key in enumerate(event.keys):
            hashes = tuple(chain[position] for chain in chains)
            held = self._held.get(key)
            if held is None:
                if len(self._held) >= self._most:
                    self._pass_over("too_many", len(event.keys) - position)
                    break
                self._add(key, hashes, parent_key)
                for some, one in zip(added, hashes, strict=True):
                    some.append(one)
            elif held.parent != parent_key:
                # Two prompts under one hash: whatever follows is not known for certain.
                self._pass_over("ambiguous", len(event.keys) - position)
                break
            parent_key = key
        return [some for some in added if some]

    def remove(self, event: BlockRemoved) -> list[int]:
        """The gateway's hashes of what went, children before their parents."""
        gone: list[int] = []
        for key in event.keys:
            block = self._held.get(key)
            if block is None:
                continue
            parent = self._held.get(block.parent) if block.parent is not None else None
            if parent is not None and parent.children is not None:
                parent.children.discard(key)
            branch, waiting = [], [key]
            while waiting:
                one = self._held.pop(waiting.pop())
                branch.append(one)
                waiting.extend(one.children or ())
            for one in reversed(branch):
                gone.extend(one.hashes)
        return gone

    def _parents(self, event: BlockStored) -> tuple[int, ...] | None:
        """The hashes that the run goes on from, None if it cannot be followed."""
        if event.block_size != self._block_size:
            self._pass_over("block_size", len(event.keys))
            return None
        if not event.whole:
            self._pass_over("not_tokens", len(event.keys))
            return None
        if event.parent is None:
            names = (event.adapter,) if event.adapter else self._models
            return tuple(self._seed(name, event.salt) for name in names)
        parent = self._held.get(event.parent)
        if parent is None:
            self._pass_over("unknown_parent", len(event.keys))
            return None
        return parent.hashes

    def _add(self, key: BlockKey, hashes: tuple[int, ...], parent_key: BlockKey | None) -> None:
        self._held[key] = _Block(hashes, parent_key)
        if parent_key is None:
            return
        parent = self._held[parent_key]
        if parent.children is None:
            parent.children = set()
        parent.children.add(key)

    def _pass_over(self, why: str, blocks: int) -> None:
        self.passed_over[why] = self.passed_over.get(why, 0) + blocks
