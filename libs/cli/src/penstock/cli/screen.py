"""Lines to a file descriptor, written by a thread: a terminal that stands still must not stop the stack."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

MAX_WAITING_LINES = 10_000


class Screen:
    """At most `max_lines` wait; past that, lines are dropped and their number is shown.

    `on_closed` is called, from the thread, once nobody reads any more.
    """

    def __init__(
        self, descriptor: int, on_closed: Callable[[], None], max_lines: int = MAX_WAITING_LINES
    ) -> None:
        self._descriptor, self._on_closed = descriptor, on_closed
        self._waiting: queue.Queue[str | None] = queue.Queue(max_lines)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="screen", daemon=True)
        self._thread.start()

    def write(self, line: str) -> None:
        """Show a line, some time soon."""
        try:
            self._waiting.put_nowait(line)
        except queue.Full:
            self._dropped += 1

    def close(self, deadline_s: float) -> None:
        """Write what waits; give up after `deadline_s`."""
        try:
            self._waiting.put(None, timeout=deadline_s)
        except queue.Full:
            return
        self._thread.join(deadline_s)

    def _run(self) -> None:
        try:
            while (line := self._waiting.get()) is not None:
                dropped, self._dropped = self._dropped, 0
                note = f"... {dropped} lines dropped: the terminal did not take them\n" if dropped else ""
                self._put(f"{note}{line}\n".encode("utf-8", "replace"))
        except OSError:
            self._on_closed()
            while self._waiting.get() is not None:
                pass

    def _put(self, data: bytes) -> None:
        # Not through sys.stdout: a thread stuck in its lock would keep the interpreter from exiting.
        while data:
            data = data[os.write(self._descriptor, data) :]
