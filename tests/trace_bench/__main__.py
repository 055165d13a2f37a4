"""CPU of ingress and scheduler for each request, and requests a second, with and without traces.

A whole stack for each setting: NATS, discovery, a scheduler, an ingress of one worker on a core of its own.
The settings take turns in one run, in another order each round. `off again` is `off` in a second stack: what
it differs by is noise. Spans go over OTLP to a collector on the other cores, by the ingress's parent and by
the scheduler.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import random
import re
import statistics
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import psutil
import uvloop
from integration.servers import Process, free_port
from integration.stack import Stack, running_stack

from penstock.cli.bench.clients import Address, ChatClient, Tally, connect
from penstock.cli.bench.cores import choose_cores, pin
from penstock.cli.bench.way import GATEWAY, NATS, SCHEDULER, Way
from penstock.cli.bench.window import Slot, Window
from penstock.cli.bench.wire import Requests

PARENT = "parent"
PARTS = (GATEWAY, PARENT, SCHEDULER, NATS)
OFF = ("off", "off again")
CORES = choose_cores()


class Bench:
    """A stack for each setting, and what was measured of it."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self._flags = flags
        self._spans: dict[str, str] = {}
        self._windows: dict[str, list[Window]] = defaultdict(list)

    async def run(self, settings: dict[str, Sequence[str]], engine: str) -> None:
        """Start each setting, then measure them in every round; all anew for each stand: two processes of one
        program differ by a percent for as long as they live."""
        for _ in range(self._flags.stands):
            with contextlib.ExitStack() as exits:
                stacks = {name: exits.enter_context(running_stack()) for name in settings}
                ways = {}
                for name, stack in stacks.items():
                    stack.engines.append(engine)
                    ways[name] = await asyncio.to_thread(self._started, name, stack, settings[name])
                for number in range(-1, self._flags.rounds):
                    windows = {}
                    for name in random.sample(list(settings), len(settings)):
                        windows[name] = await self._measure(ways[name])
                    # The first warms up; one in which the machine stood still says nothing of anybody.
                    if number >= 0 and all(window.done for window in windows.values()):
                        for name, window in windows.items():
                            self._windows[name].append(window)
                self._spans = {name: _spans(stack) for name, stack in stacks.items()}
        self.print()

    def _started(self, name: str, stack: Stack, flags: Sequence[str]) -> Way:
        endpoint = [flag for flag in flags if flag.startswith("--otlp")]
        stack.start_discovery()
        stack.start_scheduler(*endpoint)
        ingress = stack.start_ingress("--access-log", "false", *flags)
        ingress.process.wait_for_http(f"{ingress.admin_url}/readyz", timeout_s=240)
        parent = ingress.process.pid
        (worker,) = (
            child.pid
            for child in psutil.Process(parent).children()
            if "penstock.ingress.worker" in child.cmdline()
        )
        pin(worker, CORES.gateway)
        parts = {
            GATEWAY: [worker],
            PARENT: [parent],
            SCHEDULER: [stack.schedulers[0].pid],
            NATS: [stack.nats.process.pid],
        }
        headers = f"routing-strategy: {self._flags.strategy}\r\n"
        mark = f"\r\n{headers}".encode().rstrip(b"\r\n")
        return Way(name, [Address("127.0.0.1", ingress.port)], headers=headers, mark=mark, parts=parts)

    async def _measure(self, way: Way) -> Window:
        slot = Slot(way, self._flags.seconds, Tally(way.mark), random.Random(), CORES)
        requests, running = iter(Requests(slot.rng, self._flags.body_bytes, way.headers)), True

        def again(client: ChatClient) -> None:
            if running:
                client.ask(*next(requests))

        clients = await connect(
            partial(ChatClient, slot.tally, again), way.addresses, self._flags.connections
        )
        for client in clients:
            client.ask(*next(requests))
        await asyncio.sleep(slot.warm_s)
        window = await slot.window()
        running = False
        for client in clients:
            client.close()
        assert not slot.tally.failed, slot.tally.failures[:1]
        return window

    def print(self) -> None:
        """Medians over the rounds; ratios are made inside each round, to the mean of the two `off`."""
        heads = [
            "",
            "req/s",
            *(f"{part} µs" for part in PARTS),
            "ingress, × off",
            "all, × off",
            "req/s, × off",
        ]
        print(f"\n| {' | '.join(heads)} |")
        print("|---" * len(heads) + "|")
        for name, own in self._windows.items():
            cells = [f"{statistics.median(one.rate for one in own):.0f}"]
            cells += [f"{statistics.median(one.each_us(part) for one in own):.1f}" for part in PARTS]
            cells += [self._ratio(own, partial(_cpu_us, parts)) for parts in ((GATEWAY, PARENT), PARTS)]
            cells.append(self._ratio(own, lambda window: window.rate))
            print(f"| {name} | {' | '.join(cells)} |")
        for name, spans in self._spans.items():
            print(f"spans of {name}, in the last stand: {spans}")

    def _ratio(self, own: Sequence[Window], of: Callable[[Window], float]) -> str:
        """The median and its standard error, as of a normal distribution with these quartiles."""
        bases = zip(*(self._windows[name] for name in OFF), strict=True)
        base = [statistics.fmean(of(window) for window in both) for both in bases]
        ratios = [of(window) / least for window, least in zip(own, base, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        error = 1.25 * (high - low) / 1.35 / math.sqrt(len(ratios))
        return f"{middle:.3f} ± {error:.3f}"


def _cpu_us(parts: Sequence[str], window: Window) -> float:
    """Of each request, all parts together."""
    return sum(window.each_us(part) for part in parts)


def _spans(stack: Stack) -> str:
    """What ingress and scheduler say became of their spans."""
    said = []
    for port in (stack.ingresses[0].admin_port, stack.scheduler_ports[0]):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
            text = response.read().decode()
        said += re.findall(r'^penstock_trace_spans_total\{result="(\w+)"\} (\d+)', text, re.MULTILINE)
    return ", ".join(f"{count} {result}" for result, count in said) or "none"


async def measure(flags: argparse.Namespace) -> None:
    """Start everything, then measure."""
    pin(os.getpid(), CORES.load)
    port, collector = free_port(), free_port()
    with (
        Process.module("penstock.cli.bench.responder", str(port)) as engine,
        Process.module("trace_bench.sink", str(collector)) as sink,
    ):
        engine.wait_for_http(f"http://127.0.0.1:{port}/health")
        sink.wait_for_http(f"http://127.0.0.1:{collector}/")
        endpoint = f"--otlp-endpoint=http://127.0.0.1:{collector}"
        settings: dict[str, Sequence[str]] = dict.fromkeys(OFF, ())
        for percent in flags.percent.split(","):
            settings[f"{percent} %"] = (endpoint, f"--trace-sample-ratio={float(percent) / 100}")
        await Bench(flags).run(settings, f"127.0.0.1:{port}")


def main() -> None:
    """Flags say how much."""
    parser = argparse.ArgumentParser(prog="trace_bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2, help="of each setting in each round")
    parser.add_argument("--stands", type=int, default=3, help="times that everything is started anew")
    parser.add_argument("--rounds", type=int, default=15, help="in each stand")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--body-bytes", type=int, default=1024, help="of each request")
    parser.add_argument("--strategy", default="least-request", help="routing strategy of the requests")
    parser.add_argument("--percent", default="1", help="of the requests that are traced; several with commas")
    uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
