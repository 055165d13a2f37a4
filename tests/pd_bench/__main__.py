"""Run the measurements that are asked for and print their figures."""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import replace
from pathlib import Path

from pd_bench import live, virtual
from penstock.cli.replay.settings import ReplaySettings
from penstock.cli.replay.trace import read
from penstock.scheduler.profile import Division

EXCERPT = Path(__file__).parents[2] / "libs/cli/tests/data/mooncake_excerpt.jsonl"


def main() -> None:
    """Flags say what and how much."""
    parser = argparse.ArgumentParser(prog="pd_bench", description=__doc__)
    parser.add_argument("--no-virtual", action="store_true", help="live only")
    parser.add_argument("--no-live", action="store_true", help="virtual time only")
    parser.add_argument("--trace", type=Path, default=EXCERPT, help="in Mooncake's format")
    parser.add_argument("--rates", default="0.5,1,1.5", help="speeds of the trace, comma-separated")
    parser.add_argument("--slo-ttft-ms", type=float, default=6000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=50.0)
    parser.add_argument("--prefill-imbalance", type=int, default=16, help="see --pd-prefill-imbalance")
    parser.add_argument("--decode-imbalance", type=int, default=16, help="see --pd-decode-imbalance")
    parser.add_argument("--requests", type=int, default=300, help="live, for each protocol and mode")
    flags = parser.parse_args()
    if not flags.no_virtual:
        _virtual(flags)
    if not flags.no_live:
        asyncio.run(live.measure(flags.requests))


def _virtual(flags: argparse.Namespace) -> None:
    slo = {"slo_ttft_ms": flags.slo_ttft_ms, "slo_tpot_ms": flags.slo_tpot_ms}
    settings = ReplaySettings(trace=flags.trace, **slo)
    trace = read(flags.trace, settings.block_size)
    print(f"{flags.trace.name}: {len(trace):,} requests, equal times spread, SLO {slo}")
    print(virtual.HEAD)
    guards = Division(prefill_imbalance=flags.prefill_imbalance, decode_imbalance=flags.decode_imbalance)
    for rate in map(float, flags.rates.split(",")):
        for fleet in FLEETS:
            started = time.perf_counter()
            guarded = replace(fleet, division=fleet.division.over(guards))
            found = virtual.run(settings, guarded, trace, rate)
            print(virtual.line(fleet, rate, found), f"  {time.perf_counter() - started:.1f} s", flush=True)


FLEETS = (
    virtual.Fleet(neutral=8),
    virtual.Fleet(prefill=4, decode=4),
    virtual.Fleet(prefill=4, decode=4, staged=True),
    virtual.Fleet(prefill=4, decode=4, division=Division(6_000)),
    virtual.Fleet(prefill=4, decode=2, neutral=2, division=Division(neutral=True)),
    virtual.Fleet(prefill=6, decode=2),
    virtual.Fleet(prefill=6, decode=2, staged=True),
)


if __name__ == "__main__":
    main()
