"""What is measured: a load on one way, and the figures that come of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from penstock.cli.bench import loads
from penstock.cli.bench.attack import Attack
from penstock.cli.bench.cores import resident_mb
from penstock.cli.bench.settings import BenchSettings
from penstock.cli.bench.shapes import SHAPES
from penstock.cli.bench.way import DIRECT, GATEWAY, LEAST_REQUEST, LOCAL, NATS, NGINX, REST, SCHEDULER
from penstock.cli.bench.window import Slot, Window

SMALL_BYTES, LARGE_BYTES = 1024, 16 * 1024
Figures = dict[str, float]


class Against(Enum):
    """What a column shows of a metric."""

    NOTHING = "itself"
    BASE = "ratio to nginx"
    DIRECT = "added to direct"


class When(Enum):
    """At what time of a run."""

    FIRST = "once, while nothing has happened yet"
    ROUNDS = "in every round"
    LAST = "once, when nothing else is left to disturb"


@dataclass(frozen=True)
class Column:
    """A metric under its heading."""

    heading: str
    metric: str
    digits: int = 0
    against: Against = Against.NOTHING


@dataclass(frozen=True)
class Measure:
    """A part of the table. `ways` are those that it is for; empty: all."""

    name: str
    title: str
    run: Callable[[Slot], Awaitable[Figures]]
    columns: Sequence[Column]
    ways: Sequence[str] = ()
    when: When = When.ROUNDS


_EACH = (
    Column("gateway", "gateway_us", 1),
    Column("scheduler", "scheduler_us", 1),
    Column("NATS", "nats_us", 1),
    Column("rest", "rest_us", 1),
)
_RATES = (
    Column("busy %", "busy_percent"),
    Column("per core-s", "per_core"),
    Column("x nginx", "per_core", 2, Against.BASE),
)


def measures(settings: BenchSettings) -> list[Measure]:
    """Everything, in the order of the table."""
    rate, connections, streams = settings.rate, settings.connections, settings.streams
    chat_columns = (Column("req/s", "rate"), Column("x nginx", "rate", 2, Against.BASE), *_RATES, *_EACH)

    async def small(slot: Slot) -> Figures:
        return _figures(await loads.chats(slot, SMALL_BYTES, connections))

    async def large(slot: Slot) -> Figures:
        return _figures(await loads.chats(slot, LARGE_BYTES, connections))

    async def latency(slot: Slot) -> Figures:
        return _times(await loads.steady_chats(slot, SMALL_BYTES, rate))

    async def paced(slot: Slot) -> Figures:
        window = await loads.paced_streams(slot, SMALL_BYTES, streams, settings.pace_ms)
        return _figures(window) | _times(window)

    async def fast(slot: Slot) -> Figures:
        return _figures(await loads.fast_streams(slot, SMALL_BYTES, streams))

    async def memory(slot: Slot) -> Figures:
        return await _memory(slot, settings.open_streams)

    async def hostile(slot: Slot) -> Figures:
        return await _hostile(slot, rate)

    return [
        Measure("chat-1k", f"1 KB chats, {connections} connections", small, chat_columns),
        Measure("chat-16k", f"16 KB chats, {connections} connections", large, chat_columns),
        Measure("latency", f"1 KB chats at {rate:g} a second", latency, _latency_columns("")),
        Measure(
            "paced",
            f"{streams} streams, chunks {settings.pace_ms} ms apart: CPU and delay of a chunk",
            paced,
            (Column("chunks/s", "rate"), *_paced_columns(), *_latency_columns("delay ")),
        ),
        Measure(
            "fast",
            f"{streams} streams as fast as they go: chunks",
            fast,
            (Column("chunks/s", "rate"), Column("x nginx", "rate", 2, Against.BASE), *_RATES, _EACH[0]),
        ),
        Measure(
            "memory",
            f"memory, idle and with {settings.open_streams} open streams",
            memory,
            (
                Column("idle MB", "idle_mb", 1),
                Column("open MB", "open_mb", 1),
                Column("KB/stream", "stream_kb", 1),
            ),
            ways=(NGINX, LOCAL, LEAST_REQUEST),
            when=When.FIRST,
        ),
        Measure(
            "hostile",
            f"1 KB chats at {rate:g} a second beside one client's bodies of 4 MiB: added p99, us",
            hostile,
            (
                Column("quiet p99", "quiet_us"),
                *(Column(f"+ {name}", name) for name in SHAPES),
                Column("worst us", "worst_us"),
                Column("bodies", "bodies"),
                Column("refused", "refused"),
            ),
            ways=(DIRECT, NGINX, LOCAL, LEAST_REQUEST),
            when=When.LAST,
        ),
    ]


def _latency_columns(what: str) -> tuple[Column, ...]:
    return (
        Column(f"{what}p50 us", "p50_us"),
        Column("added p50", "p50_us", 0, Against.DIRECT),
        Column(f"{what}p99 us", "p99_us"),
        Column("added p99", "p99_us", 0, Against.DIRECT),
    )


def _paced_columns() -> tuple[Column, ...]:
    return Column("gateway us", "gateway_us", 1), Column("x nginx", "gateway_us", 2, Against.BASE)


def _figures(window: Window) -> Figures:
    return {
        "rate": window.rate,
        "busy_percent": window.gateway_ratio * 100,
        "foreign_percent": window.foreign_ratio * 100,
        "per_core": window.per_core,
        "gateway_us": window.each_us(GATEWAY),
        "scheduler_us": window.each_us(SCHEDULER),
        "nats_us": window.each_us(NATS),
        "rest_us": window.each_us(REST),
    }


def _times(window: Window) -> Figures:
    return {
        "foreign_percent": window.foreign_ratio * 100,
        "p50_us": window.percentile_us(50),
        "p99_us": window.percentile_us(99),
        "max_us": window.percentile_us(100),
    }


async def _memory(slot: Slot, streams: int) -> Figures:
    gateway = slot.way.parts[GATEWAY]
    idle_mb = resident_mb(gateway)
    open_mb = await loads.held_streams(slot, SMALL_BYTES, streams, lambda: resident_mb(gateway))
    return {"idle_mb": idle_mb, "open_mb": open_mb, "stream_kb": (open_mb - idle_mb) * 1000 / streams}


async def _hostile(slot: Slot, rate: float) -> Figures:
    quiet = _times(await loads.steady_chats(slot, SMALL_BYTES, rate))
    figures = {"quiet_us": quiet["p99_us"], "worst_us": 0.0, "bodies": 0.0, "refused": 0.0}
    for name, shape in SHAPES.items():
        attack = Attack(slot.way.addresses[0], shape(), slot.way.headers, slot.tally)
        async with loads.beside(attack.run(), f"attack-{name}"):
            stalled = _times(await loads.steady_chats(slot, SMALL_BYTES, rate))
        figures[name] = stalled["p99_us"] - quiet["p99_us"]
        figures["worst_us"] = max(figures["worst_us"], stalled["max_us"])
        figures["bodies"] += attack.statuses.total()
        figures["refused"] += sum(n for status, n in attack.statuses.items() if status.startswith("4"))
    return figures
