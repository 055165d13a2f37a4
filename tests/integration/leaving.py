"""Clients that leave at random moments, of requests that engines fail at random; seeded."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from enum import StrEnum

from integration.stack import MODEL, messages

FAULTS = (
    "429",
    "500",
    "drop-before-headers",
    "garbage",
    "slow-start;ms=30",
    "hang-before-headers",
    "drop-mid-stream;tokens=2",
    "garbage-mid-stream;tokens=2",
    "hang-mid-stream;tokens=2",
)
FAULT_SHARE = 0.4
ANSWER_TIMEOUT_S = 30.0


class Leave(StrEnum):
    """When a client leaves."""

    NEVER = "never"
    IN_THE_BODY = "before all of the body"
    AT_ONCE = "while placing"
    BEFORE_THE_HEAD = "before the head"
    IN_THE_STREAM = "mid-stream"


class Crowd:
    """`clients` at a time, one connection each; `left` counts how the requests ended for them."""

    def __init__(self, port: int, seed: int, clients: int = 48) -> None:
        self._port, self._seed, self._clients = port, seed, clients
        self.left: Counter[str] = Counter()

    async def ask(self, count: int) -> None:
        """So many requests."""
        numbers = iter(range(count))

        async def client() -> None:
            for number in numbers:
                await self._request(random.Random(self._seed * 1_000_003 + number), number)

        async with asyncio.TaskGroup() as group:
            for n in range(self._clients):
                group.create_task(client(), name=f"client {n}")

    async def _request(self, rng: random.Random, number: int) -> None:
        leave = rng.choice(list(Leave))
        head, body = _request_of(rng, number, ends=leave in (Leave.NEVER, Leave.IN_THE_STREAM))
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        with contextlib.suppress(ConnectionError):
            writer.write(head)
            if leave is Leave.IN_THE_BODY:
                writer.write(body[: rng.randrange(len(body))])
            else:
                writer.write(body)
            await writer.drain()
            await self._stay(rng, leave, reader)
        self.left[leave] += 1
        if rng.random() < 0.5:
            writer.transport.abort()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    async def _stay(self, rng: random.Random, leave: Leave, reader: asyncio.StreamReader) -> None:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            match leave:
                case Leave.NEVER:
                    answer = await reader.read(-1)
                    self.left[f"status {answer[9:12].decode()}"] += 1
                case Leave.BEFORE_THE_HEAD:
                    # Somewhere between placing and the first byte: a head comes after 2 to 40 ms.
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(reader.read(1), rng.random() * 0.02)
                case Leave.IN_THE_STREAM:
                    await reader.readuntil(b"\r\n\r\n")
                    with contextlib.suppress(asyncio.IncompleteReadError):
                        await reader.readexactly(rng.randrange(1, 1500))
                case Leave.IN_THE_BODY | Leave.AT_ONCE:
                    pass


def _request_of(rng: random.Random, number: int, *, ends: bool) -> tuple[bytes, bytes]:
    """(head, body) of a chat, streamed or not, with a fault or without; `ends`: and no further request."""
    prompt = f"request {number} of {rng.random()} " + "and more " * rng.randrange(200)
    stream = rng.random() < 0.6
    body = json.dumps(
        {"model": MODEL, "messages": messages(prompt), "max_tokens": rng.randrange(1, 24), "stream": stream}
    ).encode()
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "host: leaving",
        "content-type: application/json",
        f"connection: {'close' if ends else 'keep-alive'}",
        f"content-length: {len(body)}",
    ]
    if rng.random() < FAULT_SHARE:
        lines.append(f"x-sim-fault: {rng.choice(FAULTS)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode(), body
