"""Fixtures of the ingress's tests, on the loop it has in production."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
import uvloop

from .ingress_lab import HOST, Engine, Lab


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


LabOf = Callable[..., Awaitable[Lab]]


@pytest.fixture
async def lab_of() -> AsyncIterator[LabOf]:
    """Makes an ingress with settings of one's own."""
    async with AsyncExitStack() as stack:

        async def make(**settings: Any) -> Lab:
            lab = await Lab(**settings).start()
            stack.push_async_callback(lab.close)
            return lab

        yield make


@pytest.fixture
async def lab(lab_of: LabOf) -> Lab:
    """An ingress with the default settings."""
    return await lab_of()


@pytest.fixture
async def engine(lab: Lab) -> Engine:
    """Its one engine."""
    return await lab.engine()


@pytest.fixture
async def deaf_port() -> AsyncIterator[int]:
    """A port where connections are neither accepted nor refused: the listener's queue is full."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]
        for filler in fillers:
            filler.close()
