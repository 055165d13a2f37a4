"""The model of a serving engine: continuous batching, chunked prefill, prefix cache, preemption.

Sync, without I/O and without a clock: every call takes the time (seconds, any origin, never going back).
A driver calls `start_step`, lets the returned duration pass on its clock, calls `end_step`, and so on until
`start_step` returns None. On a virtual clock a driver may take the steps that `steps_alike` counts at once.
"""

from collections import OrderedDict
from math import inf

from penstock.sim.blocks import BlockPool
from penstock.sim.kv_log import KvLog
from penstock.sim.sequence import TokenSequence
from penstock.sim.spec import DoesNotFit, EngineRequest, EngineSpec, QueueFull, TokenEvent
from penstock.sim.stats import EngineStats


class Engine:
    """Requests are admitted first in, first out; when blocks run out, the one admitted last is preempted."""

    def __init__(self, spec: EngineSpec, kv_log: KvLog | None = None) -> None:
        """`kv_log` is told what becomes of the blocks of the prefix cache."""
        self.spec = spec
        self.stats = EngineStats()
        self._kv_log = kv_log
        self._pool = BlockPool(spec.kv_blocks, kv_log.removed if kv_log is not None else None)
        self._waiting: OrderedDict[str, TokenSequence] = OrderedDict()
        self._running: dict[str, TokenSequence] = {}
        self._stalled: dict[str, TokenSequence] = {}
        self._kept: dict[str, TokenSequence] = {}
        self._step: list[tuple[TokenSequence, int]] | None = None
        self._step_s = 0.0
        self._all_decode = False

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
    def kv_blocks_kept(self) -> int:
        """Blocks of finished requests that somebody is to fetch."""
        return sum(sequence.blocks for sequence in self._kept.values())

    @property
    def uncomputed_prompt_tokens(self) -> int:
        """Prompt tokens to compute until every request has its first token, less the cached ones."""
        running = sum(one.known - one.computed for one in self._running.values() if not one.generated)
        return running + sum(one.known - self._present(one) for one in self._waiting.values())

    @property
    def in_step(self) -> bool:
        """Whether a step was started and has not ended."""
        return self._step is not None

    def prefix_match(self, block_hashes: tuple[int, ...]) -> int:
        """Number of leading blocks that the cache holds."""
        return self._pool.match(block_hashes, len(block_hashes))

    def reset_prefix_cache(self) -> bool:
        """Empty the prefix cache; False, and nothing is done, while a request holds a block."""
        if not self._pool.reset():
            return False
        if self._kv_log is not None:
            self._kv_log.cleared()
        return True

    def submit(self, request: EngineRequest, now: float) -> None:
        """Queue a request. Raises DoesNotFit, QueueFull; ValueError for an id in use or an empty prompt."""
        if request.prompt_tokens < 1 or request.output_tokens < 0:
            raise ValueError("a request has at least one prompt token and no negative output")
        homes = self._waiting, self._running, self._stalled, self._kept
        if any(request.request_id in home for home in homes):
            raise ValueError(f"request id {request.request_id!r} is in use")
        # The last output token is never fed back, so its keys and values are not kept.
        needed = self._blocks_for(request.prompt_tokens + max(request.output_tokens - 1, 0))
        if needed > self._pool.total:
            raise DoesNotFit(needed, self._pool.total)
        if len(self._waiting) >= self.spec.max_waiting:
            raise QueueFull(len(self._waiting))
        home = self._waiting if request.stall_after != 0 else self._stalled
        home[request.request_id] = TokenSequence(request, now)

    def abort(self, request_id: str) -> bool:
        """Forget a request at once, in a step or out of it, and free its blocks. False if it is not here."""
        for home in (self._waiting, self._running, self._stalled):
            sequence = home.pop(request_id, None)
            if sequence is not None:
                self._release(sequence)
                self.stats.finished["abort"] += 1
                return True
        return False

    def let_go(self, request_id: str) -> bool:
        """Free the blocks that a finished request left behind. False if it left none."""
        sequence = self._kept.pop(request_id, None)
        if sequence is not None:
            self._release(sequence)
        return sequence is not None

    def start_step(self, now: float) -> float | None:
        """Compose the next step and return its duration in seconds; None if there is nothing to compute."""
        if self._step is not None:
            raise RuntimeError("the previous step has not ended")
        step: list[tuple[TokenSequence, int]] = []
        preemptions = self.stats.preemptions
        budget, decodes = self._continue_running(step)
        preempted = self.stats.preemptions > preemptions
        if not preempted:
            self._admit(step, budget, now)
        if not step:
            return None
        # After a preemption nobody is admitted in this step, so somebody may be in the next one.
        self._all_decode = decodes == len(step) and not preempted
        self._step = step
        prefill_tokens = sum([tokens for _, tokens in step]) - decodes
        self._step_s = self.spec.step_duration_s(prefill_tokens, decodes)
        return self._step_s

    def steps_alike(self) -> int:
        """How many steps, the open one first, do the same if nothing is submitted or aborted: each gives
        every running request one more token, no block changes hands after the first, and only the last
        finishes any.

        What keeps a waiting request out of the first keeps it out of all: blocks get no fewer users.
        """
        if self._step is None:
            raise RuntimeError("no step was started")
        return min(map(self._tokens_alike, self._step)) if self._all_decode else 1

    def _tokens_alike(self, entry: tuple[TokenSequence, int]) -> int:
        sequence, _ = entry
        request, generated = sequence.request, sequence.generated
        if sequence.known - sequence.computed != 1:
            # The budget's end cut a prompt that is computed again.
            return 1
        room = sequence.blocks * self.spec.block_size - sequence.computed
        if len(request.block_hashes) > sequence.shared:
            # The token that fills a block publishes it.
            room -= 1
        end = request.output_tokens
        if request.stall_after is not None and generated < request.stall_after:
            end = min(end, request.stall_after)
        return max(1, min(room, end - generated))

    def end_step(self, now: float, steps: int = 1) -> list[TokenEvent]:
        """Apply the step that was started, and those after it if it is `steps` that `steps_alike` allows, the
        last of which ends at `now`; events are those of the last, in batch order."""
        if self._step is None:
            raise RuntimeError("no step was started")
        step, self._step = self._step, None
        events = []
        for sequence, tokens in step:
            # Aborted since the step was composed; submitted again, it waits.
            if sequence.request.request_id not in self._running:
                continue
            if steps > 1:
                self._skip(sequence, steps - 1, now)
            sequence.computed += tokens
            if sequence.computed == sequence.known:
                events.append(self._produce(sequence, now))
        return events

    def _hits(self, sequence: TokenSequence) -> int:
        """Leading blocks in the cache. At least one token is computed: the next one comes out of it."""
        limit = (sequence.known - 1) // self.spec.block_size
        return self._pool.match(sequence.request.block_hashes, limit)

    def _present(self, sequence: TokenSequence) -> int:
        """Tokens that need no computation when the request is admitted now."""
        return max(self._hits(sequence) * self.spec.block_size, sequence.imported)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.spec.block_size)

    def _continue_running(self, step: list[tuple[TokenSequence, int]]) -> tuple[int, int]:
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

    def _make_room(self, sequence: TokenSequence, tokens: int) -> bool:
        """Allocate the blocks for `tokens` more; False if the sequence itself was preempted for it."""
        needed = self._blocks_for(sequence.computed + tokens) - sequence.blocks
        while not self._pool.allocate(needed):
            if self._preempt_last() is sequence:
                return False
        sequence.blocks += needed
        return True

    def _preempt_last(self) -> TokenSequence:
        """Send the request admitted last back to the head of the queue; what it computed is lost."""
        request_id, victim = self._running.popitem()
        self._release(victim)
        victim.imported = 0
        self._waiting[request_id] = victim
        self._waiting.move_to_end(request_id, last=False)
        self.stats.preemptions += 1
        return victim

    def _admit(self, step: list[tuple[TokenSequence, int]], budget: int, now: float) -> None:
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

    def _place(self, sequence: TokenSequence, budget: int) -> int | None:
        """Take the cached prefix and room for the first tokens to compute: their number, or None."""
        hashes, hits = sequence.request.block_hashes, self._hits(sequence)
        present = max(hits * self.spec.block_size, sequence.imported)
        tokens = min(sequence.known - present, budget)
        blocks = self._blocks_for(present + tokens)
        self._pool.acquire(hashes[:hits])
        if not self._pool.allocate(blocks - hits):
            self._pool.release(hashes[:hits], 0)
            return None
        sequence.computed = present
        sequence.blocks = blocks
        sequence.shared = hits
        self._publish(sequence, tokens)
        return tokens

    def _publish(self, sequence: TokenSequence, tokens: int) -> None:
        """Share the blocks this step fills: requests after it in the same step may use them, as in vLLM."""
        full = (sequence.computed + tokens) // self.spec.block_size
        hashes = sequence.request.block_hashes
        for block_hash in hashes[sequence.shared : full]:
            if self._pool.publish(block_hash) and self._kv_log is not None:
                self._kv_log.stored(sequence.request, sequence.shared)
            sequence.shared += 1

    def _note_scheduled(self, sequence: TokenSequence, now: float) -> None:
        sequence.scheduled_s = now
        sequence.cached_tokens = sequence.computed
        self.stats.queue.observe(now - sequence.arrived_s)
        self.stats.prefix_queries += sequence.request.prompt_tokens
        self.stats.prefix_hits += sequence.computed

    def _produce(self, sequence: TokenSequence, now: float) -> TokenEvent:
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
            if request.keeps:
                self._kept[request.request_id] = sequence
            else:
                self._release(sequence)
            self._note_finished(sequence, now)
        elif sequence.generated == request.stall_after:
            self._stalled[request.request_id] = self._running.pop(request.request_id)
        return TokenEvent(request.request_id, sequence.generated, finished, sequence.cached_tokens)

    def _skip(self, sequence: TokenSequence, tokens: int, now: float) -> None:
        """All tokens of several steps alike but the last, which comes out at `now`."""
        sequence.computed += tokens
        sequence.known += tokens
        sequence.generated += tokens
        self.stats.generation_tokens += tokens
        self.stats.itl.observe(now - tokens * self._step_s - sequence.last_token_s)
        self.stats.itl.observe(self._step_s, tokens - 1)
        sequence.last_token_s = now - self._step_s

    def _note_first_token(self, sequence: TokenSequence, now: float) -> None:
        sequence.first_token_s = now
        self.stats.prompt_tokens += sequence.request.prompt_tokens
        self.stats.ttft.observe(now - sequence.arrived_s)
        self.stats.prefill.observe(now - sequence.scheduled_s)

    def _note_finished(self, sequence: TokenSequence, now: float) -> None:
        self.stats.finished[sequence.request.finish_reason] += 1
        self.stats.e2e.observe(now - sequence.arrived_s)
        self.stats.decode.observe(now - sequence.first_token_s)
        self.stats.inference.observe(now - sequence.scheduled_s)

    def _release(self, sequence: TokenSequence) -> None:
        self._pool.release(
            sequence.request.block_hashes[: sequence.shared], sequence.blocks - sequence.shared
        )
        sequence.computed = sequence.blocks = sequence.shared = 0
