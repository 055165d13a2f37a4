"""Two minutes of kills at random moments (`make soak`), then an audit: with a spool, and without."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from integration.audit_drill import CLEAN, GAPS, KINDS, audit, drill, settled, start
from integration.stack import Stack, running_stack

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif("PENSTOCK_SOAK_SECONDS" not in os.environ, reason="takes long: make soak"),
]

SEED = int(os.environ.get("PENSTOCK_SEED", "7"))
SECONDS = float(os.environ.get("PENSTOCK_SOAK_AUDIT_SECONDS", "120"))


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        yield stack


@pytest.mark.parametrize("spooled", [True, False], ids=["with a spool", "without one"])
async def test_kills_at_random_moments_cost_nothing_or_nothing_unnamed(
    stack: Stack, tmp_path: Path, spooled: bool
) -> None:
    spool = tmp_path if spooled else None
    start(stack, *(("--audit-spool", str(tmp_path)) if spooled else ()), schedulers=2, workers=2)
    await stack.ready()
    done, seed, until = Counter[str](), SEED, time.monotonic() + SECONDS
    while time.monotonic() < until:
        done += await drill(stack, seed, KINDS, spool)
        await stack.ready()
        seed += 1
    verdict = await settled(stack)
    print(f"\n{dict(done)}: {verdict.finished} outcomes, {verdict.lost} lost, {len(verdict.faults)} faults")
    print("\n".join(f"{f.kind} {f.writer} {f.first}-{f.last}: {f.cause}" for f in verdict.faults))
    code, _ = await audit(stack, "--settle", "0")
    if spooled:
        assert verdict.faults == []
        assert verdict.finished + verdict.lost >= done["answered"]
    else:
        # Of requests that clients saw answered, what is missing is named: by decision, or by the writer that
        # took it along unsent.
        named = sum(fault.count for fault in verdict.faults if fault.kind == "unfinished")
        tails = [fault for fault in verdict.faults if fault.kind == "tail"]
        assert verdict.finished + verdict.lost + named >= done["answered"] or tails
        assert tails
        assert all(fault.writer and fault.cause for fault in verdict.faults)
    assert code == (CLEAN if verdict.clean else GAPS)
