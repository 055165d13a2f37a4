"""Read settings, run, print. Exit codes: 0 every answer was right, 1 one was not, 2 bad settings."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import uvloop

from penstock.cli.bench.report import as_json, header, table
from penstock.cli.bench.run import Run, bench
from penstock.cli.bench.settings import PROG, BenchSettings
from penstock.cli.bench.stand import BenchFailed
from penstock.common.settings import load_or_exit

INTERRUPTED = 130
SHOWN_FAILURES = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, then print and write what came of it."""
    words = list(sys.argv[1:] if argv is None else argv)
    # `make bench PEERS=1` hands its variable down in the environment.
    if os.environ.get("PEERS", "0") not in ("", "0"):
        words.append("--peers")
    settings = load_or_exit(BenchSettings, words, prog=PROG)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            run = runner.run(_until_told(settings))
    except BenchFailed as exc:
        print(f"{PROG}: {exc}", file=sys.stderr)
        return 1
    except (asyncio.CancelledError, KeyboardInterrupt):
        return INTERRUPTED
    return tell(settings, run)


async def _until_told(settings: BenchSettings) -> Run:
    """`bench`, with SIGTERM ending it as Ctrl-C does."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await bench(settings)


def tell(settings: BenchSettings, run: Run) -> int:
    """Print and write what a run found; the exit code."""
    print("\n".join([*header(settings, run), "", table(settings, run), ""]))
    for note in (*run.notes, *run.stray_notes()):
        print(f"note: {note}")
    for cause, count in run.failures.most_common(SHOWN_FAILURES):
        print(f"FAILED {count} times: {cause}")
    print(f"{run.failed} wrong or missing answers, {run.seconds:.0f} s")
    if settings.json is not None:
        Path(settings.json).write_bytes(msgspec.json.format(msgspec.json.encode(as_json(settings, run))))
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
