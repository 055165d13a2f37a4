"""What the bus port promises about numbers that are added to, asked of both adapters."""

from __future__ import annotations

import asyncio
import time

import pytest

from integration.bus_labs import Lab
from penstock.common.errors import BusError
from penstock.common.subjects import Counters

pytestmark = pytest.mark.integration

COUNTERS = Counters("CONTRACT_COUNTERS", "contract.counters", 1024 * 1024, 60)


async def test_everybody_adds_to_the_same_numbers(lab: Lab) -> None:
    one, other = (await lab.member("one")).bus, (await lab.member("other")).bus
    assert abs(await one.ensure_counters(COUNTERS) - time.time()) < 5
    await other.ensure_counters(COUNTERS)
    sums = [await bus.add(COUNTERS, [("a.1", delta)]) for bus, delta in ((one, 5), (other, 3), (one, -6))]
    assert sums == [[5], [8], [2]]
    assert await other.add(COUNTERS, [("a.2", -4), ("a.1", 1), ("a.2", -1)]) == [-4, 3, -5]
    assert await one.add(COUNTERS, [("a.2", 10**15)]) == [10**15 - 5]
    assert await one.add(COUNTERS, []) == []
    some = await asyncio.gather(
        *(bus.add(COUNTERS, [("b", 1)] * 5) for _ in range(10) for bus in (one, other))
    )
    assert sorted(total for added in some for total in added) == list(range(1, 101))


async def test_without_counters_or_server_nothing_is_known_to_be_added(lab: Lab) -> None:
    bus = (await lab.member()).bus
    with pytest.raises(BusError):
        await bus.add(COUNTERS, [("a", 1)])
    await bus.ensure_counters(COUNTERS)
    assert await bus.add(COUNTERS, [("a", 1)]) == [1]
    await lab.down()
    with pytest.raises(BusError):
        await bus.add(COUNTERS, [("a", 1)])
    with pytest.raises(BusError):
        await bus.ensure_counters(COUNTERS)
    await lab.up(keep_store=False)
    await bus.ensure_counters(COUNTERS)
    assert await bus.add(COUNTERS, [("a", 1)]) == [1]
