"""Runs as an SVG picture: bars for each figure, and the distribution of TTFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import NamedTuple

from penstock.cli.replay.figures import distribution
from penstock.cli.replay.run import Run

WIDTH, MARGIN, ROW, LABEL, GAP = 960, 20, 20, 300, 34
CURVES = 240
# Eight that are told apart by people who see colours differently (Okabe and Ito).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#b8a800", "#555555")


_DIFFERING = {"instances": "inst", "replicas": "repl", "delay_ms": "ms", "ingresses": "ingr"}


class _Panel(NamedTuple):
    title: str
    of: Callable[[Run], float]
    digits: int


PANELS = (
    _Panel("hit rate, %", lambda run: 100 * run.figures.hit_ratio, 2),
    _Panel("mean TTFT, s", lambda run: run.figures.ttft_mean_s, 2),
    _Panel("TTFT p99, s", lambda run: run.figures.ttft_p99_s, 2),
    _Panel("TPOT p99, ms", lambda run: 1000 * run.figures.tpot_p99_s, 0),
    _Panel("requests within the SLO, %", lambda run: 100 * run.figures.slo_ratio, 1),
    _Panel("imbalance of work, most / mean", lambda run: run.figures.imbalance, 2),
)


def svg(runs: Sequence[Run], title: str) -> str:
    """A document of its own; `title` is shown on top."""
    names = _names(runs)
    parts, top = [_text(MARGIN, MARGIN + 8, title, 15)], 2.0 * MARGIN + GAP
    for panel in PANELS:
        parts += _bars(panel, runs, names, top)
        top += ROW * len(runs) + GAP
    parts += _curves(runs, top)
    height = top + CURVES + GAP
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
            'font-family="sans-serif">',
            f'<rect width="{WIDTH}" height="{height:.0f}" fill="white"/>',
            *parts,
            "</svg>\n",
        ]
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """The policies, with what else differs."""
    plain = [run.setup for run in runs if not (run.setup.all_knowing or run.setup.reference)]
    shown = {name: len({getattr(setup, name) for setup in plain}) > 1 for name in _DIFFERING}
    shown["instances"] = len({run.setup.instances for run in runs}) > 1
    return [
        ", ".join(
            [run.setup.policy]
            + [f"{getattr(run.setup, name):g} {unit}" for name, unit in _DIFFERING.items() if shown[name]]
        )
        for run in runs
    ]


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _bars(panel: _Panel, runs: Sequence[Run], names: Sequence[str], top: float) -> Iterator[str]:
    values = [panel.of(run) for run in runs]
    scale = (WIDTH - LABEL - 100) / (max(values) or 1.0)
    yield _text(MARGIN, top - 6, panel.title, 13)
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        y = top + number * ROW
        yield _text(LABEL - 8, y + 14, name, 11, "end")
        yield (
            f'<rect x="{LABEL}" y="{y + 3:.0f}" width="{value * scale:.1f}" height="{ROW - 6}" '
            f'fill="{_colour(number)}"/>'
        )
        yield _text(LABEL + value * scale + 6, y + 14, f"{value:.{panel.digits}f}", 11)


def _curves(runs: Sequence[Run], top: float) -> Iterator[str]:
    """TTFT to the right up to the highest p99, share of requests upwards; colours as in the bars."""
    longest = max((run.figures.ttft_p99_s for run in runs), default=0.0) or 1.0
    width = WIDTH - LABEL - 100
    yield _text(MARGIN, top - 6, f"share of requests (0..1) by TTFT (0..{longest:.1f} s)", 13)
    yield f'<rect x="{LABEL}" y="{top:.0f}" width="{width}" height="{CURVES}" fill="none" stroke="#ccc"/>'
    for number, run in enumerate(runs):
        times = distribution(run.served.ttft_s) if len(run.served.ttft_s) else []
        points = " ".join(
            f"{LABEL + width * time / longest:.1f},{top + CURVES * (1 - share / 100):.1f}"
            for share, time in enumerate(times)
            if time <= longest
        )
        yield f'<polyline points="{points}" fill="none" stroke="{_colour(number)}" stroke-width="1.5"/>'


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" font-size="{size}" text-anchor="{anchor}">{escape(text)}</text>'
