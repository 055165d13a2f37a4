"""The benchmark of disaggregation: that pairs are what it runs, and nothing is kept at its end."""

from __future__ import annotations

import pytest
from pd_bench.__main__ import EXCERPT
from pd_bench.virtual import Fleet, run

from penstock.cli.replay.figures import Figures
from penstock.cli.replay.settings import ReplaySettings
from penstock.cli.replay.trace import read


def figures(fleet: Fleet) -> Figures:
    settings = ReplaySettings(trace=EXCERPT)
    return run(settings, fleet, read(EXCERPT, settings.block_size, 80), 1.0)


@pytest.mark.parametrize("staged", [False, True])
def test_decode_beside_no_prompts_is_steadier(staged: bool) -> None:
    pairs, neutral = figures(Fleet(prefill=4, decode=4, staged=staged)), figures(Fleet(neutral=8))
    assert (pairs.requests, pairs.refused) == (neutral.requests, neutral.refused) == (80, 0)
    assert pairs.tpot_p99_s < neutral.tpot_p99_s / 2
    # Prompts have half of the engines, and travel.
    assert pairs.ttft_p50_s > neutral.ttft_p50_s
