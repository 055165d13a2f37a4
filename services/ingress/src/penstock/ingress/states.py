"""Where a request is between its first byte and its end."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Where a request is."""

    PLACING = "placing"
    ATTEMPTING = "attempting"
    # Before a retry.
    PAUSING = "pausing"
    # After a fallback's 429.
    QUEUED = "queued"
    RELAYING = "relaying"
    DONE = "done"
