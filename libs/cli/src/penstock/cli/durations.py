"""Spans of time and moments, as people write them behind a flag."""

from __future__ import annotations

import re
from datetime import UTC, datetime

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])")


def seconds_of(text: str) -> float:
    """`10m` as 600.0. Raises ValueError."""
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError("give a number and its unit, as in 30s, 10m, 2h or 1d")
    return float(match[1]) * _UNITS_S[match[2]]


def moment_of(text: str, now: float) -> float:
    """Unix seconds of `10m` (ago) or of a date and time, UTC unless it says otherwise. Raises ValueError."""
    if _DURATION.fullmatch(text):
        return now - seconds_of(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            "give how long ago, as in 10m, 2h or 1d, or a date as in 2026-01-31T12:00:00Z"
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
