"""A View on so many lines and columns of a terminal."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from penstock.cli.terminal import CYAN, GREEN, GREY, RED, YELLOW, paint, plain
from penstock.cli.top.view import InstanceView, TotalsView, View

_HEADS = ("ROLE", "STATE", "RUN", "WAIT", "KV", "SENT", "REQ/S", "ERR/S", "MATCH", "PREC")
_WIDTHS = (8, 9, 5, 5, 5, 5, 8, 6, 5, 5)
_MIN_NAME, _MAX_NAME = 12, 48
_STATE_COLOURS = {"ready": GREEN, "stale": YELLOW, "draining": CYAN, "unhealthy": RED}
# Lines of degraded states and breakers; the rest is counted.
_MAX_TROUBLES = 8


def frame(view: View, columns: int, lines: int, *, clock: str, colour: bool = False) -> list[str]:
    """At most `lines` lines of at most `columns` columns each. `clock` is the time of day to show."""
    head = [*_head(view, clock), *_troubles(view)]
    rows = [_row(one, columns) for one in view.instances]
    room = max(0, lines - len(head) - 2)
    if len(rows) > room:
        left = len(rows) - max(0, room - 1)
        rows = [*rows[: max(0, room - 1)], (f"... and {left} more instances", GREY)]
    titles = _cells("INSTANCE", _HEADS, columns)
    text = [*head, ("", ""), (titles, GREY), *(rows or [("no instances are known", GREY)])]
    return [_line(words, columns, shade if colour else "") for words, shade in text[:lines]]


def _line(text: str, columns: int, shade: str) -> str:
    return paint(cut(text, columns), shade)


def cut(text: str, columns: int) -> str:
    """The start of `text` that fits, control characters made visible; wide characters take two columns."""
    used, kept = 0, []
    for one in plain(text):
        used += 2 if unicodedata.east_asian_width(one) in "WF" else not unicodedata.combining(one)
        if used > columns:
            break
        kept.append(one)
    return "".join(kept)


def _head(view: View, clock: str) -> list[tuple[str, str]]:
    totals = view.totals
    bus = "bus connected" if view.connected else "BUS LOST: what follows is what was known"
    broken = f"  {view.broken} messages unreadable" if view.broken else ""
    return [
        (
            f"penstock top  {clock}  {bus}  rates over {view.window_s} s{broken}",
            "" if view.connected else RED,
        ),
        (_rates(totals), ""),
        (_quality(totals), ""),
        (_processes(view), ""),
    ]


def _rates(totals: TotalsView) -> str:
    return (
        f"decisions {totals.decisions_per_s:g}/s (local {_percent(totals.local_ratio)})  "
        f"requests {totals.requests_per_s:g}/s  errors {totals.errors_per_s:g}/s  "
        f"rejected {totals.rejections_per_s:g}/s  in flight {totals.in_flight}  "
        f"instances {totals.taking_requests}/{totals.instances}"
    )


def _quality(totals: TotalsView) -> str:
    return (
        f"prefix match {_percent(totals.match_ratio)}  KV-cache hits {_percent(totals.hit_ratio)}  "
        f"precision {_percent(totals.precision_ratio)}  "
        f"TTFT p50 {_ms(totals.ttft_p50_ms)} p99 {_ms(totals.ttft_p99_ms)}  tokens {totals.tokens_per_s:g}/s"
    )


def _processes(view: View) -> str:
    counts = Counter(one.service for one in view.processes)
    waiting = [f"{one.service}/{one.id}" for one in view.processes if not one.ready]
    known = "  ".join(f"{service} {count}" for service, count in sorted(counts.items()))
    return f"processes  {known or 'none heard'}" + (f"  not ready: {', '.join(waiting)}" if waiting else "")


def _troubles(view: View) -> list[tuple[str, str]]:
    told = [
        (f"degraded  {one.service}/{one.id}: {one.what} ({_span(one.for_s)}) {one.cause}".rstrip(), RED)
        for one in view.degraded
    ]
    told += [
        (f"breaker   {one.state}: {one.kind} {one.target} (ingress/{one.ingress})", YELLOW)
        for one in view.breakers
    ]
    if len(told) > _MAX_TROUBLES:
        left = len(told) - _MAX_TROUBLES + 1
        told = [*told[: _MAX_TROUBLES - 1], (f"... and {left} more", RED)]
    return told


def _row(one: InstanceView, columns: int) -> tuple[str, str]:
    figures = (
        one.role,
        one.state,
        _count(one.running),
        _count(one.waiting),
        _percent(one.kv_usage_ratio),
        str(one.in_flight),
        f"{one.requests_per_s:g}",
        f"{one.errors_per_s:g}",
        _percent(one.hit_ratio),
        _percent(one.precision_ratio) + "!" * one.kv_events_distrusted,
    )
    usual = YELLOW if one.kv_events_distrusted else _STATE_COLOURS.get(one.state, "")
    shade = RED if one.errors_per_s else usual
    reason = f"  {one.reason}" if one.reason else ""
    return _cells(one.id, figures, columns) + reason, shade


def _cells(name: str, figures: Sequence[str], columns: int) -> str:
    fixed = sum(_WIDTHS) + len(_WIDTHS)
    room = min(_MAX_NAME, max(_MIN_NAME, columns - fixed))
    shown = cut(name, room) if len(plain(name)) <= room else cut(name, room - 2) + ".."
    cells = [shown.ljust(room)]
    for number, (text, width) in enumerate(zip(figures, _WIDTHS, strict=True)):
        cells.append(text.ljust(width) if number < 2 else text.rjust(width))
    return " ".join(cells)


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio * 100:.0f}%"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f} ms"


def _count(value: int | None) -> str:
    return "-" if value is None else str(value)


def _span(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
