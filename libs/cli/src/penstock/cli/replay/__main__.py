"""Run every setup and print. Exit codes: 0 done, 1 a run failed, 2 bad settings or a bad trace."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from penstock.cli.replay.plot import svg
from penstock.cli.replay.report import as_json, header, over_seeds, table
from penstock.cli.replay.run import Run, replay
from penstock.cli.replay.schedulers import ReplayFailed
from penstock.cli.replay.settings import PROG, ReplaySettings
from penstock.cli.replay.setups import Setup, setups
from penstock.cli.replay.trace import TraceFault, TraceRequest, read
from penstock.common.settings import exit_with_faults, load_or_exit

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, then print the comparison on stdout; progress goes to stderr."""
    settings = load_or_exit(ReplaySettings, argv, prog=PROG)
    # Settings without a trace are refused.
    path = settings.trace or Path()
    try:
        trace = read(path, settings.block_size, settings.limit)
    except TraceFault as exc:
        exit_with_faults(PROG, [f"--trace: {exc}"])
    try:
        runs = list(_runs(settings, trace))
    except ReplayFailed as exc:
        print(f"{PROG}: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return _tell(settings, runs, path.name, len(trace))


def _runs(settings: ReplaySettings, trace: Sequence[TraceRequest]) -> Iterator[Run]:
    planned = list(setups(settings))
    for number, setup in enumerate(planned, 1):
        label = f"{number}/{len(planned)} {_label(setup)}"
        yield replay(settings, setup, trace, _progress(label, len(trace)))
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)


def _label(setup: Setup) -> str:
    return f"{setup.policy}, {setup.instances} instances, {setup.replicas} replicas, seed {setup.seed}"


def _progress(label: str, total: int) -> Callable[[int], None]:
    """On a terminal a line that is written over, else one line a run."""
    if not sys.stderr.isatty():
        print(f"{PROG}: {label}", file=sys.stderr, flush=True)
        return lambda done: None
    return lambda done: print(
        f"\r\x1b[K{PROG}: {label}: {100 * done // total} %", end="", file=sys.stderr, flush=True
    )


def _tell(settings: ReplaySettings, runs: Sequence[Run], name: str, requests: int) -> int:
    title = f"{name}: {requests:,} requests"
    if settings.json:
        print(as_json(settings, runs, requests).decode())
    else:
        print(f"{header(settings, title)}\n\n{table(runs)}")
    if settings.plot is not None:
        try:
            settings.plot.write_text(svg(over_seeds(runs), title), encoding="utf-8")
        except OSError as exc:
            print(f"{PROG}: --plot: {settings.plot}: {exc.strerror}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
