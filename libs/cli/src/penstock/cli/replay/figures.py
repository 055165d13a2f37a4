"""Figures of a run, from what became of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WINDOW_S = 30.0
# Placements that a gateway makes in less than this are made without seeing each other's effect.
MIN_LAG_S = 0.001


class Served(msgspec.Struct, frozen=True):
    """Requests that got their answers, one array each, in order of arrival; times in seconds."""

    at_s: Floats
    engine: NDArray[np.intp]
    ttft_s: Floats
    tpot_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    cached_tokens: Floats


class Figures(msgspec.Struct, frozen=True):
    """Times in seconds; rates and shares 0..1.

    `hit_ratio` is cached / all prompt tokens, `expected_hit_ratio` what the scheduler took for cached / all
    (None: it does not say).
    `slo_ratio` is the share of requests within both limits, `goodput_rps` their number a second. `imbalance`
    is the work (computed prompt and output tokens) of the instance with most / the mean, in windows of 30 s.
    """

    requests: int
    refused: int
    hit_ratio: float = 0.0
    expected_hit_ratio: float | None = None
    ttft_mean_s: float = 0.0
    ttft_p50_s: float = 0.0
    ttft_p90_s: float = 0.0
    ttft_p99_s: float = 0.0
    tpot_p50_s: float = 0.0
    tpot_p90_s: float = 0.0
    tpot_p99_s: float = 0.0
    slo_ratio: float = 0.0
    goodput_rps: float = 0.0
    imbalance: float = 0.0


def figures(
    served: Served, instances: int, refused: int, expected_tokens: int | None, slo_s: tuple[float, float]
) -> Figures:
    """`slo_s` is the limit of TTFT and that of TPOT; refused requests are within neither."""
    count = len(served.at_s)
    if not count:
        return Figures(requests=0, refused=refused)
    prompts = float(served.prompt_tokens.sum())
    several = served.tpot_s[served.output_tokens > 1]
    good = int(((served.ttft_s <= slo_s[0]) & (served.tpot_s <= slo_s[1])).sum())
    ends = served.at_s + served.ttft_s + served.tpot_s * np.maximum(served.output_tokens - 1, 0)
    span_s = float(ends.max() - served.at_s.min())
    return Figures(
        count,
        refused,
        float(served.cached_tokens.sum()) / prompts,
        None if expected_tokens is None else expected_tokens / prompts,
        float(served.ttft_s.mean()),
        *_percentiles(served.ttft_s),
        *_percentiles(several),
        good / (count + refused),
        good / span_s if span_s else 0.0,
        imbalance(served, instances),
    )


def together(served: Sequence[Served]) -> Served:
    """Requests of several runs as one."""
    return Served(
        *(np.concatenate([getattr(one, name) for one in served]) for name in Served.__struct_fields__)
    )


def mean(of: Sequence[Figures]) -> Figures:
    """Figure by figure; a figure that some do not have nobody has."""
    return Figures(*(_mean([getattr(one, name) for one in of]) for name in Figures.__struct_fields__))


def _mean(values: Sequence[float | None]) -> Any:
    return None if None in values else float(np.mean([value for value in values if value is not None]))


def _percentiles(values: Floats) -> tuple[float, float, float]:
    p50, p90, p99 = np.percentile(values, (50, 90, 99)) if len(values) else (0.0, 0.0, 0.0)
    return float(p50), float(p90), float(p99)


def imbalance(served: Served, instances: int) -> float:
    """Mean over windows of (most work of an instance / mean of all), each window by its work; 1 is even."""
    windows = (served.at_s // WINDOW_S).astype(np.intp)
    work = np.zeros((int(windows.max()) + 1, instances))
    np.add.at(
        work,
        (windows, served.engine),
        served.prompt_tokens - served.cached_tokens + served.output_tokens,
    )
    return float(work.max(axis=1).sum() / work.mean(axis=1).sum())


def most_at_once(served: Served, lag_s: float) -> float:
    """Requests that the fullest instance got within a lag window, mean of the windows with two or more."""
    windows = (served.at_s / max(lag_s, MIN_LAG_S)).astype(np.int64)
    _, numbers, sizes = np.unique(windows, return_inverse=True, return_counts=True)
    busy = sizes >= 2
    if not busy.any():
        return 0.0
    pairs, counts = np.unique(np.stack([numbers, served.engine]), axis=1, return_counts=True)
    most = np.zeros(len(sizes))
    np.maximum.at(most, pairs[0], counts)
    return float(most[busy].mean())


def herd_factor(served: Served, alone: Served, lag_s: float) -> float | None:
    """Against the same with one replica (DESIGN section 4); None if no two requests came at once."""
    base = most_at_once(alone, lag_s)
    return most_at_once(served, lag_s) / base if base else None


def distribution(values: Sequence[float] | Floats, points: int = 100) -> list[float]:
    """Quantiles at 0, 1/points, ... 1."""
    return [float(one) for one in np.quantile(np.asarray(values), np.linspace(0, 1, points + 1))]
