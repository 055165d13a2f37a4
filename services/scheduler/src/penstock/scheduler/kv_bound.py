"""KvBound: how many prompt blocks are worth remembering, by what the engines can hold.

An engine forgets the prompt it used longest ago when its KV cache is full. An index that remembers far more
than all KV caches hold expects hits that are not there, and sends prompts to busy instances for them.
"""

from __future__ import annotations

from penstock.common.messages import MAX_BLOCKS

# Sums of tokens and blocks are halved here, so that the mean follows the traffic.
FADE_BLOCKS = 100_000


class KvBound:
    """Turns KV sizes in tokens into blocks by the mean block of the prompts placed."""

    def __init__(self, max_blocks: int, factor: float) -> None:
        """At most `factor` times what all KV caches hold, whatever they hold at most `max_blocks`; a factor
        of 0 knows the second bound only."""
        self._max_blocks, self._factor = max_blocks, factor
        self._tokens = self._blocks = 0.0

    def placed(self, tokens: int, blocks: int) -> None:
        """A prompt that was placed here."""
        self._tokens += tokens
        self._blocks += blocks
        if self._blocks > FADE_BLOCKS:
            self._tokens /= 2
            self._blocks /= 2

    def blocks(self, kv_tokens: float) -> int:
        """The bound, with so many tokens in all KV caches together (0: unknown). It leaves room for two
        prompts of the longest kind."""
        if not (self._factor and kv_tokens and self._tokens):
            return self._max_blocks
        wanted = self._factor * kv_tokens * self._blocks / self._tokens
        return int(min(self._max_blocks, max(wanted, 2 * MAX_BLOCKS)))
