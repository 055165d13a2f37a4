"""What discovery needs from outside besides the bus."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from penstock.common.model import Endpoint, EngineLoad, Instance
from penstock.discovery.reconcile import Verdict


class Source(Protocol):
    """One way of finding instances."""

    @property
    def name(self) -> str:
        """Names the source in records, markers and its lease; the same in every replica."""

    def states(self) -> AsyncGenerator[tuple[Instance, ...], None]:
        """Everything the source lists, at once and again after every change; never ends.

        A state is complete: what it does not name is gone. A source that cannot be read yields nothing,
        so that the last known instances stay.
        """


class Prober(Protocol):
    """Asks engines how they are. Neither call raises, whatever an engine does."""

    async def check(self, endpoint: Endpoint) -> Verdict:
        """Whether the engine is healthy and which models it serves, within the probe timeout."""

    async def read_load(self, endpoint: Endpoint) -> EngineLoad | None:
        """What the engine reports of its load, within the probe timeout; None if it says nothing."""
