"""Speeds: how fast each instance serves this ingress, in sums for the load report.

Prompts are computed one after the other, so of a time to first token only the part counts as prefill in which
no earlier prompt was ahead: from the last first token of the instance on, if that came after dispatch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from penstock.common.messages import MAX_REPORT_SPEEDS, InstanceSpeed
from penstock.common.model import InstanceId

# Of shorter prompts the time to first token says more about one engine step than about prefill.
MIN_PREFILL_TOKENS: Final = 256
# Past it all sums begin anew; schedulers take sums that fell for a new start.
MAX_INSTANCES: Final = 8192


class _Sums:
    __slots__ = (
        *("requests", "prompt_tokens", "output_tokens", "streams", "ttft_s", "prefill_s"),
        *("uncached_tokens", "decode_s", "decode_tokens", "first_token_at"),
        *("judged", "expected_tokens", "confirmed_tokens", "reports_cache"),
    )

    def __init__(self) -> None:
        self.requests = self.prompt_tokens = self.output_tokens = self.streams = 0
        self.uncached_tokens = self.decode_tokens = 0
        self.ttft_s = self.prefill_s = self.decode_s = 0.0
        self.first_token_at = float("-inf")
        self.judged = self.expected_tokens = self.confirmed_tokens = 0
        self.reports_cache = False


class Speeds:
    """Times are of one monotonic clock, in seconds."""

    def __init__(self) -> None:
        self._sums: dict[InstanceId, _Sums] = {}
        self._changed: set[InstanceId] = set()

    def first_token(
        self, instance: InstanceId, sent_at: float, first_token_at: float, uncached_tokens: int
    ) -> None:
        """The first piece of a streamed answer came; `uncached_tokens` of its prompt were to be computed."""
        sums = self._of(instance)
        sums.streams += 1
        sums.ttft_s += max(0.0, first_token_at - sent_at)
        if uncached_tokens >= MIN_PREFILL_TOKENS:
            sums.prefill_s += max(0.0, first_token_at - max(sent_at, sums.first_token_at))
            sums.uncached_tokens += uncached_tokens
        sums.first_token_at = first_token_at

    def answered(
        self,
        instance: InstanceId,
        prompt_tokens: int,
        output_tokens: int,
        first_token_at: float,
        done_at: float,
    ) -> None:
        """An answer is complete. `first_token_at` is when the request was sent if the answer came as a whole:
        its prefill then counts as decode, for all instances alike."""
        sums = self._of(instance)
        sums.requests += 1
        sums.prompt_tokens += prompt_tokens
        sums.output_tokens += output_tokens
        if output_tokens > 1:
            sums.decode_s += max(0.0, done_at - first_token_at)
            sums.decode_tokens += output_tokens - 1

    def judged(
        self, instance: InstanceId, expected_tokens: int, cached_tokens: int, *, reported: bool
    ) -> None:
        """An answer whose placement expected tokens in the KV cache says how many there were. `reported`: it
        names a number; without one it counts as none, of an engine that has named some before (vLLM leaves
        zeros out, and says nothing at all unless told to)."""
        sums = self._of(instance)
        sums.reports_cache = sums.reports_cache or reported
        if sums.reports_cache:
            sums.judged += 1
            sums.expected_tokens += expected_tokens
            sums.confirmed_tokens += min(expected_tokens, cached_tokens)

    def report(self) -> Iterator[tuple[InstanceSpeed, ...]]:
        """Sums of the instances that changed since the last call, as many at a time as a report may hold."""
        changed, self._changed = sorted(self._changed), set()
        for start in range(0, len(changed), MAX_REPORT_SPEEDS):
            yield tuple(self._speed(instance) for instance in changed[start : start + MAX_REPORT_SPEEDS])

    def _of(self, instance: InstanceId) -> _Sums:
        sums = self._sums.get(instance)
        if sums is None:
            if len(self._sums) >= MAX_INSTANCES:
                self._sums.clear()
                self._changed.clear()
            sums = self._sums[instance] = _Sums()
        self._changed.add(instance)
        return sums

    def _speed(self, instance: InstanceId) -> InstanceSpeed:
        sums = self._sums[instance]
        return InstanceSpeed(
            instance,
            sums.requests,
            sums.prompt_tokens,
            sums.output_tokens,
            sums.streams,
            round(sums.ttft_s * 1000),
            round(sums.prefill_s * 1000),
            sums.uncached_tokens,
            round(sums.decode_s * 1000),
            sums.decode_tokens,
            sums.judged,
            sums.expected_tokens,
            sums.confirmed_tokens,
        )
