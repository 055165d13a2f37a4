"""The model of a serving engine: continuous batching, chunked prefill, prefix cache, preemption.

Sync, without I/O and without a clock: every call takes the time (seconds, any origin, never going back).
A driver calls `start_step`, lets the returned duration pass on its clock, calls `end_step`, and so on until
`start_step` returns None.
"""

from collections import OrderedDict
from math import inf

from penstock.sim.blocks import BlockPool
from penstock.sim.spec import DoesNotFit, EngineRequest, EngineSpec, QueueFull, TokenEvent
from penstock.sim.stats import EngineStats


class _Sequence:
    """Progress of one request. `shared` of its `blocks` are published, and these are its leading ones."""

    __slots__ = (
        *("arrived_s", "blocks", "cached_tokens", "computed", "first_token_s", "generated", "known"),
        *("last_token_s", "request", "scheduled_s", "shared"),
    )

    def __init__(self, request: EngineRequest, now: float) -> None:
        self.request = request
        # Tokens whose keys and values must be computed before the next one comes out, and those that are.
        self.known = request.prompt_tokens
        self.computed = 0
        self.generated = 0
        self.blocks = 0
        self.shared = 0
        self.cached_tokens = 0
        self.arrived_s = now
        # Below every arrival until the request is first scheduled.
        self.scheduled_s = -inf
        self.first_token_s = now
        self.last_token_s = now


