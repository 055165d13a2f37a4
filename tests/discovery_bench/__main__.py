"""Run the measurements that are asked for and print their figures."""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

from discovery_bench import latency, scale


def main() -> None:
    """Flags say what and how much."""
    parser = argparse.ArgumentParser(prog="discovery_bench", description=__doc__)
    parser.add_argument("--source", action="append", choices=sorted(latency.STORES), help="latency of these")
    parser.add_argument("--no-latency", action="store_true", help="scale only")
    parser.add_argument("--no-scale", action="store_true", help="latency only")
    parser.add_argument("--changes", type=int, default=200)
    parser.add_argument(
        "--fleet", type=int, default=50, help="instances in the store while changes are timed"
    )
    parser.add_argument("--instances", type=int, default=2000)
    parser.add_argument("--probe-interval", type=float, default=5.0)
    parser.add_argument("--metrics-bytes", type=int, default=65536, help="size of each engine's /metrics")
    flags = parser.parse_args()
    if not flags.no_scale:
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
            size = flags.instances, flags.probe_interval, flags.metrics_bytes
            for line in asyncio.run(scale.measure(*size, Path(folder))):
                print(line, flush=True)
    for name in [] if flags.no_latency else flags.source or latency.STORES:
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
            print(asyncio.run(latency.measure(name, flags.changes, flags.fleet, Path(folder))), flush=True)


if __name__ == "__main__":
    main()
