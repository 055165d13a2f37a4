"""Placement formulas of other gateways, for comparison: one gateway, one scheduler, no delays.

AIBrix's `prefix-cache` (vllm-project/aibrix at e3e10f9) and the `load-balance` of Llumnix's full mode
(llumnix-project/llumnix at 8a693b4), as their sources compute them, with the sizes of their deployments.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from random import Random
from typing import Protocol

from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest, TokenEvent


class Reference(Protocol):
    """A decision function of a simulated cluster, and its eyes."""

    def decide(self, request: EngineRequest, now: float, engines: Sequence[Engine]) -> int: ...

    def observe(self, event: TokenEvent, engine: int, now: float) -> None: ...


@dataclass
class AibrixPrefixCache:
    """AIBrix `prefix-cache`. Candidates are all instances, or, if the most and the fewest running requests
    differ by more than `imbalance`, those with the fewest. Of these, by longest prefix match in per cent,
    then fewest requests, the first with at most mean + `deviations` x sample standard deviation; else, of
    all, the one with the fewest requests.

    The values are those of AIBrix's chart (16, 2). The prefix table holds 200,000 blocks of 128 bytes in LRU
    order, each for 20 idle minutes; at four bytes a token that is 6.4 million tokens.
    """

    rng: Random
    instances: int
    block_size: int
    imbalance: int = 16
    deviations: float = 2.0
    table_tokens: int = 6_400_000
    idle_s: float = 1200.0
    running: list[int] = field(init=False)
    # Block to (instances that were given it, last use), least recently used first.
    table: OrderedDict[int, tuple[set[int], float]] = field(init=False, default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.running = [0] * self.instances

    def decide(self, request: EngineRequest, now: float, engines: Sequence[Engine]) -> int:
        running, everybody = self.running, range(self.instances)
        candidates = set(everybody)
        if max(running) - min(running) > self.imbalance:
            candidates = {i for i in everybody if running[i] == min(running)}
        percents = self._match(request.block_hashes, candidates, now)
        mean = sum(running) / len(running)
        spread = sum((count - mean) ** 2 for count in running) / max(1, len(running) - 1)
        most = mean + self.deviations * sqrt(spread)
        order = sorted(percents, key=lambda i: (-percents[i], running[i], self.rng.random()))
        chosen = next((i for i in order if running[i] <= most), None)
        if chosen is None:
            chosen = min(everybody, key=lambda i: (running[i], self.rng.random()))
        self._insert(request.block_hashes, chosen, now)
        running[chosen] += 1
        return chosen

    def observe(self, event: TokenEvent, engine: int, now: float) -> None:
        if event.finished:
            self.running[engine] -= 1

    def _match(self, hashes: Sequence[int], candidates: set[int], now: float) -> dict[int, int]:
        percents: dict[int, int] = {}
        for number, block in enumerate(hashes, 1):
            entry = self.table.get(block)
            if entry is None or now - entry[1] > self.idle_s:
                break
            candidates = candidates & entry[0]
            if not candidates:
                break
            self._use(block, entry[0], now)
            percents.update(dict.fromkeys(candidates, number * 100 // len(hashes)))
        return percents

    def _insert(self, hashes: Sequence[int], chosen: int, now: float) -> None:
        for block in hashes:
            holders, used_at = self.table.get(block, (set(), now))
            self._use(block, {chosen} if now - used_at > self.idle_s else holders | {chosen}, now)
        while len(self.table) * self.block_size > self.table_tokens:
            self.table.popitem(last=False)

    def _use(self, block: int, holders: set[int], now: float) -> None:
        self.table[block] = holders, now
        self.table.move_to_end(block)


@dataclass
class LlumnixLoadBalance:
    """Llumnix `load-balance` for neutral instances. Those with at least 8,192 prompt tokens to compute are
    left out while there are others. Of the rest the fewest of (prompt tokens that miss the cache + prompt
    tokens to compute) if `cache_aware`, for prompts from 1,024 tokens on, then the fewest to compute.

    Engine status and the KV metadata service are read without delay, which flatters it: in operation status
    is up to 50 ms old. `as_coded`, an instance without any hit counts as missing nothing, as in its code.
    """

    rng: Random
    cache_aware: bool = False
    as_coded: bool = False
    threshold_tokens: int = 8192
    min_tokens: int = 1024

    def decide(self, request: EngineRequest, now: float, engines: Sequence[Engine]) -> int:
        ahead = [engine.uncomputed_prompt_tokens for engine in engines]
        below = [i for i in range(len(engines)) if ahead[i] < self.threshold_tokens]
        looks = self.cache_aware and request.prompt_tokens >= self.min_tokens

        def rank(i: int) -> tuple[float, float, float]:
            missing = self._missing(request, engines[i]) if looks else 0
            return missing + ahead[i], ahead[i], self.rng.random()

        return min(below or range(len(engines)), key=rank)

    def observe(self, event: TokenEvent, engine: int, now: float) -> None:
        """Engine status says it all."""

    def _missing(self, request: EngineRequest, engine: Engine) -> int:
        hit = engine.prefix_match(request.block_hashes) * engine.spec.block_size
        return 0 if self.as_coded and not hit else request.prompt_tokens - hit


Make = Callable[[Random, int, int], Reference]

# By name, from a source of chance, the number of instances and the tokens of a block.
REFERENCES: dict[str, Make] = {
    "ref:aibrix-prefix-cache": AibrixPrefixCache,
    "ref:llumnix-load-balance": lambda rng, instances, block_size: LlumnixLoadBalance(rng),
    "ref:llumnix-cache-aware": lambda rng, instances, block_size: LlumnixLoadBalance(rng, cache_aware=True),
    "ref:llumnix-cache-aware-as-coded": lambda rng, instances, block_size: LlumnixLoadBalance(
        rng, cache_aware=True, as_coded=True
    ),
}
