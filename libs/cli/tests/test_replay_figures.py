"""Figures of a replay, from values."""

from typing import Any

import numpy as np
import pytest

from penstock.cli.replay.figures import Served, figures, herd_factor, imbalance, most_at_once

approx: Any = pytest.approx


def served(*requests: tuple[float, int, float, float, int, int, int]) -> Served:
    """(at s, engine, TTFT s, TPOT s, prompt, output, cached tokens) of each."""
    at_s, engine, ttft_s, tpot_s, *tokens = (np.array(column) for column in zip(*requests, strict=True))
    return Served(at_s, engine, ttft_s, tpot_s, *[column.astype(float) for column in tokens])


def placed(*at: tuple[float, int]) -> Served:
    return served(*[(at_s, engine, 1.0, 0.1, 100, 10, 0) for at_s, engine in at])


def test_figures_of_three_requests() -> None:
    three = served(
        (0.0, 0, 1.0, 0.10, 100, 11, 50), (1.0, 1, 3.0, 0.30, 100, 11, 0), (2.0, 0, 2.0, 0.0, 200, 1, 50)
    )
    found = figures(three, 2, refused=1, expected_tokens=200, slo_s=(2.5, 0.2))
    assert (found.requests, found.refused) == (3, 1)
    assert found.hit_ratio == approx(0.25)
    assert found.expected_hit_ratio == approx(0.5)
    assert (found.ttft_mean_s, found.ttft_p50_s) == (approx(2.0), approx(2.0))
    # The answer of one token has no time per further token.
    assert found.tpot_p50_s == approx(0.2)
    # The second breaks both limits, the refused one is within none; the last answer ends at 1 + 3 + 3 s.
    assert found.slo_ratio == approx(0.5)
    assert found.goodput_rps == approx(2 / 7)


def test_nothing_served_is_no_division_by_zero() -> None:
    nobody = Served(*[np.array([])] * 7)
    assert figures(nobody, 2, refused=4, expected_tokens=0, slo_s=(1.0, 1.0)).refused == 4


def test_imbalance_is_the_most_over_the_mean_of_each_window() -> None:
    assert imbalance(placed((0.0, 0), (1.0, 1)), 2) == approx(1.0)
    assert imbalance(placed((0.0, 0), (1.0, 0)), 2) == approx(2.0)
    # Even over all time, but not within the two windows of 30 s.
    assert imbalance(placed((0.0, 0), (40.0, 1)), 2) == approx(2.0)


def test_cached_tokens_are_no_work() -> None:
    cached = served((0.0, 0, 1.0, 0.1, 100, 0, 90), (0.0, 1, 1.0, 0.1, 10, 0, 0))
    assert imbalance(cached, 2) == approx(1.0)


def test_the_most_at_once_is_counted_within_lag_windows_that_hold_several() -> None:
    spread = placed((0.0, 0), (0.001, 1), (0.002, 2), (5.0, 0))
    herd = placed((0.0, 0), (0.001, 0), (0.002, 0), (5.0, 0))
    assert most_at_once(spread, 0.005) == 1.0
    assert most_at_once(herd, 0.005) == 3.0
    assert herd_factor(herd, spread, 0.005) == approx(3.0)
    assert herd_factor(herd, placed((0.0, 0)), 0.005) is None
