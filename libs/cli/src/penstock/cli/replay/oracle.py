"""An index that knows what every engine's cache holds at this moment, as no gateway can."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.scheduler.chain import Hashes
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.sim.engine import Engine


class TrueCaches(PrefixIndex):
    """Answers from the caches themselves; slots are the engines' numbers. What is placed but not computed yet
    is in no cache, so of two equal new prompts at once the second is not drawn to the first."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        super().__init__(2)
        self._engines = engines

    def match(self, hashes: Hashes, candidates: int) -> list[tuple[int, int]]:
        prompt = tuple(hashes)
        slots_by_length: dict[int, int] = {}
        for slot, engine in enumerate(self._engines):
            length = engine.prefix_match(prompt) if candidates >> slot & 1 else 0
            if length:
                slots_by_length[length] = slots_by_length.get(length, 0) | 1 << slot
        steps: list[tuple[int, int]] = []
        held = 0
        for length in sorted(slots_by_length, reverse=True):
            held |= slots_by_length[length]
            steps.append((length, held))
        return steps[::-1]

    def insert(self, hashes: Hashes, slot: int, matched: int = 0) -> int:
        return matched

    def forget(self, slots: int) -> None:
        pass
