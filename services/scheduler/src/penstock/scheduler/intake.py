"""Intake: whether a replica takes requests, from the queue group and by its own id."""

from __future__ import annotations

import logging
from collections.abc import Callable

from penstock.common.bus import Bus, Subscription
from penstock.common.messages import ScheduleBatch, ScheduleReply
from penstock.common.subjects import DEFAULT_SHARD, SCHEDULE, SCHEDULE_BY
from penstock.scheduler.telling import Teller

log = logging.getLogger(__name__)


class Intake:
    """Open or not, until `close`. What was delivered before an end is still answered."""

    def __init__(
        self,
        bus: Bus,
        replica: str,
        answer: Callable[[ScheduleBatch], ScheduleReply | None],
        then: Callable[[], None],
        teller: Teller,
    ) -> None:
        """`then` is called once answers have left."""
        self._bus, self._replica, self._answer, self._then = bus, replica, answer, then
        self._teller = teller
        self._subscriptions: tuple[Subscription, ...] = ()
        self._closed = self._lagged = False

    @property
    def open(self) -> bool:
        """Whether requests are taken."""
        return bool(self._subscriptions)

    async def set(self, able: bool, *, lags: bool) -> None:
        """Take requests if this replica is able to and its loop does not lag; nothing once closed."""
        if lags is not self._lagged:
            self._lagged = lags
            text = "the loop lags, requests are left to the siblings" if lags else "the loop keeps up again"
            self._teller.degraded("event loop", lags, "it lags" if lags else "", text)
        if (able and not lags) is self.open or self._closed:
            return
        if self.open:
            await self._end()
        else:
            await self._begin()
            log.info("taking requests")

    async def _begin(self) -> None:
        """Join the queue group and answer to the replica's id."""
        self._subscriptions = (
            await self._bus.serve(SCHEDULE_BY, self._answer, DEFAULT_SHARD, self._replica, then=self._then),
            await self._bus.serve(SCHEDULE, self._answer, DEFAULT_SHARD, then=self._then),
        )
        if self._is_closed():
            await self._end()

    def _is_closed(self) -> bool:
        return self._closed

    async def _end(self) -> None:
        subscriptions, self._subscriptions = self._subscriptions, ()
        for subscription in subscriptions:
            await subscription.close()

    async def close(self) -> None:
        """End, for good."""
        self._closed = True
        await self._end()
