"""Kinds of load on one way, each with the window in which it is seen."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from penstock.cli.bench.clients import Address, ChatClient, Client, StreamClient, Tally, connect
from penstock.cli.bench.window import Slot, Window
from penstock.cli.bench.wire import Requests

POLL_S = 0.02
# At 200 requests a second, stalls of a third of a second fit in before requests queue.
OPEN_LOOP_CONNECTIONS = 64
FAST_CHUNKS = 200
# Streams that are held open: long enough to open a thousand before the first one ends.
HELD_PACE_MS, HELD_CHUNKS = 500, 4

ClientT = TypeVar("ClientT", bound=Client)
# What a client calls when it has its answer.
Finished = Callable[[Any], None]


async def chats(slot: Slot, body_bytes: int, connections: int) -> Window:
    """Every connection asks again as soon as it has its answer."""
    requests = Requests(slot.rng, body_bytes, slot.way.headers)
    return await _closed_loop(
        slot, partial(ChatClient, slot.tally), slot.way.addresses, connections, requests
    )


async def fast_streams(slot: Slot, body_bytes: int, connections: int) -> Window:
    """One stream after the other on every connection, chunks as fast as they go."""
    requests = Requests(slot.rng, body_bytes, slot.way.headers, chunks=FAST_CHUNKS)
    make = partial(_stream_client, slot.tally, FAST_CHUNKS)
    return await _closed_loop(slot, make, slot.way.for_streams, connections, requests)


async def paced_streams(slot: Slot, body_bytes: int, streams: int, pace_ms: int) -> Window:
    """Streams side by side, each with a phase of its own; the window lies within all of them."""
    pace_s = pace_ms / 1000
    chunks = int((pace_s + 2 * slot.warm_s + slot.seconds) / pace_s) + 5
    requests = iter(Requests(slot.rng, body_bytes, slot.way.headers, chunks=chunks, pace_ms=pace_ms))
    loop = asyncio.get_running_loop()
    make = partial(StreamClient, slot.tally, _enough, chunks, timed=True)
    async with _clients(make, slot.way.for_streams, streams) as clients:
        for client in clients:
            client.busy = True
            loop.call_later(slot.rng.random() * pace_s, client.ask, *next(requests))
        await asyncio.sleep(pace_s + slot.warm_s)
        window = await slot.window()
        await _settled(slot, clients)
    return window


async def held_streams(
    slot: Slot, body_bytes: int, streams: int, measure: Callable[[], float], pace_ms: int = HELD_PACE_MS
) -> float:
    """`measure` while this many streams are open, each of which has had its first chunk."""
    requests = iter(Requests(slot.rng, body_bytes, slot.way.headers, chunks=HELD_CHUNKS, pace_ms=pace_ms))
    make = partial(StreamClient, slot.tally, _enough, HELD_CHUNKS)
    async with _clients(make, slot.way.for_streams, streams) as clients:
        for client in clients:
            client.ask(*next(requests))
        await _until(lambda: all(client.received or client.failed for client in clients), slot.patience_s)
        measured = measure()
        if any(not client.busy and not client.failed for client in clients):
            slot.tally.fail(f"some of {streams} streams had ended before the last was open")
        await _settled(slot, clients)
    return measured


async def steady_chats(slot: Slot, body_bytes: int, rate_rps: float) -> Window:
    """Requests are sent when it is their time, with random gaps, whatever became of those before.

    One that finds every connection busy waits for one, and its time counts from when it was due.
    """
    requests = iter(Requests(slot.rng, body_bytes, slot.way.headers))
    idle: list[ChatClient] = []
    waiting: deque[int] = deque()

    def free(client: ChatClient) -> None:
        if waiting:
            client.ask(*next(requests), waiting.popleft())
        else:
            idle.append(client)

    async def send() -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            due += slot.rng.uniform(0, 2) / rate_rps
            await asyncio.sleep(due - loop.time())
            if idle:
                idle.pop().ask(*next(requests))
            else:
                waiting.append(time.monotonic_ns())

    make = partial(ChatClient, slot.tally, free)
    async with _clients(make, slot.way.addresses, OPEN_LOOP_CONNECTIONS) as clients:
        idle += clients
        async with beside(send(), "open-loop"):
            await asyncio.sleep(slot.warm_s)
            window = await slot.window()
        waiting.clear()
        await _settled(slot, clients)
    return window


async def _closed_loop(
    slot: Slot,
    make: Callable[[Finished], Client],
    addresses: Sequence[Address],
    connections: int,
    supply: Requests,
) -> Window:
    requests, running = iter(supply), True

    def again(client: Client) -> None:
        if running:
            client.ask(*next(requests))

    async with _clients(partial(make, again), addresses, connections) as clients:
        for client in clients:
            client.ask(*next(requests))
        await asyncio.sleep(slot.warm_s)
        window = await slot.window()
        running = False
        await _settled(slot, clients)
    return window


def _stream_client(tally: Tally, chunks: int, finished: Finished) -> StreamClient:
    return StreamClient(tally, finished, chunks)


def _enough(client: Client) -> None:
    """One answer is all that is asked for."""


@asynccontextmanager
async def beside(work: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Run `work` until the block ends. Raises what made it end early."""
    task = asyncio.create_task(work, name=name)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
    if not task.cancelled():
        task.result()


@asynccontextmanager
async def _clients(
    make: Callable[[], ClientT], addresses: Sequence[Address], connections: int
) -> AsyncIterator[list[ClientT]]:
    clients = await connect(make, addresses, connections)
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


async def _settled(slot: Slot, clients: Sequence[Client]) -> None:
    """Wait for the answers that are due; one that does not come has failed."""
    await _until(lambda: not any(client.busy for client in clients), slot.patience_s)
    for client in clients:
        if client.busy:
            client.fail(f"no whole answer within {slot.patience_s:g} s")


async def _until(true: Callable[[], bool], limit_s: float) -> None:
    """Return when `true` is, or after `limit_s`."""
    deadline = time.perf_counter() + limit_s
    while not true():
        if time.perf_counter() > deadline:
            return
        await asyncio.sleep(POLL_S)
