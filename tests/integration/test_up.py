"""`penstock up` as a newcomer meets it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from integration.servers import Process, eventually, free_port
from integration.stack import MODEL, chat

pytestmark = pytest.mark.integration

START_TIMEOUT_S = 40.0


def penstock(*args: str, env: dict[str, str] | None = None) -> Process:
    """The command as it is installed."""
    return Process([str(Path(sys.executable).parent / "penstock"), *args], env=env, name="penstock")


def ready(process: Process) -> dict[str, Any]:
    """What `up --log-json` says once everything is ready."""
    match = process.wait_for_line(r'^\{.*"service": ?"up".*"url".*\}$', START_TIMEOUT_S)
    line: dict[str, Any] = json.loads(match[0])
    return line


async def test_the_stack_starts_answers_and_leaves_nothing_behind(tmp_path: Path) -> None:
    env = {"TMPDIR": str(tmp_path)}
    with penstock("up", "--sim", "2", "--port", "0", "--admin-port", "0", "--log-json", env=env) as up:
        told = await asyncio.to_thread(ready, up)
        children = psutil.Process(up.pid).children(recursive=True)
        assert len(children) >= 6
        async with aiohttp.ClientSession() as session:
            status, headers, body = await chat(session, told["url"].removesuffix("/v1"), "hello")
            assert status == 200
            assert headers["routing-strategy"] == "cache-aware"
            assert body["model"] == MODEL

        with penstock(
            "tap",
            "--nats-url",
            told["nats_url"],
            "--since",
            "5m",
            "--json",
            "--type",
            "outcome",
            "--count",
            "1",
        ) as tap:
            await asyncio.to_thread(tap.assert_exit, 0, 60.0)
        events = [json.loads(line) for line in tap.out if line.startswith("{")]
        assert [event["type"] for event in events] == ["penstock.outcome.v1"]

        up.interrupt()
        await asyncio.to_thread(up.assert_exit, 0, 60.0)
        assert [child for child in children if child.is_running() and child.status() != "zombie"] == []
        assert os.listdir(tmp_path) == []


async def test_a_service_that_dies_is_started_again() -> None:
    with penstock("up", "--sim", "1", "--port", "0", "--admin-port", "0", "--log-json") as up:
        told = await asyncio.to_thread(ready, up)
        children = psutil.Process(up.pid).children(recursive=True)
        victims = [
            c
            for c in children
            if re.search(r"penstock\.(scheduler|discovery)|nats-server", " ".join(c.cmdline()))
        ]
        assert len(victims) == 3
        for victim in victims:
            victim.kill()
        async with aiohttp.ClientSession() as session:

            async def placed_by_a_scheduler() -> bool:
                status, headers, _ = await chat(session, told["url"].removesuffix("/v1"), "hello")
                assert status == 200
                return "local" != headers["routing-strategy"]  # noqa: SIM300

            await eventually(placed_by_a_scheduler, START_TIMEOUT_S)
        up.terminate()
        await asyncio.to_thread(up.assert_exit, 0, 60.0)


async def test_an_engine_that_registers_joins_a_running_stack_and_leaves_it_when_it_dies() -> None:
    with (
        penstock("up", "--sim", "0", "--port", "0", "--admin-port", "0", "--log-json") as up,
        penstock("sim", "--port", "0") as engine,
    ):
        told = await asyncio.to_thread(ready, up)
        assert (told["engines"], told["model"]) == ([], "")
        here = (await asyncio.to_thread(engine.wait_for_line, r"listening on (\S+)"))[1]
        url = {"PENSTOCK_NATS_URL": told["register_url"]}
        with penstock("register", "--store", "nats", "--engine", here, env=url) as sidecar:
            async with aiohttp.ClientSession() as session:

                async def answers() -> bool:
                    status, _, _ = await chat(session, told["url"], "hello")
                    return status == 200

                async def models() -> list[str]:
                    async with session.get(f"{told['url']}/v1/models") as response:
                        return [model["id"] for model in (await response.json())["data"]]

                await eventually(answers, START_TIMEOUT_S)
                assert await models() == [MODEL]
                engine.kill()

                async def gone() -> bool:
                    return not await models()

                await eventually(gone)
            sidecar.terminate()
            await asyncio.to_thread(sidecar.assert_exit, 0)
        up.terminate()
        await asyncio.to_thread(up.assert_exit, 0, 60.0)


def test_a_taken_port_is_explained_before_anything_starts() -> None:
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), penstock("up", "--port", str(port)) as up:
        up.assert_exit(2, 60.0)
    assert f"--port {port}" in up.stderr
    assert "in use" in up.stderr


def test_every_fault_of_the_flags_is_told_at_once() -> None:
    with penstock("up", "--workers", "0", "--no-such-flag", "--llm-backend-endpoints", "x@h:1") as up:
        up.assert_exit(2, 60.0)
    for part in ("--workers", "--no-such-flag", "--llm-backend-endpoints", "prefill"):
        assert part in up.stderr


@pytest.mark.parametrize("service", ["ingress", "scheduler", "discovery", "mirror", "sim", "register"])
def test_every_service_refuses_bad_settings_with_code_2(service: str) -> None:
    with penstock(service, "--no-such-flag") as process:
        process.assert_exit(2, 60.0)
    assert "--no-such-flag: unknown flag" in process.stderr
