"""`penstock up` with a bus user for each service: everything works, and nobody is refused anything."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import nats
import psutil
import pytest
from nats.aio.msg import Msg

from integration.servers import Process, eventually
from integration.stack import chat, stream_chat
from integration.test_up import START_TIMEOUT_S, penstock, ready

pytestmark = pytest.mark.integration


async def test_every_service_does_its_work_as_its_own_user_before_and_after_nats_was_killed(
    tmp_path: Path,
) -> None:
    flags = ("--sim", "2", "--port", "0", "--admin-port", "0", "--schedulers", "2", "--workers", "2")
    with penstock("up", *flags, "--log-json", "--data-dir", str(tmp_path)) as up:
        told = await asyncio.to_thread(ready, up)
        url = told["url"].removesuffix("/v1")
        assert stat.S_IMODE((tmp_path / "nats.conf").stat().st_mode) == 0o600
        async with aiohttp.ClientSession() as session:
            await requests_are_placed_by_a_scheduler(session, url)
            (server,) = [c for c in psutil.Process(up.pid).children() if "nats-server" in c.name()]
            server.kill()
            await requests_are_placed_by_a_scheduler(session, url)
        assert await listed(told["nats_url"]) == {
            f"penstock-{service}" for service in ("ingress", "scheduler", "discovery", "mirror")
        }
        await events_can_be_tapped(told["auditor_url"], since="10m")
        await a_further_scheduler_can_join(told["nats_url"])
        await asyncio.to_thread(up.interrupt)
        await asyncio.to_thread(up.assert_exit, 0, 20.0)
    assert_nobody_was_refused_anything(up)
    secrets = {urlsplit(told[name]).password or "" for name in ("nats_url", "auditor_url")}
    printed = [line for line in up.out if any(secret in line for secret in secrets)]
    assert len(printed) == 1, "the addresses are told once, by up itself"


async def requests_are_placed_by_a_scheduler(session: aiohttp.ClientSession, url: str) -> None:
    async def placed() -> bool:
        status, headers, _ = await chat(session, url, "hello")
        assert status == 200
        return "local" != headers["routing-strategy"]  # noqa: SIM300

    for _ in range(5):
        await eventually(placed, START_TIMEOUT_S)
        payloads = [payload async for payload in stream_chat(session, url, "hello")]
        assert payloads[-1] == "[DONE]"


async def listed(url: str) -> set[str]:
    """The directory of services, as a tool with default inboxes asks for it."""
    names: set[str] = set()

    async def note(message: Msg) -> None:
        names.add(json.loads(message.data)["name"])

    client = await nats.connect(url)
    inbox = client.new_inbox()
    await client.subscribe(inbox, cb=note)
    await client.publish("$SRV.PING", reply=inbox)
    await eventually(lambda: len(names) >= 4)
    await client.close()
    return names


async def events_can_be_tapped(url: str, since: str) -> None:
    with penstock("tap", "--nats-url", url, "--since", since, "--json", "--count", "20") as tap:
        await asyncio.to_thread(tap.assert_exit, 0, 20.0)
    kinds = {json.loads(line)["type"] for line in tap.out if line.startswith("{")}
    assert {"penstock.placement.v1", "penstock.outcome.v1", "penstock.instance.v1"} <= kinds


async def a_further_scheduler_can_join(url: str) -> None:
    env = {"PENSTOCK_NATS_URL": url}
    with Process.module(
        "penstock.scheduler", "--admin-port", "0", "--scheduler-id", "a b.*", env=env
    ) as joined:
        await asyncio.to_thread(joined.wait_for_line, "taking requests", 20.0)
        joined.terminate()
        await asyncio.to_thread(joined.assert_exit, 0, 20.0)
    assert_nobody_was_refused_anything(joined)


def assert_nobody_was_refused_anything(process: Process) -> None:
    """Neither the server's log nor any service's knows of a violation."""
    lines = [*process.out, *process.lines]
    assert [line for line in lines if "iolation" in line or "refuses" in line] == []
