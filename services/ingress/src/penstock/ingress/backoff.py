"""How long to wait before another attempt."""

from __future__ import annotations

import re
from datetime import datetime
from email.utils import parsedate_to_datetime

from penstock.ingress.routes import header_of

# Between attempts at instances, as the reference gateway has it.
RETRY_FIRST_S, RETRY_MOST_S = 0.01, 0.1
_SECONDS = re.compile(rb"[0-9]{1,9}")
MAX_DATE = 64


def delay_s(attempt: int, first_s: float, most_s: float, draw: float) -> float:
    """Wait after attempt number `attempt` (0: the first) failed: doubling from `first_s` up to `most_s`, of
    which `draw` in [0, 1) takes up to a half away: those who failed together do not come together."""
    return float(min(first_s * 2 ** min(attempt, 32), most_s) * (1 - draw / 2))


def retry_after_s(block: bytes, now: datetime) -> float:
    """What a response's header lines ask to wait (RFC 9110 10.2.3), in seconds or as a date; 0 if nothing."""
    value = header_of(block, b"retry-after")
    if not value or len(value) > MAX_DATE:
        return 0.0
    if _SECONDS.fullmatch(value):
        return float(value)
    try:
        moment = parsedate_to_datetime(value.decode("ascii"))
        return max(0.0, (moment - now).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0
