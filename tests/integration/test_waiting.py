"""Requests beyond what the engines take wait in their ingress, through every kind of trouble."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from integration.servers import eventually
from integration.stack import Stack, chat, metric, running_stack

pytestmark = pytest.mark.integration

WAITING = "penstock_ingress_waiting"
LIMIT, SHORT = "2", 4
# Tokens that nobody waits for: what holds a slot leaves when told to. Two of them fit in the KV cache.
ENDLESS = 30_000


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        stack.start_scheduler("--max-requests-per-instance", LIMIT)
        yield stack


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
        yield session


class Crowd:
    """Requests that go out one after the other, and the order in which they are answered."""

    def __init__(self, stack: Stack, session: aiohttp.ClientSession) -> None:
        self._stack, self._session = stack, session
        self.ends: list[tuple[str, int]] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.holding: list[asyncio.Task[None]] = []

    async def add(self, name: str, tokens: int = SHORT, *, waits: int = 0, **headers: str) -> None:
        """Send one; `waits`: return once so many wait."""
        sent = {key.replace("_", "-"): value for key, value in headers.items()}

        async def ask() -> None:
            status, _, _ = await chat(self._session, self._stack.url, name, max_tokens=tokens, headers=sent)
            self.ends.append((name, status))

        self.tasks.append(asyncio.create_task(ask(), name=name))
        if waits:
            await eventually(lambda: self.waiting(waits))

    async def fill(self) -> None:
        """Occupy the engine's slots, once nothing else does."""
        await eventually(self.idle)
        for number in range(int(LIMIT)):
            await self.add(f"long {number}", ENDLESS)
        self.holding, self.tasks = self.tasks, []
        await eventually(self.full)

    def release(self, count: int) -> None:
        """Free slots that were occupied."""
        for _ in range(count):
            self.holding.pop().cancel()

    async def idle(self) -> bool:
        name = "penstock_scheduler_in_flight_requests"
        ports = self._stack.scheduler_ports if self._stack.schedulers else []
        return not any([await metric(self._session, port, name) for port in ports])

    async def full(self) -> bool:
        port = self._stack.ingresses[0].admin_port
        return await metric(self._session, port, "penstock_ingress_in_flight") == int(LIMIT)

    async def waiting(self, count: int) -> bool:
        port = self._stack.ingresses[0].admin_port
        return await metric(self._session, port, WAITING) == count

    async def done(self) -> list[tuple[str, int]]:
        await asyncio.gather(*self.tasks)
        await eventually(lambda: self.waiting(0))
        return self.ends


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_fifty_requests_for_two_slots_are_all_answered(
    stack: Stack, session: aiohttp.ClientSession, workers: str
) -> None:
    stack.start_ingress("--workers", workers)
    await stack.ready()
    crowd = Crowd(stack, session)
    for number in range(50):
        await crowd.add(str(number), user=f"u{number % 3}", x_priority=str(number % 2))
    assert {status for _, status in await crowd.done()} == {200}
    assert len(crowd.ends) == 50


async def test_order_bounds_and_leaving(stack: Stack, session: aiohttp.ClientSession) -> None:
    stack.start_ingress("--waiting-limit", "5")
    await stack.ready()
    crowd = Crowd(stack, session)
    # One slot is taken for good, so that the others end in the order in which they began.
    await crowd.fill()
    asked = (("a1", "a", "0"), ("a2", "a", "0"), ("b1", "b", "0"), ("low", "b", "-9"), ("high", "a", "9"))
    for count, (name, user, priority) in enumerate(asked, 1):
        await crowd.add(name, SHORT, waits=count, user=user, x_priority=priority)
    body = {"model": "sim-model", "messages": [{"role": "user", "content": "x"}]}
    url = f"{stack.url}/v1/chat/completions"
    async with session.post(url, json=body, headers={"x-priority": "-9"}) as refused:
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert (await refused.json())["error"]["code"] == "overloaded"
    low = next(task for task in crowd.tasks if task.get_name() == "low")
    crowd.tasks.remove(low)
    low.cancel()
    await eventually(lambda: crowd.waiting(4))
    crowd.release(1)
    assert await crowd.done() == [(name, 200) for name in ("high", "a1", "b1", "a2")]
    crowd.release(1)


async def test_who_waits_too_long_is_sent_away(stack: Stack, session: aiohttp.ClientSession) -> None:
    stack.start_ingress("--waiting-timeout", "0.3")
    await stack.ready()
    crowd = Crowd(stack, session)
    await crowd.fill()
    await crowd.add("late")
    assert await crowd.done() == [("late", 503)]
    crowd.release(2)


async def test_a_killed_scheduler_and_then_a_killed_engine_strand_nobody(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    stack.start_ingress("--max-requests-per-instance", LIMIT)
    await stack.ready()
    crowd = Crowd(stack, session)
    await crowd.fill()
    for count in range(1, 5):
        await crowd.add(f"w{count}", waits=count)
    await asyncio.to_thread(stack.schedulers.pop().kill)
    crowd.release(2)
    assert {status for _, status in await crowd.done()} == {200}
    second = Crowd(stack, session)
    await second.fill()
    for count in range(1, 4):
        await second.add(f"x{count}", waits=count)
    await asyncio.to_thread(stack.sims[0].kill)
    assert {status for _, status in await second.done()} <= {502, 503}
    await asyncio.gather(*second.holding)


async def test_a_drain_serves_those_who_wait(stack: Stack, session: aiohttp.ClientSession) -> None:
    ingress = stack.start_ingress()
    await stack.ready()
    crowd = Crowd(stack, session)
    await crowd.fill()
    for count in range(1, 4):
        await crowd.add(f"w{count}", waits=count)
    ingress.process.terminate()
    crowd.release(2)
    await asyncio.gather(*crowd.tasks)
    assert {status for _, status in crowd.ends} == {200}
    ingress.process.assert_exit(0)
