"""How a service starts, says that it is ready, drains and stops.

Exit codes: 0 clean stop, 1 a fault of its own, 2 bad settings.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import uvloop

log = logging.getLogger(__name__)

LAG_PROBE_S = 0.1


class Lifecycle:
    """The state of one service process: what it still waits for, its loops, whether it is asked to stop."""

    def __init__(self) -> None:
        self.stopping = asyncio.Event()
        self._conditions: dict[str, Callable[[], str]] = {}
        self._loops: list[tuple[str, Coroutine[Any, Any, None]]] = []
        self.loop_lag_s = 0.0

    def require(self, name: str, missing: Callable[[], str]) -> None:
        """Ready only while `missing()` is empty; otherwise it says what lacks, in words."""
        self._conditions[name] = missing

    def missing(self) -> list[str]:
        """Why the service is not ready, one sentence each; empty when it is."""
        faults = [f"{name}: {text}" for name, check in self._conditions.items() if (text := check())]
        return ["draining", *faults] if self.stopping.is_set() else faults

    def add_loop(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """An eternal loop of the service: if one ends, the service ends."""
        self._loops.append((name, work))

    def abandon(self) -> None:
        """Close the loops of a service that will not run."""
        for _, work in self._loops:
            work.close()

    async def run(self, drain: Callable[[], Awaitable[None]]) -> None:
        """Run the loops until SIGTERM or SIGINT; then `drain` while they go on, then cancel them."""
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, self.stopping.set)
        self.add_loop("loop-lag", self._measure_lag())
        tasks = [asyncio.create_task(work, name=name) for name, work in self._loops]
        stop: asyncio.Task[Any] = asyncio.create_task(self.stopping.wait(), name="stop")
        try:
            await asyncio.wait([stop, *tasks], return_when=asyncio.FIRST_COMPLETED)
            self.stopping.set()
            failed = [task for task in tasks if task.done() and not task.cancelled() and task.exception()]
            for task in failed:
                log.error("loop %s failed", task.get_name(), exc_info=task.exception())
            await drain()
            if failed:
                raise SystemExit(1)
        finally:
            for task in (stop, *tasks):
                task.cancel()
            await asyncio.gather(stop, *tasks, return_exceptions=True)

    async def _measure_lag(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(LAG_PROBE_S)
            self.loop_lag_s = max(0.0, time.monotonic() - before - LAG_PROBE_S)


def run_service(main: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run a service's `main` on uvloop; the exit code."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())
    except KeyboardInterrupt:
        return 0
    except SystemExit as exc:
        return int(exc.code or 0)
    return 0
