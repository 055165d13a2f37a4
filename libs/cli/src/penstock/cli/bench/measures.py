"""What is measured: a load on one way, and the figures that come of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from penstock.cli.bench import loads
from penstock.cli.bench.attack import Attack
from penstock.cli.bench.cores import resident_mb
from penstock.cli.bench.settings import BenchSettings
from penstock.cli.bench.shapes import SHAPES
from penstock.cli.bench.way import CACHE_AWARE, DIRECT, GATEWAY, NATS, PREFIX_CACHE, REST, SCHEDULER, WAYS
from penstock.cli.bench.window import Slot, Window

SMALL_BYTES, LARGE_BYTES = 1024, 16 * 1024
Figures = dict[str, float]


class Against(Enum):
    """What a column shows of a metric."""

    NOTHING = "itself"
    BASE = "ratio to nginx"
    LEAST = "ratio to least-request"
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
    """A part of the table; names of settings stand in the title's braces.

    `skips` are ways that would show nothing of their own, `peers` whether other routers take part.
    """

    name: str
    title: str
    run: Callable[[Slot, BenchSettings], Awaitable[Figures]]
    columns: Sequence[Column]
    skips: Sequence[str] = ()
    peers: bool = True
    when: When = When.ROUNDS

    def ways(self, every: Iterable[str]) -> list[str]:
        """Those of `every` that are measured."""
        return [way for way in every if way not in self.skips and (self.peers or way in WAYS)]


async def _small_chats(slot: Slot, settings: BenchSettings) -> Figures:
    return _figures(await loads.chats(slot, SMALL_BYTES, settings.connections))


async def _large_chats(slot: Slot, settings: BenchSettings) -> Figures:
    return _figures(await loads.chats(slot, LARGE_BYTES, settings.connections))


async def _latency(slot: Slot, settings: BenchSettings) -> Figures:
    return _times(await loads.steady_chats(slot, SMALL_BYTES, settings.rate))


async def _paced(slot: Slot, settings: BenchSettings) -> Figures:
    window = await loads.paced_streams(slot, SMALL_BYTES, settings.streams, settings.pace_ms)
    return _figures(window) | _times(window)


async def _fast(slot: Slot, settings: BenchSettings) -> Figures:
    return _figures(await loads.fast_streams(slot, SMALL_BYTES, settings.streams))


async def _memory(slot: Slot, settings: BenchSettings) -> Figures:
    gateway, streams = slot.way.parts[GATEWAY], settings.open_streams
    idle_mb = resident_mb(gateway)
    open_mb = await loads.held_streams(slot, SMALL_BYTES, streams, lambda: resident_mb(gateway))
    return {"idle_mb": idle_mb, "open_mb": open_mb, "stream_kb": (open_mb - idle_mb) * 1000 / streams}


async def _hostile(slot: Slot, settings: BenchSettings) -> Figures:
    async def times() -> Figures:
        return _times(await loads.steady_chats(slot, SMALL_BYTES, settings.rate))

    before, stalled, statuses = await times(), dict[str, Figures](), Counter[str]()
    for name, shape in SHAPES.items():
        attack = Attack(slot.way.addresses[0], shape(), slot.way.headers, slot.tally)
        async with loads.beside(attack.run(), f"attack-{name}"):
            stalled[name] = await times()
        statuses += attack.statuses
    after = await times()
    # The calmer of two: what else the machine does would hide a stall, not make one.
    quiet_us = min(before["p99_us"], after["p99_us"])
    return {
        **{name: seen["p99_us"] - quiet_us for name, seen in stalled.items()},
        "quiet_us": quiet_us,
        "worst_us": max(seen["max_us"] for seen in stalled.values()),
        "bodies": float(statuses.total()),
        "refused": float(sum(count for status, count in statuses.items() if status.startswith("4"))),
    }


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


_GATEWAY_US = Column("gateway us", "gateway_us", 1)
_RATES = (
    Column("x nginx", "rate", 2, Against.BASE),
    Column("busy %", "busy_percent"),
    Column("per core-s", "per_core"),
    Column("x nginx", "per_core", 2, Against.BASE),
    _GATEWAY_US,
)
_CHAT = (
    Column("req/s", "rate"),
    *_RATES,
    Column("scheduler", "scheduler_us", 1),
    Column("NATS", "nats_us", 1),
    Column("rest", "rest_us", 1),
    Column("req/s x least-request", "rate", 2, Against.LEAST),
    Column("per core", "per_core", 2, Against.LEAST),
)
_TIMES = (
    Column("p50 us", "p50_us"),
    Column("added p50", "p50_us", 0, Against.DIRECT),
    Column("p99 us", "p99_us"),
    Column("added p99", "p99_us", 0, Against.DIRECT),
)
_BYTES = (
    Column("idle MB", "idle_mb", 1),
    Column("open MB", "open_mb", 1),
    Column("KB/stream", "stream_kb", 1),
)
_STALLS = (
    Column("quiet p99", "quiet_us"),
    *(Column(f"+ {name}", name) for name in SHAPES),
    Column("worst us", "worst_us"),
    Column("bodies", "bodies"),
    Column("refused", "refused"),
)

# In the order of the table.
TABLE = (
    Measure("chat-1k", "1 KB chats, {connections} connections", _small_chats, _CHAT),
    Measure("chat-16k", "16 KB chats, {connections} connections", _large_chats, _CHAT),
    Measure("latency", "1 KB chats at {rate:g} a second", _latency, _TIMES),
    Measure(
        "paced",
        "{streams} streams, chunks {pace_ms} ms apart: CPU and delay of a chunk",
        _paced,
        (
            Column("chunks/s", "rate"),
            _GATEWAY_US,
            Column("x nginx", "gateway_us", 2, Against.BASE),
            *_TIMES,
        ),
    ),
    Measure(
        "fast",
        "{streams} streams as fast as they go: chunks",
        _fast,
        (Column("chunks/s", "rate"), *_RATES),
    ),
    Measure(
        "memory",
        "memory, idle and with {open_streams} open streams",
        _memory,
        _BYTES,
        skips=(DIRECT, PREFIX_CACHE, CACHE_AWARE),
        when=When.FIRST,
    ),
    Measure(
        "hostile",
        "1 KB chats at {rate:g} a second beside one client's bodies of 4 MiB: added p99, us",
        _hostile,
        _STALLS,
        skips=(PREFIX_CACHE, CACHE_AWARE),
        peers=False,
        when=When.LAST,
    ),
)
