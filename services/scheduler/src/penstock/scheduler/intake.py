"""Intake: whether a replica takes requests, from the queue group and by its own id."""

from __future__ import annotations

from collections.abc import Callable

from penstock.common.bus import Bus, Subscription
from penstock.common.messages import ScheduleBatch, ScheduleReply
from penstock.common.subjects import DEFAULT_SHARD, SCHEDULE, SCHEDULE_BY


class Intake:
    """Begun and ended at will, until `close`. What was delivered before an end is still answered."""

    def __init__(
        self, bus: Bus, replica: str, answer: Callable[[ScheduleBatch], ScheduleReply | None]
    ) -> None:
        self._bus, self._replica, self._answer = bus, replica, answer
        self._subscriptions: tuple[Subscription, ...] = ()
        self._closed = False

    def closed(self) -> bool:
        """Whether it was closed for good."""
        return self._closed

    @property
    def open(self) -> bool:
        """Whether requests are taken."""
        return bool(self._subscriptions)

    async def begin(self) -> None:
        """Join the queue group and answer to the replica's id; nothing once closed."""
        if self.closed() or self.open:
            return
        subscriptions = (
            await self._bus.serve(SCHEDULE_BY, self._answer, DEFAULT_SHARD, self._replica),
            await self._bus.serve(SCHEDULE, self._answer, DEFAULT_SHARD),
        )
        self._subscriptions = subscriptions
        if self.closed():
            await self.end()

    async def end(self) -> None:
        """Leave both."""
        subscriptions, self._subscriptions = self._subscriptions, ()
        for subscription in subscriptions:
            await subscription.close()

    async def close(self) -> None:
        """End, for good."""
        self._closed = True
        await self.end()
