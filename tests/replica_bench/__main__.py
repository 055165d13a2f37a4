"""Run the measurements that are asked for and print their figures."""

from __future__ import annotations

import argparse
import asyncio

from replica_bench import live, over_bus
from replica_bench.sessions import HEAD


def main() -> None:
    """Flags say what and how much."""
    parser = argparse.ArgumentParser(prog="replica_bench", description=__doc__)
    parser.add_argument("--no-bus", action="store_true", help="live only")
    parser.add_argument("--no-live", action="store_true", help="over the bus only")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--instances", type=int, default=100, help="over the bus")
    parser.add_argument("--engines", type=int, default=32, help="live")
    parser.add_argument("--workers", type=int, default=8, help="ingress workers, live")
    parser.add_argument("--sessions", type=int, default=64, help="users at a time, live")
    parser.add_argument(
        "--schedule-timeout",
        default="",
        help="live, of the ingress: on a busy machine schedulers answer later than by default they may",
    )
    flags = parser.parse_args()
    if not flags.no_bus:
        asyncio.run(_over_bus(flags.instances, flags.seconds))
    if not flags.no_live:
        asyncio.run(_live(flags))


async def _over_bus(instances: int, seconds: float) -> None:
    print(f"over the bus, {instances} instances, messages of {over_bus.BATCH} requests")
    print(
        f"{'replicas':>8} {'blocks':>6} {'decisions/s':>12} {'scheduler us':>12} {'p50 ms':>7} {'p99 ms':>7}"
    )
    for blocks in (64, 256):
        for replicas in (1, 4):
            f = await over_bus.measure(replicas, instances=instances, blocks=blocks, seconds=seconds)
            rates = f"{f.decisions_per_s:>12,.0f} {f.cpu_us:>12.1f} {f.p50_ms:>7.1f} {f.p99_ms:>7.1f}"
            line = f"{replicas:>8} {blocks:>6} {rates}"
            print(line + (f"  {f.unanswered} unanswered" if f.unanswered else ""), flush=True)


async def _live(flags: argparse.Namespace) -> None:
    print(
        f"live, {flags.engines} engines, {flags.workers} ingress workers, {flags.sessions} sessions at a time"
    )
    print(HEAD)
    runs = live.runs(
        workers=flags.workers,
        engines=flags.engines,
        sessions=flags.sessions,
        seconds=flags.seconds,
        flags=("--schedule-timeout", flags.schedule_timeout) if flags.schedule_timeout else (),
    )
    async for name, tally in runs:
        print(tally.line(name), flush=True)


if __name__ == "__main__":
    main()
