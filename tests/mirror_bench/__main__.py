"""Latency of requests, and CPU of the ingress per request, with the mirror off, on, and in trouble.

The states take turns in one run, in another order each round: what else the machine does falls on all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
from integration.servers import Process, eventually
from integration.stack import MODEL, Stack, metric, running_stack

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
SETTLE_S = 1.0
DEAD = "http://127.0.0.1:9"
LISTENING = r"listening on http://(\S+)"


class Bench:
    """A stack, its load, and what was measured by state."""

    def __init__(self, stack: Stack, config: Path, flags: argparse.Namespace) -> None:
        self._stack, self._config, self._flags = stack, config, flags
        self._shadow: Process | None = None
        # By state, the latencies of each round.
        self._rounds: dict[str, list[list[float]]] = defaultdict(list)
        self._cpu_s: dict[str, float] = defaultdict(float)
        self._failed: dict[str, int] = defaultdict(int)
        filler = "x" * flags.body_bytes
        self._body = json.dumps(
            {"model": MODEL, "messages": [{"role": "user", "content": filler}], "max_tokens": 4}
        ).encode()

    async def run(self) -> None:
        """Every state in every round."""
        self._shadow = self._stack.exits.enter_context(
            Process.module("penstock.sim", "--port", "0", "--speedup", "20")
        )
        url = f"http://{self._shadow.wait_for_line(LISTENING)[1]}"
        states: dict[str, Callable[[], Awaitable[None]]] = {
            "off": lambda: self._mirror(False, url),
            "on": lambda: self._mirror(True, url),
            "on, shadow frozen": lambda: self._mirror(True, url, frozen=self._shadow),
            "on, shadow dead": lambda: self._mirror(True, DEAD),
            "on, mirror frozen": lambda: self._mirror(True, url, frozen=self._stack.mirrors[0]),
        }
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for _ in range(self._flags.rounds):
                for name in random.sample(list(states), len(states)):
                    await states[name]()
                    await asyncio.sleep(SETTLE_S)
                    await self._measure(session, name)
                    for process in (self._shadow, self._stack.mirrors[0]):
                        process.thaw()
            name = "penstock_ingress_mirror_copies_total"
            copies = await metric(session, self._stack.ingresses[0].admin_port, name)
        print(f"\n{self._flags.rate} requests/s of {len(self._body)} bytes, {copies:.0f} copies\n")
        print("| mirror | requests | failed | p50 | p99 | ingress CPU |")
        print("|---|---|---|---|---|---|")
        for name in states:
            self._print(name)

    def _print(self, name: str) -> None:
        """The median over rounds, so that one in which the machine was busy does not decide."""
        rounds = [sorted(times) for times in self._rounds[name]]
        count = sum(map(len, rounds))
        p50, p99 = (
            1000 * statistics.median(times[int(len(times) * share)] for times in rounds)
            for share in (0.5, 0.99)
        )
        cpu_us = 1e6 * self._cpu_s[name] / count
        print(f"| {name} | {count} | {self._failed[name]} | {p50:.2f} ms | {p99:.2f} ms | {cpu_us:.0f} µs |")

    async def _mirror(self, on: bool, target: str, frozen: Process | None = None) -> None:
        fresh = self._config.with_name("fresh")
        fresh.write_text(json.dumps({"Enable": on, "Target": target, "Ratio": 100, "Timeout": 1000}))
        fresh.replace(self._config)
        # Seen by the file's next look, and by the ingress at once.
        await asyncio.sleep(SETTLE_S)
        if frozen is not None:
            frozen.freeze()

    async def _measure(self, session: aiohttp.ClientSession, name: str) -> None:
        loop, flags = asyncio.get_running_loop(), self._flags
        pending: set[asyncio.Task[None]] = set()
        self._rounds[name].append([])
        cpu_before, start = self._ingress_cpu_s(), loop.time()
        for number in range(int(flags.rate * flags.seconds)):
            await asyncio.sleep(max(0.0, start + number / flags.rate - loop.time()))
            task = asyncio.create_task(self._ask(session, name))
            pending.add(task)
            task.add_done_callback(pending.discard)
        await asyncio.gather(*pending)
        self._cpu_s[name] += self._ingress_cpu_s() - cpu_before

    async def _ask(self, session: aiohttp.ClientSession, name: str) -> None:
        url, began = f"{self._stack.url}/v1/chat/completions", time.perf_counter()
        headers = {"content-type": "application/json"}
        async with session.post(url, data=self._body, headers=headers) as response:
            await response.read()
            self._failed[name] += response.status != 200
        self._rounds[name][-1].append(time.perf_counter() - began)

    def _ingress_cpu_s(self) -> float:
        """User and system time of the ingress and of its workers."""
        parent, total = self._stack.ingresses[0].process.pid, 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(folder.name) == parent or int(fields[1]) == parent:
                total += int(fields[11]) + int(fields[12])
        return total / TICKS_PER_S


async def measure(flags: argparse.Namespace, folder: Path) -> None:
    """Start everything, then measure."""
    config = folder / "mirror.json"
    with running_stack() as stack:
        stack.start_sims(2)
        stack.start_discovery()
        stack.start_scheduler()
        stack.start_ingress("--access-log", "false")
        port = stack.start_mirror(config)
        await stack.ready()
        async with aiohttp.ClientSession() as session:
            await eventually(lambda: metric(session, port, "penstock_config_synced"))
        await Bench(stack, config, flags).run()


def main() -> None:
    """Flags say how much."""
    parser = argparse.ArgumentParser(prog="mirror_bench", description=__doc__)
    parser.add_argument("--rate", type=float, default=100, help="requests a second")
    parser.add_argument("--seconds", type=float, default=5, help="of each state in each round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--body-bytes", type=int, default=1024, help="of each prompt")
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        asyncio.run(measure(parser.parse_args(), Path(folder)))


if __name__ == "__main__":
    main()
