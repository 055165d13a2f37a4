"""How a service process becomes ready, drains and ends; in processes of their own, for the signals."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from integration.servers import Process

from penstock.common.lifecycle import Lifecycle

SERVICE = """
import asyncio, logging, sys
from penstock.common.lifecycle import Lifecycle, run_service

how = sys.argv[1]
logging.basicConfig()


def say(text):
    print(text, file=sys.stderr, flush=True)


async def main():
    lifecycle, turns = Lifecycle(), 0

    async def turning():
        nonlocal turns
        try:
            while True:
                await asyncio.sleep(0)
                turns += 1
        finally:
            say("turning was cancelled")

    async def odd():
        if how == "fails":
            raise KeyError("cause of death")
        if how == "ends":
            return
        await asyncio.sleep(3600)

    async def drain():
        say("drain begins: " + "; ".join(lifecycle.missing()))
        before = turns
        while turns < before + 10:
            await asyncio.sleep(0)
        if how == "drain-fails":
            raise ZeroDivisionError("while draining")
        say("drain ends")

    lifecycle.add_loop("turning", turning())
    lifecycle.add_loop("odd", odd())
    say("missing: " + repr(lifecycle.missing()))
    await lifecycle.run(drain)
    say("after the run")


sys.exit(run_service(main))
"""


def service(how: str) -> Process:
    return Process([sys.executable, "-c", SERVICE, how], name=how)


@pytest.fixture
def running() -> Iterator[Process]:
    with service("runs") as process:
        process.wait_for_line(r"missing: \[\]")
        yield process


END = ["drain begins: draining", "drain ends", "turning was cancelled", "after the run"]


@pytest.mark.parametrize("end", [Process.terminate, Process.interrupt], ids=["SIGTERM", "SIGINT"])
def test_a_signal_drains_while_the_loops_go_on_and_ends_with_0(running: Process, end: object) -> None:
    assert callable(end)
    end(running)
    running.assert_exit(0)
    assert [line for line in running.lines if line in END] == END


def test_a_loop_that_fails_is_named_and_ends_the_service_with_1_after_draining() -> None:
    with service("fails") as process:
        process.assert_exit(1)
    assert "loop odd failed" in process.stderr
    assert "cause of death" in process.stderr
    assert [line for line in process.lines if line in END] == END[:3]


def test_a_loop_that_ends_ends_the_service() -> None:
    with service("ends") as process:
        process.assert_exit(0)
    assert [line for line in process.lines if line in END] == END


def test_a_drain_that_fails_still_cancels_the_loops_and_is_no_clean_stop() -> None:
    with service("drain-fails") as process:
        process.wait_for_line("missing")
        process.terminate()
        process.assert_exit(1)
    assert "while draining" in process.stderr
    assert "turning was cancelled" in process.lines


def test_a_service_is_ready_once_nothing_is_missing() -> None:
    lifecycle = Lifecycle()
    lacks = {"registry": "no listing yet", "bus": "not connected"}
    for name in lacks:
        lifecycle.require(name, lambda name=name: lacks[name])  # type: ignore[misc]
    assert lifecycle.missing() == ["registry: no listing yet", "bus: not connected"]
    lacks["registry"] = ""
    assert lifecycle.missing() == ["bus: not connected"]
    lacks["bus"] = ""
    assert lifecycle.missing() == []


async def test_a_service_that_drains_is_not_ready_whatever_else_it_has() -> None:
    lifecycle = Lifecycle()
    lifecycle.require("bus", lambda: "")
    lifecycle.stopping.set()
    assert lifecycle.missing() == ["draining"]