class Engine:
    """Requests are admitted first in, first out; when blocks run out, the one admitted last is preempted."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.stats = EngineStats()
        self._pool = BlockPool(spec.kv_blocks)
        self._waiting: OrderedDict[str, _Sequence] = OrderedDict()
        self._running: dict[str, _Sequence] = {}
        self._stalled: dict[str, _Sequence] = {}
        self._step: list[tuple[_Sequence, int]] | None = None

    @property
    def running(self) -> int:
        return len(self._running) + len(self._stalled)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def kv_blocks_used(self) -> int:
        return self._pool.used

    @property
    def kv_usage_ratio(self) -> float:
        return self._pool.used / self._pool.total

    @property
    def in_step(self) -> bool:
        """Whether a step was started and has not ended."""
        return self._step is not None

    def prefix_match(self, block_hashes: tuple[int, ...]) -> int:
        """Number of leading blocks that the cache holds."""
        return self._pool.match(block_hashes, len(block_hashes))

    def submit(self, request: EngineRequest, now: float) -> None:
        """Queue a request. Raises DoesNotFit, QueueFull; ValueError for an id in use or an empty prompt."""
        if request.prompt_tokens < 1 or request.output_tokens < 0:
            raise ValueError("a request has at least one prompt token and no negative output")
        if any(request.request_id in home for home in (self._waiting, self._running, self._stalled)):
            raise ValueError(f"request id {request.request_id!r} is in use")
        # The last output token is never fed back, so its keys and values are not kept.
        needed = self._blocks_for(request.prompt_tokens + max(request.output_tokens - 1, 0))
        if needed > self._pool.total:
            raise DoesNotFit(needed, self._pool.total)
        if len(self._waiting) >= self.spec.max_waiting:
            raise QueueFull(len(self._waiting))
        home = self._waiting if request.stall_after != 0 else self._stalled
        home[request.request_id] = _Sequence(request, now)

    def abort(self, request_id: str) -> bool:
        """Forget a request at once, in a step or out of it, and free its blocks. False if it is not here."""
        for home in (self._waiting, self._running, self._stalled):
            sequence = home.pop(request_id, None)
            if sequence is not None:
                self._release(sequence)
                self.stats.finished["abort"] += 1
                return True
        return False

    def start_step(self, now: float) -> float | None:
        """Compose the next step and return its duration in seconds; None if there is nothing to compute."""
        if self._step is not None:
            raise RuntimeError("the previous step has not ended")
        step: list[tuple[_Sequence, int]] = []
        preemptions = self.stats.preemptions
        budget, decodes = self._continue_running(step)
        if self.stats.preemptions == preemptions:
            self._admit(step, budget, now)
        if not step:
            return None
        self._step = step
        prefill_tokens = sum([tokens for _, tokens in step]) - decodes
        return self.spec.step_duration_s(prefill_tokens, decodes)

    def end_step(self, now: float) -> list[TokenEvent]:
        """Apply the step that was started; events are in batch order."""
        if self._step is None:
            raise RuntimeError("no step was started")
        step, self._step = self._step, None
        events = []
        for sequence, tokens in step:
            # Aborted since the step was composed; submitted again, it waits.
            if sequence.request.request_id not in self._running:
                continue
            sequence.computed += tokens
            if sequence.computed == sequence.known:
                events.append(self._produce(sequence, now))
        return events

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.spec.block_size)

    def _continue_running(self, step: list[tuple[_Sequence, int]]) -> tuple[int, int]:
        """What is left of the budget, and how many of the requests decode."""
        budget, decodes = self.spec.step_token_budget, 0
        block_size = self.spec.block_size
        for sequence in tuple(self._running.values()):
            if budget == 0:
                break
            # A preemption further up may have sent this one back to the queue.
            if sequence.request.request_id not in self._running:
                continue
            tokens = min(sequence.known - sequence.computed, budget)
            lacks_room = sequence.computed + tokens > sequence.blocks * block_size
            if lacks_room and not self._make_room(sequence, tokens):
                continue
            if sequence.computed % block_size + tokens >= block_size:
                self._publish(sequence, tokens)
            step.append((sequence, tokens))
            budget -= tokens
            if tokens == 1 and sequence.generated:
                decodes += 1
        return budget, decodes

    def _make_room(self, sequence: _Sequence, tokens: int) -> bool:
        """Allocate the blocks for `tokens` more; False if the sequence itself was preempted for it."""
        needed = self._blocks_for(sequence.computed + tokens) - sequence.blocks
        while not self._pool.allocate(needed):
            if self._preempt_last() is sequence:
                return False
        sequence.blocks += needed
        return True

    def _preempt_last(self) -> _Sequence:
        """Send the request admitted last back to the head of the queue; what it computed is lost."""
        request_id, victim = self._running.popitem()
        self._release(victim)
        self._waiting[request_id] = victim
        self._waiting.move_to_end(request_id, last=False)
        self.stats.preemptions += 1
        return victim

    def _admit(self, step: list[tuple[_Sequence, int]], budget: int, now: float) -> None:
        while budget > 0 and self._waiting and self.running < self.spec.max_batch:
            request_id, sequence = next(iter(self._waiting.items()))
            tokens = self._place(sequence, budget)
            if tokens is None:
                return
            del self._waiting[request_id]
            self._running[request_id] = sequence
            if sequence.scheduled_s == -inf:
                self._note_scheduled(sequence, now)
            step.append((sequence, tokens))
            budget -= tokens

    def _place(self, sequence: _Sequence, budget: int) -> int | None:
        """Take the cached prefix and room for the first tokens to compute: their number, or None."""
        hashes = sequence.request.block_hashes
        # At least one token is computed: the next token comes out of its computation.
        hits = self._pool.match(hashes, (sequence.known - 1) // self.spec.block_size)
        cached_tokens = hits * self.spec.block_size
        tokens = min(sequence.known - cached_tokens, budget)
        blocks = self._blocks_for(cached_tokens + tokens)
        self._pool.acquire(hashes[:hits])
        if not self._pool.allocate(blocks - hits):
            self._pool.release(hashes[:hits], 0)
            return None
        sequence.computed = cached_tokens
        sequence.blocks = blocks
        sequence.shared = hits
        self._publish(sequence, tokens)
        return tokens

    def _publish(self, sequence: _Sequence, tokens: int) -> None:
        """Share the blocks this step fills: requests after it in the same step may use them, as in vLLM."""
        full = (sequence.computed + tokens) // self.spec.block_size
        hashes = sequence.request.block_hashes
        for block_hash in hashes[sequence.shared : full]:
            self._pool.publish(block_hash)
            sequence.shared += 1

    def _note_scheduled(self, sequence: _Sequence, now: float) -> None:
        sequence.scheduled_s = now
        sequence.cached_tokens = sequence.computed
        self.stats.queue.observe(now - sequence.arrived_s)
        self.stats.prefix_queries += sequence.request.prompt_tokens
        self.stats.prefix_hits += sequence.computed

    def _produce(self, sequence: _Sequence, now: float) -> TokenEvent:
        request, stats = sequence.request, self.stats
        if request.output_tokens:
            sequence.generated += 1
            sequence.known += 1
            stats.generation_tokens += 1
        if sequence.generated > 1:
            stats.itl.observe(now - sequence.last_token_s)
        else:
            self._note_first_token(sequence, now)
        sequence.last_token_s = now
        finished = sequence.generated == request.output_tokens
        if finished:
            del self._running[request.request_id]
            self._release(sequence)
            self._note_finished(sequence, now)
        elif sequence.generated == request.stall_after:
            self._stalled[request.request_id] = self._running.pop(request.request_id)
        return TokenEvent(request.request_id, sequence.generated, finished, sequence.cached_tokens)

    def _note_first_token(self, sequence: _Sequence, now: float) -> None:
        sequence.first_token_s = now
        self.stats.prompt_tokens += sequence.request.prompt_tokens
        self.stats.ttft.observe(now - sequence.arrived_s)
        self.stats.prefill.observe(now - sequence.scheduled_s)

    def _note_finished(self, sequence: _Sequence, now: float) -> None:
        self.stats.finished[sequence.request.finish_reason] += 1
        self.stats.e2e.observe(now - sequence.arrived_s)
        self.stats.decode.observe(now - sequence.first_token_s)
        self.stats.inference.observe(now - sequence.scheduled_s)

    def _release(self, sequence: _Sequence) -> None:
        self._pool.release(
            sequence.request.block_hashes[: sequence.shared], sequence.blocks - sequence.shared
        )
        sequence.computed = sequence.blocks = sequence.shared = 0
