"""A stack under attack: well before, and well again afterwards."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

from integration.bus_users import StackOfUsers
from integration.hostile import Attacker, attacker
from integration.servers import Process, eventually
from integration.stack import MODEL, chat, messages, metric, stream_chat
from penstock.common.permissions import JOIN
from penstock.sim.text import expected_text

# What hostile messages may add to a log, however many they are.
MAX_LINES = 200


@asynccontextmanager
async def attack(stack: StackOfUsers, user: str = JOIN) -> AsyncIterator[Attacker]:
    """The stack is well before, and has to be afterwards."""
    await stack.ready()
    async with aiohttp.ClientSession() as session:
        connected = await connections(session, stack)
        lines = [len(process.lines) for process in processes(stack)]
        async with attacker(stack.users, user) as hostile:
            yield hostile
        await assert_well(session, stack)
        assert await connections(session, stack) == connected
        for process, before in zip(processes(stack), lines, strict=True):
            assert len(process.lines) - before < MAX_LINES, process.lines[-20:]


async def assert_well(session: aiohttp.ClientSession, stack: StackOfUsers) -> None:
    """Everybody is ready, answers are right, nothing is held, no fault of ours was met."""
    await stack.ready()
    for number in range(10):
        prompt = f"after the attack {number}"
        status, _, body = await chat(session, stack.url, prompt)
        text = expected_text(messages(prompt), model=MODEL, max_tokens=8)
        assert (status, body["choices"][0]["message"]["content"]) == (200, text)
        payloads = [payload async for payload in stream_chat(session, stack.url, prompt)]
        assert payloads[-1] == "[DONE]"
    await nothing_in_flight(session, stack)
    for process in processes(stack):
        assert process.exit_code is None
        assert not [line for line in process.lines if "Traceback" in line or "handler" in line]
    for port in admin_ports(stack):
        assert (await dropped(session, port)).get(("any", "handler failed"), 0) == 0
    (ingress,) = stack.ingresses
    assert await metric(session, ingress.admin_port, "penstock_ingress_worker_restarts_total") == 0


async def nothing_in_flight(session: aiohttp.ClientSession, stack: StackOfUsers) -> None:
    async def empty() -> bool:
        counts = [await metric(session, i.admin_port, "penstock_ingress_in_flight") for i in stack.ingresses]
        for port in stack.scheduler_ports:
            counts.append(await metric(session, port, "penstock_scheduler_in_flight_requests"))
        return not any(counts)

    await eventually(empty)


def processes(stack: StackOfUsers) -> list[Process]:
    assert stack.discovery is not None
    return [*stack.schedulers, stack.discovery, *(ingress.process for ingress in stack.ingresses)]


def admin_ports(stack: StackOfUsers) -> list[int]:
    return [*stack.scheduler_ports, *(ingress.admin_port for ingress in stack.ingresses)]


async def connections(session: aiohttp.ClientSession, stack: StackOfUsers) -> list[float]:
    """How often each process has connected to the bus."""
    return [await metric(session, port, "penstock_bus_connections_total") for port in admin_ports(stack)]


async def dropped(session: aiohttp.ClientSession, port: int) -> Counter[tuple[str, str]]:
    """Messages dropped, by subject and reason."""
    async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
        text = await response.text()
    samples = re.findall(r"^penstock_bus_dropped_total\{(.*)\} (\S+)$", text, re.MULTILINE)
    found: Counter[tuple[str, str]] = Counter()
    for labels, count in samples:
        named = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[named["subject"], named["reason"]] += int(float(count))
    return found


async def response_head(url: str) -> bytes:
    """What comes back on the wire before the body."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": MODEL, "messages": messages("hello"), "max_tokens": 1}).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n")
    writer.write(b"content-length: %d\r\n\r\n" % len(body) + body)
    head, _, _ = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return head
