"""Child processes: started, read, restarted when they die, stopped, and never left behind."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

FIRST_DELAY_S, LONGEST_DELAY_S = 0.2, 5.0
# A child that lived this long has shown that it works.
STEADY_S = 10.0
# A longer line is shown in pieces.
MAX_LINE_BYTES = 64 * 1024
LAST_LINES_S = 1.0

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def next_delay(previous_s: float, alive_s: float) -> float:
    """Seconds until the next start of a child that died after `alive_s`."""
    if previous_s == 0 or alive_s >= STEADY_S:
        return FIRST_DELAY_S
    return min(2 * previous_s, LONGEST_DELAY_S)


def exit_text(code: int | None) -> str:
    """How a process ended, in words."""
    if code is None:
        return "could not be started"
    if code < 0:
        with suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


@dataclass(frozen=True)
class Command:
    """What to run; `environ` is the whole environment."""

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str] = field(repr=False)


@dataclass
class Child:
    """One supervised process, over all its lives."""

    command: Command
    deaths: int = 0
    pid: int = 0
    exit_code: int | None = None
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    def signal_group(self, number: int) -> None:
        """Signal the process and everything that it started."""
        if self.pid:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)


class Supervisor:
    """Keeps children running until they are told to stop."""

    def __init__(
        self, on_line: Callable[[Child, bytes], None], on_death: Callable[[Child, str, float], None]
    ) -> None:
        """`on_line` gets every line of output, `on_death` a cause and the seconds until the restart."""
        self._on_line, self._on_death = on_line, on_death
        self.children: list[Child] = []

    def start(self, command: Command) -> Child:
        """Run `command`, again and again."""
        child = Child(command)
        child.task = asyncio.create_task(self._keep(child), name=f"child-{command.name}")
        self.children.append(child)
        return child

    async def stop(self, children: Sequence[Child], grace_s: float) -> list[Child]:
        """Ask them to stop, kill those that do not within `grace_s`, and return these."""
        for child in children:
            child.stopping.set()
            # To the process alone: it leads its own helpers through their end.
            if child.pid:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM)
        tasks = {child.task: child for child in children if child.task is not None}
        if not tasks:
            return []
        _, late = await asyncio.wait(tasks, timeout=grace_s)
        for child in children:
            if child.pid:
                child.signal_group(signal.SIGKILL)
        await asyncio.gather(*tasks, return_exceptions=True)
        return [tasks[task] for task in late]

    async def watch(self, until: asyncio.Event) -> None:
        """Return once `until` is set; raises as `check` does."""
        end = asyncio.create_task(until.wait(), name="watch")
        tasks = [child.task for child in self.children if child.task is not None]
        try:
            await asyncio.wait([end, *tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            end.cancel()
        self.check()

    def check(self) -> None:
        """Raise whatever made a child's task end: it would not be started again."""
        for child in self.children:
            if child.task is not None and child.task.done():
                child.task.result()

    def kill(self) -> None:
        """End all children at once; `stop` then returns soon."""
        for child in self.children:
            child.stopping.set()
            child.signal_group(signal.SIGKILL)

    async def _keep(self, child: Child) -> None:
        delay_s = 0.0
        while not child.stopping.is_set():
            started = time.monotonic()
            child.exit_code, cause = await self._live(child)
            if child.stopping.is_set():
                return
            child.deaths += 1
            alive_s = time.monotonic() - started
            delay_s = next_delay(delay_s, alive_s)
            self._on_death(child, f"{cause} after {alive_s:.1f} s", delay_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await child.stopping.wait()

    async def _live(self, child: Child) -> tuple[int | None, str]:
        """One life: the exit code and how it ended."""
        try:
            transport, output = await self._spawn(child)
        except OSError as exc:
            return None, f"could not be started ({exc.strerror or exc})"
        child.pid = transport.get_pid()
        if child.stopping.is_set():
            child.signal_group(signal.SIGTERM)
        await output.exited.wait()
        # Helpers outlive a parent that was killed, and would hold its port.
        child.signal_group(signal.SIGKILL)
        child.pid = 0
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_LINES_S):
                await output.ended.wait()
        transport.close()
        code = transport.get_returncode()
        return code, exit_text(code)

    async def _spawn(self, child: Child) -> tuple[asyncio.SubprocessTransport, _Output]:
        return await asyncio.get_running_loop().subprocess_exec(
            lambda: _Output(lambda line: self._on_line(child, line)),
            *child.command.argv,
            env=dict(child.command.environ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            # Its own group: Ctrl-C reaches the supervisor alone, which stops the children in order.
            start_new_session=True,
            preexec_fn=_end_with(os.getpid()),
        )


class _Output(asyncio.SubprocessProtocol):
    """Splits a child's output into lines, and knows when it exited (pipes may stay open longer)."""

    def __init__(self, on_line: Callable[[bytes], None]) -> None:
        self._on_line = on_line
        self._rest = bytearray()
        self.exited, self.ended = asyncio.Event(), asyncio.Event()

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._rest += data
        if b"\n" in data or len(self._rest) > MAX_LINE_BYTES:
            *lines, rest = bytes(self._rest).split(b"\n")
            if len(rest) > MAX_LINE_BYTES:
                lines, rest = [*lines, rest], b""
            self._rest = bytearray(rest)
            for line in filter(None, lines):
                self._on_line(line)

    def process_exited(self) -> None:
        self.exited.set()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._rest:
            self._on_line(bytes(self._rest))
        self.exited.set()
        self.ended.set()


def _end_with(parent: int) -> Callable[[], None] | None:
    """Runs in the child before its program: on Linux, the parent's death will be the child's SIGTERM."""
    libc = _libc
    if libc is None:
        return None

    def run() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return run
