"""Drives an engine on the clock of an asyncio loop: timers and callbacks, no task and no polling."""

import asyncio
from collections.abc import Callable

from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest, TokenEvent

Listener = Callable[[TokenEvent], None]

# Steps that are due already run back to back, but the loop gets its turn after so many.
_STEPS_IN_A_ROW = 32
# A loop that is this late (stopped process, long callback) goes on from the present instead of catching up.
_LONGEST_LAG_S = 0.1


class EngineRunner:
    """Steps end at their modelled time, so lateness of timers (1 ms with uvloop) does not add up.

    A listener gets each event of its request, up to the one that is `finished`, or up to `abort`.
    """

    def __init__(
        self,
        engine: Engine,
        loop: asyncio.AbstractEventLoop,
        stepped: Callable[[], None] | None = None,
    ) -> None:
        """`stepped` is called whenever a step was composed, by which its blocks are stored and evicted."""
        self.engine = engine
        self._stepped = stepped
        self._loop = loop
        self._listeners: dict[str, Listener] = {}
        self._handle: asyncio.Handle | None = None
        # Latest time told to the engine, and the end of the open step.
        self._told_s = 0.0
        self._due_s = 0.0

    def submit(self, request: EngineRequest, listener: Listener) -> None:
        """Raises what `Engine.submit` raises."""
        self.engine.submit(request, self._now())
        self._listeners[request.request_id] = listener
        self._wake()

    def abort(self, request_id: str) -> bool:
        """Whether the request was still in the engine; its listener hears nothing more."""
        self._listeners.pop(request_id, None)
        if not self.engine.abort(request_id):
            return False
        self._wake()
        return True

    def let_go(self, request_id: str) -> None:
        """Free the blocks that a finished request left behind."""
        if self.engine.let_go(request_id):
            self._wake()

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._listeners.clear()

    def _now(self) -> float:
        now = self._loop.time()
        if self.engine.in_step:
            now = min(now, self._due_s)
        self._told_s = max(self._told_s, now)
        return self._told_s

    def _wake(self) -> None:
        if self._handle is None:
            # Not at once: requests of one loop tick start in one batch.
            self._handle = self._loop.call_soon(self._run)

    def _run(self) -> None:
        self._handle = None
        for _ in range(_STEPS_IN_A_ROW):
            if self.engine.in_step:
                self._end_step()
                lag_s = self._loop.time() - self._due_s
                self._told_s = self._loop.time() if lag_s > _LONGEST_LAG_S else self._due_s
            else:
                self._told_s = max(self._told_s, self._loop.time())
            duration_s = self.engine.start_step(self._told_s)
            if duration_s is None:
                return
            if self._stepped is not None:
                self._stepped()
            self._due_s = self._told_s + duration_s
            wait_s = self._due_s - self._loop.time()
            if wait_s > 0:
                self._handle = self._loop.call_later(wait_s, self._run)
                return
        self._handle = self._loop.call_soon(self._run)

    def _end_step(self) -> None:
        for event in self.engine.end_step(self._due_s):
            request_id = event.request_id
            listener = self._listeners.pop(request_id) if event.finished else self._listeners[request_id]
            listener(event)
