"""Instances listed in the settings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from penstock.common.model import Instance


class StaticSource:
    """A list that never changes."""

    def __init__(self, name: str, instances: tuple[Instance, ...]) -> None:
        self.name = name
        self._instances = instances

    async def states(self) -> AsyncGenerator[tuple[Instance, ...], None]:
        """The list, then silence."""
        yield self._instances
        await asyncio.Event().wait()
