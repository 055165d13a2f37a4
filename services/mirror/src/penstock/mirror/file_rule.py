"""When the content of the mirror's file becomes the live configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penstock.common.live_config import Document

ORIGIN = "file"


@dataclass
class FileRule:
    """What one replica's file says, and whether that is newer than what everybody goes by.

    Of several replicas' files the one that was changed last counts, and not the one that is looked at last:
    a replica that has seen its file change writes what it says once; one that starts, only what was put into
    its file after the live configuration was written.
    """

    value: Any = None
    modified_at: str = ""
    _known: bool = False
    _changed: bool = False
    _starting: bool = True

    def read(self, value: Any, modified_at: str) -> None:
        """The file holds `value`, put there at `modified_at` (ISO 8601)."""
        self._changed = self._changed or (self._known and value != self.value)
        self.value, self.modified_at, self._known = value, modified_at, True

    def due(self, held: Document | None) -> bool:
        """Whether the file's value is to be written over `held`."""
        if not self._known:
            return False
        if held is None:
            return True
        if self._starting:
            # Once: a clock that is ahead must not make this file the newest for good.
            self._starting = False
            self._changed = self._changed or self.modified_at > held.changed_at
        if held.value == self.value:
            self._changed = False
            return False
        # Whatever did not come from a file stays until it is deleted.
        return held.origin == ORIGIN and self._changed

    def written(self) -> None:
        """Everybody goes by the file's value."""
        self._changed = False
