"""What the sidecar needs from outside."""

from __future__ import annotations

from typing import Protocol

from penstock.common.model import Endpoint
from penstock.discovery.reconcile import Verdict


class StoreError(Exception):
    """The store did not do what was asked; the text says why, to a person, and holds no secret."""


class Store(Protocol):
    """Where the registration stands: one key, which ends by itself when it is not written again."""

    async def open(self) -> None:
        """Begin to connect; returns within a second or so, whether the store answers or not."""

    async def write(self, value: bytes) -> None:
        """Write the record, or write it again. Raises StoreError."""

    async def withdraw(self) -> None:
        """Remove the record, whether it is there or not. Raises StoreError."""

    async def close(self) -> None:
        """Give connections back."""


class Prober(Protocol):
    """Asks engines how they are. Neither call raises, whatever an engine does."""

    async def check(self, endpoint: Endpoint) -> Verdict:
        """Whether the engine is healthy and which models it serves, within the probe timeout."""

    async def read(self, endpoint: Endpoint, path: str) -> bytes | None:
        """The body of a GET, bounded, within the probe timeout; None if it fails."""
