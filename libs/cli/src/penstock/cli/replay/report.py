"""Runs as a table for people and as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from penstock.cli.replay.figures import herd_factor, mean, together
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
    """`value` of a row, in the unit of the heading; `ranged`: with the range over several seeds."""

    heading: str
    value: Callable[[Row], float | None]
    digits: int = 0
    ranged: bool = False

    def cell(self, group: Sequence[Row]) -> str:
        """The mean of rows that differ in chance alone."""
        values = [value for row in group if (value := self.value(row)) is not None]
        if not values:
            return NONE
        text = f"{sum(values) / len(values):.{self.digits}f}"
        if not self.ranged or len(values) < 2:
            return text
        return f"{text} ({min(values):.{self.digits}f}..{max(values):.{self.digits}f})"


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


_SETUP = (
    _Column("inst", lambda row: row.run.setup.instances),
    _Column("repl", lambda row: row.run.setup.replicas),
    _Column("delay ms", lambda row: row.run.setup.delay_ms),
    _Column("ingr", lambda row: row.run.setup.ingresses),
)
_FIGURES = (
    _Column("hit %", lambda row: _percent(row.run.figures.hit_ratio), 2),
    _Column("expected %", lambda row: _percent(row.run.figures.expected_hit_ratio), 2),
    _Column("of oracle %", lambda row: _percent(row.of_oracle), 1, ranged=True),
    _Column("of 1 repl %", lambda row: _percent(row.of_alone), 1, ranged=True),
    _Column("TTFT mean", lambda row: row.run.figures.ttft_mean_s, 2, ranged=True),
    _Column("p50", lambda row: row.run.figures.ttft_p50_s, 2),
    _Column("p90", lambda row: row.run.figures.ttft_p90_s, 2),
    _Column("p99 s", lambda row: row.run.figures.ttft_p99_s, 2),
    _Column("TPOT p50", lambda row: 1000 * row.run.figures.tpot_p50_s),
    _Column("p90", lambda row: 1000 * row.run.figures.tpot_p90_s),
    _Column("p99 ms", lambda row: 1000 * row.run.figures.tpot_p99_s),
    _Column("in SLO %", lambda row: _percent(row.run.figures.slo_ratio), 1),
    _Column("good/s", lambda row: row.run.figures.goodput_rps, 2),
    _Column("imbalance", lambda row: row.run.figures.imbalance, 2),
    _Column("herd", lambda row: row.herd, 2, ranged=True),
    _Column("refused", lambda row: row.run.figures.refused),
)
_BARE = {NONE, "0"}


def table(runs: Sequence[Run]) -> str:
    """A line for each setup; of these what differs, of comparisons those that there are."""
    groups: dict[Setup, list[Row]] = {}
    for row in rows(runs):
        groups.setdefault(row.run.setup.any_seed, []).append(row)
    lines = list(groups.values())
    columns = [["policy", *(setup.policy for setup in groups)]]
    for column in _SETUP:
        cells = [f"{column.value(group[0]):g}" for group in lines]
        if len(set(cells)) > 1:
            columns.append([column.heading, *cells])
    for column in _FIGURES:
        cells = [column.cell(group) for group in lines]
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


def over_seeds(runs: Sequence[Run]) -> list[Run]:
    """Runs that differ in chance alone as one: their figures' means, their requests together."""
    groups: dict[Setup, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.setup.any_seed, []).append(run)
    return [
        Run(setup, together([run.served for run in group]), mean([run.figures for run in group]))
        for setup, group in groups.items()
    ]


def header(settings: ReplaySettings, title: str) -> str:
    """Under what conditions the figures came about."""
    kv_tokens = settings.kv_blocks * settings.block_size
    seeds = "seeds" if len(settings.seeds) > 1 else "seed"
    arrivals = "equal times spread" if settings.spread else "times as recorded"
    ratio, speed = settings.slow_ratio, settings.slow_speed
    slow = f", {ratio:.0%} of them at {speed:g} x speed" if ratio else ""
    return (
        f"{title}, {arrivals}, {settings.rate_scale:g} x speed, {seeds} "
        f"{settings.seed}\n"
        f"engines: {kv_tokens:,} tokens of KV cache, {settings.prefill_tokens_per_s:,} prompt tokens/s, "
        f"{settings.decode_step_ms:g} + {settings.decode_step_per_seq_ms:g} x requests ms a decode "
        f"step{slow}\n"
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
        "seed": setup.seed,
        **msgspec.structs.asdict(row.run.figures),
        **{name: compared[key] for name, key in _COMPARED.items()},
    }


_COMPARED = {
    "herd_factor": "herd",
    "hit_ratio_to_oracle": "of_oracle",
    "hit_ratio_to_one_replica": "of_alone",
}
