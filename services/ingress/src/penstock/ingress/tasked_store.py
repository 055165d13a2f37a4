"""A store of limits whose answers take several steps: each call is a task of its own."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence

from penstock.ingress.limits import Correction, Parts, Verdict
from penstock.ingress.ports import Settled, StoreLost

log = logging.getLogger(__name__)


class TaskedStore(ABC):
    """Fulfils `penstock.ingress.ports.LimitStore` with what `ask` answers."""

    _task: asyncio.Task[None] | None = None

    @abstractmethod
    async def ask(self, claims: Sequence[Parts], corrections: Sequence[Correction]) -> list[Verdict]:
        """As `settle` of the port, in steps. Raises StoreLost."""

    def settle(self, claims: Sequence[Parts], corrections: Sequence[Correction], settled: Settled) -> None:
        """As of the port."""
        self._task = asyncio.create_task(self._settle(claims, corrections, settled), name="limits")

    async def close(self) -> None:
        """As of the port."""
        if self._task is not None:
            self._task.cancel()

    async def _settle(
        self, claims: Sequence[Parts], corrections: Sequence[Correction], settled: Settled
    ) -> None:
        try:
            verdicts: list[Verdict] | StoreLost = await self.ask(claims, corrections)
        except StoreLost as exc:
            verdicts = exc
        except Exception as exc:
            # Who waits for it would wait for ever.
            log.exception("counting failed")
            verdicts = StoreLost(f"a fault of this program: {type(exc).__name__}")
        settled(verdicts)
