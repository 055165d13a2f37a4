"""A cluster of engine models on a virtual clock: the same model, driven by an event queue.

Steps that do nothing but give every running request one more token are taken at once, up to the next arrival
at their engine: half of the work at high load, an eighth at low. Times differ from those of single steps by
float rounding, below 1 ns in an hour; a request that arrives so close to a step's end may be a step later.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

from penstock.sim.engine import Engine
from penstock.sim.spec import DoesNotFit, EngineRequest, QueueFull, TokenEvent

# Index of the engine that gets the request, from (request, now in seconds, engines); or index and another
# request of the same moment in its place.
Decide = Callable[[EngineRequest, float, Sequence[Engine]], int | tuple[int, EngineRequest]]
# Told of a request's first and last token and of some between: (event, engine's index, now in seconds).
Observe = Callable[[TokenEvent, int, float], None]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request at a time, in seconds since the start of the run."""

    at_s: float
    request: EngineRequest


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request. `refused` says why its engine did not take it; the figures are 0 then.

    TTFT and E2E count from arrival; TPOT is (E2E - TTFT) / (output tokens - 1), 0 for fewer than two.
    """

    request_id: str
    engine: int
    ttft_s: float = 0.0
    tpot_s: float = 0.0
    e2e_s: float = 0.0
    cached_tokens: int = 0
    refused: str = ""


@dataclass(slots=True)
class _Open:
    arrival: Arrival
    engine: int
    first_token_s: float = 0.0


@dataclass(slots=True)
class _Steps:
    """Steps alike that one engine takes; they end at `due_s`."""

    started_s: float
    step_s: float
    count: int
    due_s: float


class Cluster:
    """Runs arrivals to the end; a run is deterministic if `decide` is."""

    def __init__(
        self,
        engines: Sequence[Engine],
        decide: Decide,
        observe: Observe = lambda event, engine, now: None,
    ) -> None:
        self._engines = engines
        self._decide, self._observe = decide, observe
        self._open: dict[str, _Open] = {}
        self._outcomes: list[Outcome] = []
        self._steps: dict[int, _Steps] = {}
        # Ends of steps: (time, engine); out of date where the engine's steps are due at another time.
        self._ends: list[tuple[float, int]] = []
        # What is to come: (time, number in order of entry, arrival).
        self._coming: list[tuple[float, int, Arrival]] = []
        self._numbers = count()

    def add(self, arrival: Arrival) -> None:
        """One more request; while a run is under way, not earlier than what is observed."""
        heapq.heappush(self._coming, (arrival.at_s, next(self._numbers), arrival))

    def run(self, arrivals: Iterable[Arrival]) -> list[Outcome]:
        """Outcomes in the order in which requests end; arrivals need not be sorted, their ids are unique."""
        for arrival in arrivals:
            self.add(arrival)
        while self._coming or self._ends:
            # A step that ends just when a request arrives is seen by its placement.
            if not self._coming or (self._ends and self._ends[0][0] <= self._coming[0][0]):
                self._end_step()
                continue
            at_s = self._coming[0][0]
            # Requests of one instant start in one batch.
            for index in {self._arrive(arrival): None for arrival in self._next_ones(at_s)}:
                if not self._engines[index].in_step:
                    self._start_step(index, at_s)
        return self._outcomes

    def _next_ones(self, at_s: float) -> Iterator[Arrival]:
        while self._coming and self._coming[0][0] == at_s:
            yield heapq.heappop(self._coming)[2]

    def _arrive(self, arrival: Arrival) -> int:
        now, decided = arrival.at_s, self._decide(arrival.request, arrival.at_s, self._engines)
        if not isinstance(decided, int):
            arrival = Arrival(now, decided[1])
        request, index = arrival.request, decided if isinstance(decided, int) else decided[0]
        try:
            self._engines[index].submit(request, now)
        except (DoesNotFit, QueueFull) as exc:
            self._outcomes.append(Outcome(request.request_id, index, refused=str(exc)))
        else:
            self._open[request.request_id] = _Open(arrival, index)
            self._cut(index, now)
        return index

    def _start_step(self, index: int, now: float) -> None:
        engine = self._engines[index]
        duration_s = engine.start_step(now)
        if duration_s is not None:
            count = engine.steps_alike()
            self._steps[index] = _Steps(now, duration_s, count, now + duration_s * count)
            heapq.heappush(self._ends, (self._steps[index].due_s, index))

    def _cut(self, index: int, now: float) -> None:
        """What arrives at `now` is looked at when the step ends that is under way then."""
        steps = self._steps.get(index)
        if steps is None or steps.count == 1 or not steps.step_s:
            return
        count = int((now - steps.started_s) / steps.step_s) + 1
        if count < steps.count:
            steps.count, steps.due_s = count, max(now, steps.started_s + count * steps.step_s)
            heapq.heappush(self._ends, (steps.due_s, index))

    def _end_step(self) -> None:
        now, index = heapq.heappop(self._ends)
        steps = self._steps.get(index)
        if steps is None or steps.due_s != now:
            return
        del self._steps[index]
        for event in self._engines[index].end_step(now, steps.count):
            self._observe(event, index, now)
            self._note(event, now)
        self._start_step(index, now)

    def _note(self, event: TokenEvent, now: float) -> None:
        progress = self._open[event.request_id]
        if event.generated <= 1:
            progress.first_token_s = now
        if not event.finished:
            return
        del self._open[event.request_id]
        decode_s = now - progress.first_token_s
        outcome = Outcome(
            request_id=event.request_id,
            engine=progress.engine,
            ttft_s=progress.first_token_s - progress.arrival.at_s,
            tpot_s=decode_s / (event.generated - 1) if event.generated > 1 else 0.0,
            e2e_s=now - progress.arrival.at_s,
            cached_tokens=event.cached_tokens,
        )
        self._outcomes.append(outcome)
