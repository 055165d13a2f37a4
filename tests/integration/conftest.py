"""Fixtures that several files of these tests use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from integration.bus_labs import LABS, Lab
from integration.redis_lab import RedisServer
from integration.stack import Stack, running_stack

# Files that take long, the longest first: one that began last would end the run with a core to itself.
LONG = (
    "test_failures", "test_overlays", "test_mirror", "test_audit", "test_replicas", "test_up", "test_scaling",
    "test_waiting", "test_outages", "test_settlement", "test_register", "test_audit_contract", "test_streams",
    "test_profiles", "test_admin", "test_top", "test_leaks", "test_limits",
)  # fmt: skip
_TURNS = {f"{name}.py": turn for turn, name in enumerate(LONG)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the order in which they should begin; within a file as they stand."""
    items.sort(key=lambda item: _TURNS.get(item.path.name, len(LONG)))


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
