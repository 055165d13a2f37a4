"""Runs as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from penstock.cli.replay.figures import herd_factor
from penstock.cli.replay.run import Run
from penstock.cli.replay.settings import ReplaySettings
from penstock.cli.replay.setups import Setup, oracle_of

GAP = "  "
NONE = "-"


class Row(NamedTuple):
    """A run, and what it is compared with: herd factor against one replica, hit rate against the oracle's and
    against that with one replica; None where there is nothing to compare with."""

    run: Run
    herd: float | None
    of_oracle: float | None
    of_alone: float | None


def rows(runs: Sequence[Run]) -> list[Row]:
    """In the order of `runs`."""
    by_setup = {run.setup: run for run in runs}
    return [_row(run, by_setup) for run in runs]


def _row(run: Run, by_setup: dict[Setup, Run]) -> Row:
    setup = run.setup
    alone = by_setup[setup.alone] if setup.replicas > 1 else None
    oracle = oracle_of(setup, list(by_setup))
    return Row(
        run,
        herd_factor(run.served, alone.served, setup.delay_ms / 1000) if alone else None,
        _ratio(run, by_setup[oracle]) if oracle else None,
        _ratio(run, alone) if alone else None,
    )


def _ratio(run: Run, base: Run) -> float | None:
    return run.figures.hit_ratio / base.figures.hit_ratio if base.figures.hit_ratio else None


class _Column(NamedTuple):
    heading: str
    cell: Callable[[Row], str]


def _percent(value: float | None, digits: int = 1) -> str:
    return NONE if value is None else f"{100 * value:.{digits}f}"


_SETUP = (
    _Column("inst", lambda row: str(row.run.setup.instances)),
    _Column("repl", lambda row: str(row.run.setup.replicas)),
    _Column("delay ms", lambda row: f"{row.run.setup.delay_ms:g}"),
    _Column("ingr", lambda row: str(row.run.setup.ingresses)),
)
_FIGURES = (
    _Column("hit %", lambda row: _percent(row.run.figures.hit_ratio, 2)),
    _Column("expected %", lambda row: _percent(row.run.figures.expected_hit_ratio, 2)),
    _Column("of oracle %", lambda row: _percent(row.of_oracle)),
    _Column("of 1 repl %", lambda row: _percent(row.of_alone)),
    _Column("TTFT mean", lambda row: f"{row.run.figures.ttft_mean_s:.2f}"),
    _Column("p50", lambda row: f"{row.run.figures.ttft_p50_s:.2f}"),
    _Column("p90", lambda row: f"{row.run.figures.ttft_p90_s:.2f}"),
    _Column("p99 s", lambda row: f"{row.run.figures.ttft_p99_s:.2f}"),
    _Column("TPOT p50", lambda row: f"{1000 * row.run.figures.tpot_p50_s:.0f}"),
    _Column("p90", lambda row: f"{1000 * row.run.figures.tpot_p90_s:.0f}"),
    _Column("p99 ms", lambda row: f"{1000 * row.run.figures.tpot_p99_s:.0f}"),
    _Column("in SLO %", lambda row: _percent(row.run.figures.slo_ratio)),
    _Column("good/s", lambda row: f"{row.run.figures.goodput_rps:.2f}"),
    _Column("imbalance", lambda row: f"{row.run.figures.imbalance:.2f}"),
    _Column("herd", lambda row: NONE if row.herd is None else f"{row.herd:.2f}"),
    _Column("refused", lambda row: str(row.run.figures.refused)),
)
_BARE = {NONE, "0"}


def table(runs: Sequence[Run]) -> str:
    """A line for each run; of its setup what differs, of comparisons those that there are."""
    lines = rows(runs)
    columns = [["policy", *(row.run.setup.policy for row in lines)]]
    for column in _SETUP:
        cells = [column.cell(row) for row in lines]
        if len(set(cells)) > 1:
            columns.append([column.heading, *cells])
    for column in _FIGURES:
        cells = [column.cell(row) for row in lines]
        if not set(cells) <= _BARE:
            columns.append([column.heading, *cells])
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        GAP.join(
            text.ljust(width) if number == 0 else text.rjust(width)
            for number, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in zip(*columns, strict=True)
    )


def header(settings: ReplaySettings, title: str) -> str:
    """Under what conditions the figures came about."""
    kv_tokens = settings.kv_blocks * settings.block_size
    arrivals = "equal times spread" if settings.spread else "times as recorded"
    return (
        f"{title}, {arrivals}, {settings.rate_scale:g} x speed, seed "
        f"{settings.seed}\n"
        f"engines: {kv_tokens:,} tokens of KV cache, {settings.prefill_tokens_per_s:,} prompt tokens/s, "
        f"{settings.decode_step_ms:g} + {settings.decode_step_per_seq_ms:g} x requests ms a decode step\n"
        f"SLO: TTFT {settings.slo_ttft_ms:g} ms, TPOT {settings.slo_tpot_ms:g} ms"
    )


def as_json(settings: ReplaySettings, runs: Sequence[Run], requests: int) -> bytes:
    """Every figure of every run."""
    told = {
        "requests": requests,
        "settings": settings.model_dump(mode="json", exclude={"config", "json", "plot"}),
    }
    return msgspec.json.format(msgspec.json.encode({**told, "runs": [_fields(row) for row in rows(runs)]}))


def _fields(row: Row) -> dict[str, Any]:
    setup, compared = row.run.setup, row._asdict()
    del compared["run"]
    return {
        "policy": setup.policy,
        "instances": setup.instances,
        "replicas": setup.replicas,
        "event_delay_ms": setup.delay_ms,
        "ingresses": setup.ingresses,
        **msgspec.structs.asdict(row.run.figures),
        **{name: compared[key] for name, key in _COMPARED.items()},
    }


_COMPARED = {
    "herd_factor": "herd",
    "hit_ratio_to_oracle": "of_oracle",
    "hit_ratio_to_one_replica": "of_alone",
}
