"""`penstock top` as an auditor, on a real stack: on a terminal, in a pipe, as JSON, without a bus."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from integration.bus_users import StackOfUsers, stack_of_users
from integration.drills import frozen
from integration.servers import eventually, free_port
from integration.stack import Load, stream_chat
from integration.terminals import Terminal
from integration.test_up import penstock

pytestmark = pytest.mark.integration

PATIENCE_S = 20.0
COMMAND = str(Path(sys.executable).parent / "penstock")


@pytest.fixture(scope="module")
def stack() -> Iterator[StackOfUsers]:
    with stack_of_users() as stack:
        stack.start_sims(2)
        stack.start_discovery()
        stack.start_scheduler()
        stack.start_ingress()
        yield stack


def top(stack: StackOfUsers, columns: int, lines: int) -> Terminal:
    return Terminal([COMMAND, "top", "--nats-url", stack.users.url("auditor")], columns, lines)


async def test_a_terminal_shows_the_fleet_follows_its_size_and_is_left_as_it_was(stack: StackOfUsers) -> None:
    await stack.ready()
    async with Load([stack.url], clients=4) as load:
        await load.answers(50)
        with top(stack, 120, 30) as terminal:
            wait = terminal.wait
            await asyncio.to_thread(wait, r"decisions [1-9][\d.]*/s .*requests [1-9][\d.]*/s  errors 0/s")
            await asyncio.to_thread(wait, r"processes .*discovery 1  ingress 1 .*scheduler 1")
            for engine in stack.engines:
                await asyncio.to_thread(wait, rf"{engine} +neutral  ready +\d+ +\d+ +\d+% +\d+ +[\d.]+ +0")
            terminal.resize(40, 6)
            await eventually(lambda: 0 < len(terminal.frame()) <= 6, PATIENCE_S)
            assert all(len(line) <= 40 for line in terminal.frame())
            terminal.resize(120, 30)
            with frozen(stack.schedulers[0]):
                await asyncio.to_thread(wait, r"degraded  ingress/[\w-]+: placing locally \(\d+ s\)")
            await asyncio.to_thread(wait, r"(?s)^((?!degraded).)*$")
            terminal.press("q")
            assert await asyncio.to_thread(terminal.ended) == 0
            await eventually(terminal.left_as_found)
        await load.stop()
    assert load.failures == []


async def test_ctrl_c_and_a_closed_terminal_end_it(stack: StackOfUsers) -> None:
    await stack.ready()
    for leave in (lambda terminal: terminal.press("\x03"), Terminal.hang_up):
        with top(stack, 80, 24) as terminal:
            await asyncio.to_thread(terminal.wait, "penstock top .* bus connected")
            leave(terminal)
            assert await asyncio.to_thread(terminal.ended) == 0
            await eventually(terminal.left_as_found)


async def test_a_pipe_gets_one_frame_without_a_single_control_character(stack: StackOfUsers) -> None:
    await stack.ready()
    with penstock("top", "--nats-url", stack.users.url("auditor")) as once:
        await asyncio.to_thread(once.assert_exit, 0, PATIENCE_S)
    assert "penstock top" in once.out[0]
    assert [line for line in once.out if stack.engines[0] in line]
    assert "\x1b" not in once.stdout


async def test_json_counts_what_is_in_flight_and_where(stack: StackOfUsers) -> None:
    await stack.ready()
    flags = ("--json", "--interval", "0.2", "--nats-url", stack.users.url("auditor"))
    async with aiohttp.ClientSession() as session:
        with penstock("top", *flags) as following:
            await eventually(lambda: following.out, PATIENCE_S)

            def shown() -> Any:
                return json.loads(following.out[-1])

            def held() -> Counter[str]:
                return Counter({one["id"]: one["in_flight"] for one in shown()["instances"]})

            # What a frozen scheduler decided too late, for whom nobody waited any more, is open.
            before, total = held(), shown()["totals"]["in_flight"]
            stuck = {"x-sim-fault": "hang-mid-stream;tokens=2"}
            streamed = stream_chat(session, stack.url, "stuck", headers=stuck)
            await anext(streamed)
            await eventually(lambda: (held() - before).total() == 1, PATIENCE_S)
            assert shown()["totals"]["in_flight"] == total + 1
            await streamed.aclose()
            await eventually(lambda: shown()["totals"]["in_flight"] == total, PATIENCE_S)
            assert held() == before
            following.terminate()
            await asyncio.to_thread(following.assert_exit, 0, PATIENCE_S)
    async with Load([stack.url], clients=4) as load:
        await load.answers(50)
        with penstock("top", *flags, "--once") as once:
            await asyncio.to_thread(once.assert_exit, 0, PATIENCE_S)
    (view,) = map(json.loads, once.out)
    assert {one["id"] for one in view["instances"]} == set(stack.engines)
    assert all(one["kv_usage_ratio"] is not None for one in view["instances"])
    assert {one["service"] for one in view["processes"]} >= {"ingress", "scheduler", "discovery"}


async def test_a_lost_bus_is_shown_and_a_missing_one_ends_it_with_1(stack: StackOfUsers) -> None:
    await stack.ready()
    with top(stack, 100, 24) as terminal:
        await asyncio.to_thread(terminal.wait, "bus connected")
        with frozen(stack.nats):
            await asyncio.to_thread(terminal.wait, "BUS LOST")
        await asyncio.to_thread(terminal.wait, "bus connected")
    with penstock("top", "--once", "--nats-url", f"nats://127.0.0.1:{free_port()}") as alone:
        await asyncio.to_thread(alone.assert_exit, 1, PATIENCE_S)
    assert "the bus: does not answer" in alone.stderr
