"""One task for each target of a changing set."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Generic, TypeVar

from penstock.common.model import InstanceId

T = TypeVar("T")

Follow = Callable[[InstanceId, T], Coroutine[Any, Any, None]]


class Followers(Generic[T]):
    """Follows exactly the wanted targets, one of each instance. A target that differs is another one."""

    def __init__(self, follow: Follow[T], name: str) -> None:
        """`follow` runs until it is cancelled; `name` stands before the instance in the name of its task."""
        self._follow, self._name = follow, name
        self._wanted: dict[InstanceId, T] = {}
        self._tasks: dict[tuple[InstanceId, T], asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    def __len__(self) -> int:
        return len(self._tasks)

    def keep(self, wanted: Mapping[InstanceId, T]) -> None:
        """Follow exactly these from here on."""
        if wanted != self._wanted:
            self._wanted = dict(wanted)
            self._changed.set()

    async def run(self) -> None:
        """Start and end the tasks; until cancelled. What one raises ends all."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._changed.wait()
                self._changed.clear()
                wanted = self._wanted.items()
                for target in self._tasks.keys() - wanted:
                    self._tasks.pop(target).cancel()
                for target in wanted - self._tasks.keys():
                    name = f"{self._name} {target[0]}"
                    self._tasks[target] = group.create_task(self._follow(*target), name=name)
