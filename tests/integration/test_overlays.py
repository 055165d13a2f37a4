"""The overlays' own scenarios, against the overlays' own objects as processes.

Each takes some ten seconds: it starts a bus, four services and the overlay's engines.
"""

from __future__ import annotations

import asyncio
import shutil
from collections import Counter
from pathlib import Path

import pytest

from integration.overlay_lab import OverlayLab, running_overlay, scenarios

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not shutil.which("kubectl"), reason="needs kubectl: apt-get install kubernetes-client"
    ),
]

scenario = scenarios()


async def run(name: str, lab: OverlayLab) -> Counter[str]:
    """A scenario as its script runs it; raises scenario.Failed."""
    url = lab.stack.url
    if name in scenario.CHANGING:
        return Counter(await asyncio.to_thread(scenario.CHANGING[name], url, lab))
    return Counter(await asyncio.to_thread(scenario.SCENARIOS[name], url))


@pytest.mark.parametrize(
    ("overlay", "names"),
    [
        ("lite-load-balance", ["first"]),
        ("traffic-splitting-prefix", ["prefix", "fallback"]),
        ("traffic-splitting-weight", ["weight", "fallback"]),
        ("multi-owner", ["owners"]),
        ("pd-vllm-mooncake", ["pairs"]),
        ("pd-vllm-kvt", ["pairs"]),
        ("traffic-mirror", ["mirror"]),
    ],
)
async def test_the_scenario_of_an_overlay_holds(overlay: str, names: list[str], tmp_path: Path) -> None:
    async with running_overlay(overlay, tmp_path) as lab:
        for name in names:
            print(overlay, name, dict(await run(name, lab)))
