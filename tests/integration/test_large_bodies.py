"""Large bodies through a real ingress: its helper killed and frozen, its worker killed, many at once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import aiohttp
import psutil
import pytest
import pytest_asyncio

from integration.raw_http import MODEL, HostileEngine
from integration.servers import eventually
from integration.stack import Ingress, Stack, metric, running_stack

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]

_numbers = itertools.count()
SMALL = b'{"model":"%b","messages":[{"role":"user","content":"hi"}]}' % MODEL


def hostile(size: int) -> bytes:
    """A valid body of about `size` bytes, as hostile as it gets for that."""
    return b'{"model":"%b","messages":[%b0]}' % (MODEL, b"[[[[]]]]," * (size // 9 - 20))


LARGE = hostile(4 * 1024 * 1024)
# Fifty of these are half a second of work for the helper, of the ten that a body may wait.
MEDIUM = hostile(1024 * 1024)
DEEP = b'{"model":"%b","messages":%b' % (MODEL, b"[" * 1_000_000)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack() -> AsyncIterator[Stack]:
    engine = HostileEngine({})
    with running_stack() as stack:
        stack.engines.append(await engine.start())
        stack.start_discovery()
        stack.start_ingress()
        await stack.ready()
        yield stack
        async with aiohttp.ClientSession() as session:

            async def idle() -> bool:
                port = stack.ingresses[0].admin_port
                names = ("exchanges", "in_flight", "large_bodies_waiting")
                return not any([await metric(session, port, f"penstock_ingress_{name}") for name in names])

            await eventually(idle)
        assert "Traceback" not in stack.ingresses[0].process.stderr
        await engine.close()
        assert not engine.faults


@pytest_asyncio.fixture(loop_scope="module")
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(30)) as session:
        yield session


async def ask(session: aiohttp.ClientSession, ingress: Ingress, body: bytes) -> int:
    """The status of one chat, whose answer is its own."""
    nonce = str(next(_numbers))
    url = f"{ingress.url}/v1/chat/completions"
    async with session.post(url, data=body, headers={"x-nonce": nonce}) as response:
        answer = await response.json()
        assert response.status != 200 or answer == {"nonce": nonce}
        return response.status


def helpers(ingress: Ingress) -> list[psutil.Process]:
    """The helpers of its workers."""
    return [p for p in psutil.Process(ingress.process.pid).children(recursive=True) if is_helper(p)]


def is_helper(process: psutil.Process) -> bool:
    try:
        return "penstock.ingress.body_reader" in process.cmdline()
    except psutil.Error:
        return False


def gone(process: psutil.Process) -> bool:
    """Ended; who reaps it is not the ingress's business once its worker was killed."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def started(session: aiohttp.ClientSession, ingress: Ingress) -> psutil.Process:
    """The helper, which a first large body starts."""
    assert await ask(session, ingress, LARGE) == 200
    (helper,) = helpers(ingress)
    return helper


async def serves_again(session: aiohttp.ClientSession, ingress: Ingress) -> bool:
    """Whether a killed worker's successor takes requests."""
    try:
        return await ask(session, ingress, SMALL) == 200
    except aiohttp.ClientError:
        return False


async def test_fifty_large_bodies_at_once_are_answered_and_small_ones_between_them(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    ingress = stack.ingresses[0]
    helper = await started(session, ingress)
    async with asyncio.TaskGroup() as tasks:
        large = [tasks.create_task(ask(session, ingress, MEDIUM)) for _ in range(50)]
        served = [await ask(session, ingress, SMALL) for _ in range(20)]
        waited = [task.done() for task in large]
    assert served == [200] * 20
    assert not all(waited)
    assert [task.result() for task in large] == [200] * 50
    assert [process.pid for process in helpers(ingress)] == [helper.pid]
    # What the bodies took is given back: the largest was 4 MiB, and a helper without any has 15 MB.
    await eventually(lambda: helper.memory_info().rss < 24e6)


async def test_a_helper_killed_again_and_again_costs_no_small_request_and_large_ones_a_503_at_most(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    ingress = stack.ingresses[0]
    await started(session, ingress)
    async with asyncio.TaskGroup() as tasks:
        large = [tasks.create_task(ask(session, ingress, LARGE)) for _ in range(6)]
        killed: set[int] = set()

        def kill_three() -> bool:
            for helper in helpers(ingress):
                if helper.pid not in killed:
                    killed.add(helper.pid)
                    helper.kill()
            return len(killed) == 3

        await eventually(kill_three)
        assert await ask(session, ingress, SMALL) == 200
    statuses = [task.result() for task in large]
    assert set(statuses) <= {200, 503}
    assert statuses.count(503) <= 1
    assert await ask(session, ingress, LARGE) == 200


async def test_a_frozen_helper_holds_up_large_bodies_alone_and_is_replaced(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    ingress = stack.ingresses[0]
    helper = await started(session, ingress)
    helper.suspend()
    async with asyncio.TaskGroup() as tasks:
        large = tasks.create_task(ask(session, ingress, DEEP))
        for _ in range(20):
            assert await ask(session, ingress, SMALL) == 200
        assert not large.done()
    assert large.result() == 400
    assert gone(helper)


@pytest.mark.parametrize("frozen", [False, True], ids=["running", "frozen"])
async def test_a_helper_ends_with_its_worker(
    stack: Stack, session: aiohttp.ClientSession, frozen: bool
) -> None:
    ingress = stack.ingresses[0]
    helper = await started(session, ingress)
    worker = helper.parent()
    assert worker is not None
    if frozen:
        helper.suspend()
    worker.kill()
    await eventually(lambda: gone(helper))
    await eventually(lambda: serves_again(session, ingress))


async def test_the_helper_has_none_of_its_workers_sockets(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    helper = await started(session, stack.ingresses[0])
    assert helper.net_connections("inet") == []
    # Standard streams alone; the first is the pair to the worker.
    assert helper.num_fds() == 3


async def test_a_signal_to_the_whole_group_lets_the_drain_have_its_helper_and_leaves_nothing(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    ingress = stack.start_ingress()
    await stack.ready()
    helper = await started(session, ingress)
    helper.terminate()
    assert await ask(session, ingress, LARGE) == 200
    assert [process.pid for process in helpers(ingress)] == [helper.pid]
    tree = psutil.Process(ingress.process.pid).children(recursive=True)
    ingress.process.terminate()
    assert await asyncio.to_thread(ingress.process.wait) == 0
    stack.ingresses.remove(ingress)
    await eventually(lambda: not any(process.is_running() for process in tree))
