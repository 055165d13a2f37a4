"""What the mirror needs from outside."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from penstock.common.routing_events import ResponseFigures
from penstock.mirror.shadow_request import ShadowRequest


class ShadowFailed(Exception):
    """No response: `reason` is a word of a closed set, `detail` is for the log."""

    def __init__(self, reason: str, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}")


class Shadow(Protocol):
    """Where copies go."""

    async def send(self, request: ShadowRequest, timeout_s: float) -> ResponseFigures:
        """Send a copy and read its response to the end; nothing of it is kept but its figures.

        Raises:
            TimeoutError: not over after `timeout_s`.
            ShadowFailed: no connection, or what came is no response.
        """


class Said(NamedTuple):
    """What the file says, a valid configuration in plain JSON types, and since when (ISO 8601)."""

    value: object
    modified_at: str


class FileMissing(Exception):
    """There is no configuration file."""


class FileUnusable(Exception):
    """It is no configuration; the text says why, without secrets."""


class ConfigFile(Protocol):
    """The file that says what is copied where."""

    name: str

    async def look(self, *, again: bool) -> Said | None:
        """What it says, if that may have changed since it was told, or is to be told `again`.

        Raises:
            FileMissing, FileUnusable: it says nothing.
        """
