"""Fixtures that several files of these tests use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from integration.bus_labs import LABS, Lab
from integration.redis_lab import RedisServer
from integration.stack import Stack, running_stack


@pytest.fixture(params=LABS)
async def lab(request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    """A bus with its faults at hand: each test runs on the memory bus and on NATS."""
    lab = LABS[request.param]()
    try:
        yield lab
    finally:
        await lab.close()


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    """One server for all tests of a file."""
    with RedisServer() as server:
        yield server


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """NATS, one engine and its discovery, for all tests of a file; ingresses are theirs to start."""
    with running_stack() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        yield stack


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that opens a connection for each request, so that they spread over workers."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        yield session
