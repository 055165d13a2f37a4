"""Results as a table for people and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from penstock.cli.bench.measures import Against, Column, Measure
from penstock.cli.bench.results import Results, Spread
from penstock.cli.bench.run import Run
from penstock.cli.bench.settings import BenchSettings
from penstock.cli.bench.way import DIRECT, FULL, LEAST_REQUEST, NGINX
from penstock.common.machine_code import folder_of, missing

COMPILED = ("penstock.ingress", "penstock.scheduler")
GAP = "  "
# Of the gateway's core in the hands of others, from which on the report warns.
BUSY_PERCENT = 10


def table(settings: BenchSettings, run: Run) -> str:
    """A block for each measure, a line for each way."""
    base = NGINX if NGINX in run.ways else DIRECT
    named = settings.model_dump()
    blocks = (
        [measure.title.format_map(named), *_block(run.results, measure, run.ways, base)]
        for measure in run.measures
    )
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _block(results: Results, measure: Measure, ways: Sequence[str], base: str) -> list[str]:
    rows = measure.ways(ways)
    cells = [
        [column.heading.replace(NGINX, base), *(_cell(results, measure, way, column, base) for way in rows)]
        for column in measure.columns
    ]
    # Where nobody is compared with least-request, nothing stands for it.
    among = [column.against is not Against.LEAST for column in measure.columns]
    cells = [cell for cell, always in zip(cells, among, strict=True) if always or any(cell[1:])]
    names = ["", *rows]
    columns = [names, *cells]
    widths = [max(map(len, column)) for column in columns]
    return [
        GAP.join(
            text.ljust(width) if number == 0 else text.rjust(width)
            for number, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in zip(*columns, strict=True)
    ]


def _cell(results: Results, measure: Measure, way: str, column: Column, base: str) -> str:
    if column.against is not Against.NOTHING:
        _, spread = _comparison(results, measure, way, column, base)
        return "" if spread is None else _with_range(spread, column.digits)
    spread = results.spread(measure.name, way, column.metric)
    return "" if spread is None else f"{spread.median:,.{column.digits}f}"


def _comparison(
    results: Results, measure: Measure, way: str, column: Column, base: str
) -> tuple[str, Spread | None]:
    """What is compared with what, and the outcome; None where a way would be compared with itself."""
    metric = column.metric
    if column.against is Against.BASE:
        ratio = results.ratio(measure.name, way, metric, base) if way != base else None
        return f"{metric} / {base}", ratio
    if column.against is Against.LEAST:
        compares = way in FULL and way != LEAST_REQUEST
        ratio = results.ratio(measure.name, way, metric, LEAST_REQUEST) if compares else None
        return f"{metric} / {LEAST_REQUEST}", ratio
    added = results.added(measure.name, way, metric, DIRECT) if way != DIRECT else None
    return f"{metric} - {DIRECT}", added


def _with_range(spread: Spread, digits: int) -> str:
    median, low, high = (f"{value:,.{digits}f}" for value in spread)
    return f"{median} ({low}..{high})"


def runs_as(package: str) -> str:
    """What a service started now runs as."""
    why = missing(folder_of(package))
    return f"as Python: {why}" if why else "as machine code"


def header(settings: BenchSettings, run: Run) -> list[str]:
    """Under what conditions the figures came about."""
    cores = "the gateway alone on one core, all else on the others" if run.pinned else "nothing is pinned"
    foreign = run.results.everywhere("foreign_percent")
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, {cores}; Python {platform.python_version()}",
        *(f"{package.partition('.')[2]} runs {runs_as(package)}" for package in COMPILED),
        f"{settings.repeats} rounds of {settings.slot_s:g} s, order by --seed {run.seed}, "
        f"{settings.engines} engines",
        "medians of the rounds; ratios and differences are made inside each round: median (low..high)",
    ]
    if foreign is not None and run.pinned:
        lines.append(
            f"other programs had {foreign.median:.0f} % of the gateway's core (at most {foreign.high:.0f} %)"
        )
        if foreign.median > BUSY_PERCENT:
            lines.append("the machine is busy: trust CPU time and ratios of it, not rates and delays")
    return lines


def as_json(settings: BenchSettings, run: Run) -> dict[str, Any]:
    """Every figure of every round, and the comparisons that the table shows."""
    base = NGINX if NGINX in run.ways else DIRECT
    return {
        "seed": run.seed,
        "settings": settings.model_dump(mode="json", exclude={"config"}),
        "conditions": header(settings, run),
        "seconds": run.seconds,
        "failed": run.failed,
        "failures": dict(run.failures),
        "notes": [*run.notes, *run.stray_notes()],
        "figures": run.results.as_dict(),
        "compared": {
            measure.name: {way: _compared(run.results, measure, way, base) for way in run.ways}
            for measure in run.measures
        },
    }


def _compared(results: Results, measure: Measure, way: str, base: str) -> dict[str, Any]:
    columns = [column for column in measure.columns if column.against is not Against.NOTHING]
    found = (_comparison(results, measure, way, column, base) for column in columns)
    return {name: spread._asdict() for name, spread in found if spread is not None}
