"""A moment on both clocks that records are judged by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Moment:
    """`now_s` of the monotonic clock, `wall_s` since 1970: only timestamps are compared with it."""

    now_s: float
    wall_s: float
