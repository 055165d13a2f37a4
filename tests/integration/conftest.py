"""Fixtures that several files of these tests use."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from integration.bus_labs import LABS, Lab


@pytest.fixture(params=LABS)
async def lab(request: pytest.FixtureRequest) -> AsyncIterator[Lab]:
    """A bus with its faults at hand: each test runs on the memory bus and on NATS."""
    lab = LABS[request.param]()
    try:
        yield lab
    finally:
        await lab.close()
