"""`POST /admin/discover`: discovery lists every source again, and says what that changed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from pydantic import BaseModel

from penstock.common.bus import Bus
from penstock.common.messages import DiscoverReply, DiscoverRequest
from penstock.common.subjects import DISCOVER
from penstock.ingress.admin.operations import Answer, Call, Operation

ANSWER_WITHIN_S = 2.0
# Discovery gives its sources 5 s; who asked is not kept much longer.
ASK_EVERY_S, ASK_AT_MOST = 0.1, 70


class DiscoveredOut(BaseModel):
    """What was found: `discovered` instances in all, of which these were added or removed by listing again
    (256 names of each at most); `errors` name sources that could not be read."""

    discovered: int
    added: list[str]
    removed: list[str]
    unchanged: int
    errors: list[str]


class Discovering:
    """The operation, over the bus."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    def operations(self) -> Iterator[Operation]:
        """What can be asked."""
        yield Operation(
            "POST",
            "/admin/discover",
            "List every source of instances again, now",
            self._discover,
            {200: DiscoveredOut},
        )

    async def _discover(self, call: Call) -> Answer:
        reply = await self._ask(DiscoverRequest())
        for _ in range(ASK_AT_MOST):
            if reply.done:
                break
            await asyncio.sleep(ASK_EVERY_S)
            reply = await self._ask(DiscoverRequest(reply.ticket, reply.replica))
        errors = list(reply.errors) if reply.done else ["discovery has not listed everything again yet"]
        found = DiscoveredOut(
            discovered=reply.discovered,
            added=list(reply.added),
            removed=list(reply.removed),
            unchanged=reply.unchanged,
            errors=errors,
        )
        return Answer(200, found)

    async def _ask(self, request: DiscoverRequest) -> DiscoverReply:
        return await self._bus.request(DISCOVER, request, deadline_s=ANSWER_WITHIN_S)
