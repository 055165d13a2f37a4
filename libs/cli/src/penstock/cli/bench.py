"""`python -m penstock.cli.bench`: the gateway beside direct calls, and what a request costs each process.

One machine carries load, engines and gateway, so requests a second say little by themselves; the ratio of
interleaved rounds and the CPU time a request are what to compare.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import psutil
import uvloop
from pydantic import Field

from penstock.cli.load import Result, exchanges, run_round
from penstock.cli.processes import Child, Command, Supervisor
from penstock.common.settings import Settings, load_or_exit

PROG = "python -m penstock.cli.bench"
START_S, STOP_S = 60.0, 30.0
KEPT_LINES = 20


class BenchSettings(Settings):
    """Measure 1 KB chats through the stack of `penstock up`, beside the same chats sent to its engines."""

    seconds: float = Field(5.0, ge=0.1, le=3600, description="seconds of load on each of both ways")
    round_seconds: float = Field(0.5, ge=0.1, le=60, description="seconds until the other way has its turn")
    connections: int = Field(32, ge=1, le=10_000, description="connections, each with one request under way")
    engines: int = Field(2, ge=1, le=64, description="simulated engines, which answer in no modelled time")
    policy: str = Field("", description="routing strategy; the scheduler's default if empty")
    access_log: bool = Field(False, description="let the ingress log every request")


class BenchFailed(Exception):
    """There is nothing to report; says why."""


@dataclass
class Measured:
    """Both ways, and CPU seconds by process while the gateway was under load."""

    direct: Result = field(default_factory=Result)
    gateway: Result = field(default_factory=Result)
    cpu_s: dict[str, float] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; exit code 1 if any answer was wrong."""
    settings = load_or_exit(BenchSettings, argv, prog=PROG)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            measured = runner.run(_bench(settings))
    except BenchFailed as exc:
        print(f"{PROG}: {exc}", file=sys.stderr)
        return 1
    print(report(settings, measured))
    return 1 if measured.direct.failures or measured.gateway.failures else 0


async def _bench(settings: BenchSettings) -> Measured:
    stack = _Stack()
    try:
        ready = await stack.start(settings)
        return await _measure(settings, stack, ready)
    finally:
        await stack.stop()


async def _measure(settings: BenchSettings, stack: _Stack, ready: dict[str, Any]) -> Measured:
    work = exchanges(ready["model"], settings.policy)
    ways = {"direct": ready["engines"], "gateway": [ready["url"]]}
    measured = Measured()

    async def one(way: str, seconds: float) -> Result:
        return await run_round(ways[way], work, settings.connections, seconds)

    for way in ways:
        await one(way, settings.round_seconds)
    rounds = max(1, round(settings.seconds / settings.round_seconds))
    for number in range(rounds):
        # Each way is first in every other pair: drift of the machine meets both alike.
        for way in sorted(ways, reverse=bool(number % 2)):
            if way == "direct":
                measured.direct.add(await one(way, settings.round_seconds))
                continue
            before = stack.cpu_s()
            measured.gateway.add(await one(way, settings.round_seconds))
            for name, seconds in stack.cpu_s().items():
                measured.cpu_s[name] = measured.cpu_s.get(name, 0.0) + seconds - before.get(name, 0.0)
    return measured


class _Stack:
    """`penstock up` as a child, with engines that compute in no time."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._ready: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._supervisor = Supervisor(self._on_line, self._on_death)

    async def start(self, settings: BenchSettings) -> dict[str, Any]:
        """What `penstock up` says once it is ready. Raises BenchFailed."""
        flags = ["--port=0", "--admin-port=0", "--log-json", "--sim-instant", f"--sim={settings.engines}"]
        flags += ["--access-log" if settings.access_log else "--access-log=false"]
        argv = (sys.executable, "-m", "penstock.cli", "up", *flags)
        self._child = self._supervisor.start(Command("up", argv, os.environ))
        try:
            async with asyncio.timeout(START_S):
                return await self._ready
        except TimeoutError:
            raise BenchFailed("the stack did not become ready:\n" + "\n".join(self._lines)) from None

    async def stop(self) -> None:
        """End it."""
        await self._supervisor.stop(self._supervisor.children, STOP_S)

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds used so far, user and system, by service."""
        used: dict[str, float] = {}
        for process in psutil.Process(self._child.pid).children():
            name, family = _service_of(process), [process, *process.children(recursive=True)]
            used[name] = used.get(name, 0.0) + sum(map(_cpu_s, family))
        return used

    def _on_line(self, child: Child, raw: bytes) -> None:
        self._lines = [*self._lines, raw.decode("utf-8", "replace")][-KEPT_LINES:]
        if b'"ready"' in raw and not self._ready.done():
            line = msgspec.json.decode(raw, type=dict[str, Any])
            if line.get("service") == "up" and line.get("message") == "ready":
                self._ready.set_result(line)

    def _on_death(self, child: Child, cause: str, delay_s: float) -> None:
        child.stopping.set()
        if not self._ready.done():
            lines = "\n".join(self._lines)
            self._ready.set_exception(BenchFailed(f"penstock up {cause}:\n{lines}"))


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _service_of(process: psutil.Process) -> str:
    words = process.cmdline()
    modules = [word.removeprefix("penstock.") for word in words if word.startswith("penstock.")]
    return modules[0] if modules else process.name()


def report(settings: BenchSettings, measured: Measured) -> str:
    """The table."""
    direct, gateway = measured.direct, measured.gateway
    ratio = gateway.rate_rps / direct.rate_rps if direct.rate_rps else float("nan")
    lines = [
        f"1 KB chat, {settings.connections} connections, {settings.engines} simulated engines, "
        f"{direct.seconds:.1f} s each, in turns of {settings.round_seconds:g} s",
        "",
        f"{'':<10}{'req/s':>10}{'p50 ms':>10}{'p99 ms':>10}{'failed':>10}{'ratio':>10}",
        *(
            f"{name:<10}{r.rate_rps:>10.0f}{r.percentile_ms(50):>10.2f}{r.percentile_ms(99):>10.2f}"
            f"{len(r.failures):>10}{part:>10.2f}"
            for name, r, part in (("direct", direct, 1.0), ("gateway", gateway, ratio))
        ),
        "",
        f"{'CPU per request through the gateway':<42}us",
    ]
    requests = max(1, len(gateway.latencies_s))
    rows = sorted(measured.cpu_s.items(), key=lambda item: -item[1])
    lines += [f"  {name:<35}{seconds / requests * 1e6:>7.0f}" for name, seconds in rows]
    failures = Counter(direct.failures + gateway.failures).most_common(3)
    return "\n".join([*lines, *(f"failed {count} times: {cause}" for cause, count in failures)])


if __name__ == "__main__":
    sys.exit(main())
