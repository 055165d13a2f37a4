"""What the routing log says of requests: one outcome each, and a placement for each of its decisions."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from integration.servers import eventually
from penstock.common.adapters.nats_bus import NatsBus
from penstock.common.routing_events import OUTCOME, PLACEMENT
from penstock.common.settings import BusSettings
from penstock.common.subjects import EVENTS, event_filter
from penstock.common.telemetry import Metrics

STORED_WITHIN_S = 60.0


@dataclass
class ToldRequests:
    """Outcomes by request id, and the decisions that have a placement."""

    outcomes: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    placed: set[str] = field(default_factory=set)

    def take(self, event: dict[str, Any]) -> None:
        """Note an event of the log."""
        kind, data = event["type"].split(".")[1], event["data"]
        if kind == OUTCOME:
            self.outcomes[data["request_id"]].append(data)
        elif kind == PLACEMENT:
            self.placed.add(data["decision_id"])

    def missing(self, ids: Iterable[str]) -> list[str]:
        """Of these answered requests, in words, what the log does not say or says twice."""
        wrong = []
        for name in ids:
            outcomes = self.outcomes.get(name, [])
            if len(outcomes) != 1:
                wrong.append(f"{name}: {len(outcomes)} outcomes")
                continue
            decisions = outcomes[0].get("decisions", [])
            unplaced = [decision for decision in decisions if decision not in self.placed]
            if not decisions or unplaced:
                wrong.append(f"{name}: decisions {decisions}, without a placement {unplaced}")
        return wrong


async def assert_all_told(url: str, ids: Iterable[str]) -> None:
    """The log, read from its beginning, tells of each answered request once."""
    told, wanted = ToldRequests(), list(ids)
    async with _reading(url, told):

        def complete() -> bool:
            wrong = told.missing(wanted)
            assert not wrong, f"{len(wrong)} of {len(wanted)} requests: {wrong[:5]}"
            return True

        await eventually(complete, STORED_WITHIN_S)


@asynccontextmanager
async def _reading(url: str, told: ToldRequests) -> AsyncIterator[None]:
    bus = NatsBus(BusSettings(nats_url=url), "reader", Metrics())
    await bus.start()
    task = asyncio.create_task(_read(bus, told), name="reading")
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await bus.close()


async def _read(bus: NatsBus, told: ToldRequests) -> None:
    async for stored in bus.follow(EVENTS, event_filter(), 86_400.0):
        events = json.loads(stored.payload)
        for event in events if isinstance(events, list) else [events]:
            told.take(event)
