"""A stack under load whose processes are killed at random moments; afterwards the log is audited."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from integration.drills import workers
from integration.servers import Process, eventually
from integration.stack import Load, Stack, metric
from penstock.cli.audit.__main__ import verify
from penstock.cli.audit.verifying import Verdict
from penstock.cli.bus_connection import connected
from penstock.common.settings import BusSettings

CLEAN, GAPS, UNREAD = 0, 1, 2


def start(stack: Stack, *flags: str, schedulers: int = 1, workers: int = 1) -> None:
    """An engine, discovery, schedulers and an ingress, with the same flags each."""
    stack.start_sims(1)
    stack.start_discovery(*flags)
    for number in range(1, schedulers + 1):
        stack.start_scheduler("--scheduler-id", f"s{number}", *flags)
    stack.start_ingress("--ingress-id", "i", "--workers", str(workers), *flags)


async def audit(stack: Stack, *flags: str) -> tuple[int, dict[str, Any]]:
    """Exit code and verdict of `penstock audit verify`."""
    command = (
        sys.executable,
        "-m",
        "penstock.cli",
        "audit",
        "verify",
        "--json",
        "--nats-url",
        stack.nats.url,
    )
    with Process([*command, *flags], name="audit") as process:
        await eventually(lambda: process.exit_code is not None, 60)
        assert process.exit_code is not None
        return process.exit_code, json.loads(process.out[0]) if process.out else {"error": process.stderr}


async def all_stored(stack: Stack) -> None:
    """AssertionError while an ingress or a scheduler has events that the stream does not have."""
    ports = [*(ingress.admin_port for ingress in stack.ingresses), *stack.scheduler_ports]
    async with aiohttp.ClientSession() as session:
        for port in ports:
            assert await metric(session, port, "penstock_events_unacknowledged_bytes") == 0


async def settled(stack: Stack) -> Verdict:
    """The verdict once nothing is open any more."""

    async with connected(BusSettings(nats_url=stack.nats.url), "audit") as bus:

        async def told() -> Verdict | None:
            await all_stored(stack)
            verdict = await verify(bus, None, 0.0)
            return verdict if not verdict.open else None

        return await eventually(told)


async def worker_killed(stack: Stack, rng: random.Random) -> None:
    worker = rng.choice(workers(stack.ingresses[0]))
    with contextlib.suppress(psutil.NoSuchProcess):
        worker.send_signal(signal.SIGKILL)


async def ingress_killed(stack: Stack) -> None:
    """The parent too; its workers end by themselves once it is gone, these are killed."""
    ingress = stack.ingresses[0]
    for worker in workers(ingress):
        worker.send_signal(signal.SIGKILL)
    await asyncio.to_thread(ingress.process.kill)


async def scheduler_killed(stack: Stack, rng: random.Random, *flags: str) -> None:
    """One of them, which is started again as the same one."""
    place = rng.randrange(len(stack.schedulers))
    await asyncio.to_thread(stack.schedulers.pop(place).kill)
    stack.scheduler_ports.pop(place)
    name = "s1" if place == 0 else "s2"
    await asyncio.to_thread(partial(stack.start_scheduler, "--scheduler-id", name, *flags))
    if place == 0:
        stack.schedulers.insert(0, stack.schedulers.pop())
        stack.scheduler_ports.insert(0, stack.scheduler_ports.pop())


async def nats_killed(stack: Stack, rng: random.Random, *flags: str) -> None:
    """For a moment; its store stays."""
    await asyncio.to_thread(stack.nats.kill)
    await asyncio.sleep(rng.uniform(0.0, 1.0))
    await asyncio.to_thread(stack.nats.start)


async def discovery_killed(stack: Stack, rng: random.Random, *flags: str) -> None:
    """And started again, under another id: its leases are taken over."""
    assert stack.discovery is not None
    await asyncio.to_thread(stack.discovery.kill)
    await asyncio.to_thread(stack.start_discovery, *flags)


async def drill(
    stack: Stack, seed: int, kinds: tuple[Callable[..., Awaitable[None]], ...], spool: Path | None
) -> Counter[str]:
    """Kill one of each kind in a random order, some requests apart. What was done."""
    rng, done = random.Random(seed), Counter[str]()
    flags = ["--audit-spool", str(spool)] if spool is not None else []
    async with Load([stack.url], clients=8) as load:
        for kind in rng.sample(kinds, len(kinds)):
            await load.answers(rng.randrange(5, 60))
            await (kind(stack, rng) if kind is worker_killed else kind(stack, rng, *flags))
            done[kind.__name__] += 1
        await load.answers(50)
    done["answered"], done["failed"] = load.answered, len(load.failures)
    # A client has one request at a time on the worker that is killed, and may come to it once more.
    assert len(load.failures) <= 16 * done["worker_killed"], load.failures[:5]
    return done


KINDS: tuple[Callable[..., Awaitable[None]], ...] = (
    worker_killed,
    scheduler_killed,
    nats_killed,
    discovery_killed,
)
