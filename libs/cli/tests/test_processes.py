"""Children are restarted, stopped in time, and never left behind. These run real processes (`sh`)."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from penstock.cli.processes import (
    FIRST_DELAY_S,
    LONGEST_DELAY_S,
    MAX_LINE_BYTES,
    STEADY_S,
    Child,
    Command,
    Supervisor,
    exit_text,
    next_delay,
)

PATIENCE_S = 30.0


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # what a process does sets no event here
            await asyncio.sleep(0.01)


class Run:
    """A supervisor with what it reported."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.deaths: list[str] = []
        self.supervisor = Supervisor(
            lambda _, line: self.lines.append(line), lambda _, cause, delay_s: self.deaths.append(cause)
        )

    def shell(self, script: str) -> Child:
        return self.supervisor.start(Command("shell", ("/bin/sh", "-c", script), os.environ))


@asynccontextmanager
async def running() -> AsyncIterator[Run]:
    run = Run()
    try:
        yield run
    finally:
        run.supervisor.kill()
        await run.supervisor.stop(run.supervisor.children, PATIENCE_S)


@pytest.mark.parametrize(
    ("previous_s", "alive_s", "delay_s"),
    [
        (0.0, 0.1, FIRST_DELAY_S),
        (0.2, 0.1, 0.4),
        (0.4, STEADY_S - 0.1, 0.8),
        (4.0, 0.1, LONGEST_DELAY_S),
        (LONGEST_DELAY_S, 0.1, LONGEST_DELAY_S),
        (LONGEST_DELAY_S, STEADY_S, FIRST_DELAY_S),
    ],
)
def test_the_delay_doubles_until_a_child_has_shown_that_it_works(
    previous_s: float, alive_s: float, delay_s: float
) -> None:
    assert next_delay(previous_s, alive_s) == delay_s


@pytest.mark.parametrize(
    ("code", "text"),
    [(0, "ended with exit code 0"), (-9, "ended by SIGKILL"), (None, "could not be started"), (-99, "-99")],
)
def test_how_a_child_ended_is_said_in_words(code: int | None, text: str) -> None:
    assert text in exit_text(code)


async def test_output_comes_line_by_line_from_both_streams() -> None:
    async with running() as run:
        run.shell("echo out; echo err >&2; printf rest; exec sleep 600")
        await eventually(lambda: len(run.lines) >= 2)
        assert sorted(run.lines[:2]) == [b"err", b"out"]


async def test_a_line_without_end_is_shown_in_pieces() -> None:
    async with running() as run:
        run.shell("exec cat /dev/zero")
        await eventually(lambda: len(run.lines) >= 2)
        assert all(MAX_LINE_BYTES < len(line) < 16 * MAX_LINE_BYTES for line in run.lines)


async def test_a_child_that_dies_is_started_again() -> None:
    async with running() as run:
        child = run.shell("echo started; exec sleep 600")
        await eventually(lambda: run.lines == [b"started"])
        os.kill(child.pid, signal.SIGKILL)
        await eventually(lambda: run.lines == [b"started"] * 2)
        assert child.deaths == 1
        assert run.deaths[0].startswith("ended by SIGKILL")


async def test_last_words_are_heard_before_the_death_is_told() -> None:
    async with running() as run:
        child = run.shell("printf 'why it failed'; exit 3")
        await eventually(lambda: child.deaths == 1)
        assert run.lines == [b"why it failed"]
        assert run.deaths[0].startswith("ended with exit code 3")


async def test_a_program_that_does_not_exist_is_a_death() -> None:
    async with running() as run:
        child = run.supervisor.start(Command("ghost", ("/nonexistent/program",), {}))
        await eventually(lambda: child.deaths == 1)
        assert "No such file" in run.deaths[0]


async def test_a_child_that_stops_when_asked_is_not_killed() -> None:
    async with running() as run:
        child = run.shell("trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.05; done")
        await eventually(lambda: run.lines == [b"up"])
        assert await run.supervisor.stop([child], PATIENCE_S) == []
        assert run.lines == [b"up", b"bye"]
        assert (child.deaths, child.pid) == (0, 0)


async def test_a_child_that_does_not_stop_is_killed_with_all_its_helpers() -> None:
    async with running() as run:
        child = run.shell("trap '' TERM; sleep 600 & echo $!; wait; while :; do sleep 600; done")
        await eventually(lambda: len(run.lines) == 1)
        helper = psutil.Process(int(run.lines[0]))
        assert await run.supervisor.stop([child], 0.05) == [child]
        await eventually(lambda: not helper.is_running() or helper.status() == psutil.STATUS_ZOMBIE)


async def test_helpers_of_a_child_that_was_killed_are_gone_before_the_restart() -> None:
    async with running() as run:
        child = run.shell("sleep 600 & echo $!; wait")
        await eventually(lambda: len(run.lines) == 1)
        helper = psutil.Process(int(run.lines[0]))
        os.kill(child.pid, signal.SIGKILL)
        await eventually(lambda: len(run.lines) == 2)
        assert not helper.is_running() or helper.status() == psutil.STATUS_ZOMBIE


async def test_a_child_is_stopped_while_it_waits_for_its_restart() -> None:
    async with running() as run:
        child = run.shell("exit 1")
        await eventually(lambda: child.deaths == 3)
        assert await run.supervisor.stop([child], PATIENCE_S) == []
        assert child.task is not None
        assert child.task.done()
        assert child.deaths == 3


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children only on Linux")
def test_children_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "supervise.py"
    script.write_text(
        "import asyncio, os\n"
        "from penstock.cli.processes import Command, Supervisor\n"
        "async def main():\n"
        "    supervisor = Supervisor(lambda c, line: print(line.decode(), flush=True), print)\n"
        "    supervisor.start(Command('x', ('/bin/sh', '-c', 'echo $$; exec sleep 600'), os.environ))\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait(PATIENCE_S)
        child.wait(PATIENCE_S)
    assert not child.is_running()
