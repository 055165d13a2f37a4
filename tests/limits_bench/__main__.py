"""CPU of the ingress for each request, and requests a second, with and without limits and API keys.

An ingress for each setting, of one worker, all before the same scheduler and engines. The settings take turns
in one run, in another order each round, so that what else the machine does falls on all. `every` asks as
another user each time, so that each claim waits for the store; the others ask as one user, whose claims are
granted by leases. Both limits, of requests and of tokens, apply.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import psutil
import uvloop
from integration.redis_lab import RedisServer
from integration.servers import Process, free_port
from integration.stack import Stack, running_stack

from penstock.cli.bench.clients import Address, ChatClient, Tally, connect
from penstock.cli.bench.cores import choose_cores
from penstock.cli.bench.way import GATEWAY, Way
from penstock.cli.bench.window import Slot, Window
from penstock.cli.bench.wire import Requests

LIMITS = ("--limits-default-rpm", str(10**9), "--limits-default-tpm", str(10**12))
KEY = "bench"  # What the load generator sends as its bearer token.
NO_USER = b"user: u" + b"0" * 16


class Setting(NamedTuple):
    """What is measured: the ingress's flags, whether users differ, and what it is compared with."""

    flags: tuple[str, ...] = ()
    every: bool = False
    base: str = "off"


class Bench:
    """Ingresses, and what was measured by setting."""

    def __init__(
        self, stack: Stack, redis: RedisServer, settings: dict[str, Setting], flags: argparse.Namespace
    ) -> None:
        self._stack, self._settings, self._flags = stack, settings, flags
        assert redis.process is not None
        self._stores = {"nats": [stack.nats.process.pid], "redis": [redis.process.pid]}
        self._ways: dict[str, Way] = {}
        self._windows: dict[str, list[Window]] = defaultdict(list)
        self._tally = Tally()

    async def run(self) -> None:
        """Every setting in every round."""
        started: dict[tuple[tuple[str, ...], bool], Way] = {}
        for name, setting in self._settings.items():
            place = setting.flags, setting.every
            if place not in started:
                ingress = self._stack.start_ingress("--access-log", "false", *setting.flags)
                url = f"{ingress.admin_url}/readyz"
                await asyncio.to_thread(ingress.process.wait_for_http, url, timeout_s=60)
                parts = {GATEWAY: [_worker(ingress.process)], **self._stores}
                started[place] = Way(name, [Address("127.0.0.1", ingress.port)], parts=parts)
            self._ways[name] = started[place]
        for number in range(-1, self._flags.rounds):
            for name in random.sample(list(self._settings), len(self._settings)):
                window = await self._measure(name)
                if number >= 0:
                    self._windows[name].append(window)

    async def _measure(self, name: str) -> Window:
        slot = Slot(self._ways[name], self._flags.seconds, Tally(), random.Random(), choose_cores())
        requests = self._requests(slot.rng, every=self._settings[name].every)
        running = True

        def again(client: ChatClient) -> None:
            if running:
                client.ask(*next(requests))

        clients = await connect(
            partial(ChatClient, slot.tally, again), slot.way.addresses, self._flags.connections
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

    def _requests(self, rng: random.Random, *, every: bool) -> Iterator[tuple[bytes, bytes]]:
        for request, nonce in Requests(rng, self._flags.body_bytes, NO_USER.decode() + "\r\n"):
            user = b"user: u" + nonce if every else NO_USER
            yield request.replace(NO_USER, user, 1), nonce

    def print(self) -> None:
        """The median over rounds; ratios are made inside a round. `least`: the round with the least CPU for a
        request, which what else the machine did disturbed least, and how far it is above that of the base."""
        print("\n| | req/s | of without | gateway µs | least | NATS | Redis | µs more | of the gateway |")
        print("|---|---|---|---|---|---|---|---|---|")
        median = statistics.median
        for name, setting in self._settings.items():
            own, base = self._windows[name], self._windows[setting.base]
            each = [window.each_us(GATEWAY) for window in own]
            more = [a - b.each_us(GATEWAY) for a, b in zip(each, base, strict=True)]
            share = [100 * a / b.each_us(GATEWAY) for a, b in zip(more, base, strict=True)]
            rates = [100 * a.rate / b.rate for a, b in zip(own, base, strict=True)]
            nats, redis = (median(window.each_us(part) for window in own) for part in self._stores)
            above = 100 * min(each) / min(window.each_us(GATEWAY) for window in base) - 100
            print(
                f"| {name} | {median(window.rate for window in own):.0f} | {median(rates):.0f} % | "
                f"{median(each):.1f} | {min(each):.1f} ({above:+.1f} %) | {nats:.1f} | {redis:.1f} | "
                f"{median(more):+.1f} | {median(share):+.1f} % ({min(share):+.1f}..{max(share):+.1f}) |"
            )


def _worker(process: Process) -> int:
    """The one worker of an ingress."""
    children = psutil.Process(process.pid).children()
    (pid,) = [child.pid for child in children if "penstock.ingress.worker" in child.cmdline()]
    return pid


def settings_of(redis: RedisServer, folder: Path) -> dict[str, Setting]:
    """What is compared."""
    keys = folder / "keys.json"
    keys.write_text(json.dumps({"bench": {"owner": "b", "hashes": [sha256(KEY.encode()).hexdigest()]}}))
    of_redis = (*LIMITS, "--limits-store", "redis", "--limits-redis-url", f"redis://{redis.address}/0")
    of_bus = (*LIMITS, "--limits-store", "nats")
    return {
        "off": Setting(),
        "off, every": Setting(every=True),
        "keys": Setting(("--api-keys", str(keys))),
        "memory": Setting((*LIMITS, "--limits-store", "memory")),
        "nats": Setting(of_bus),
        "redis": Setting(of_redis),
        "nats, keys": Setting((*of_bus, "--api-keys", str(keys))),
        "nats, every": Setting(of_bus, every=True, base="off, every"),
        "redis, every": Setting(of_redis, every=True, base="off, every"),
    }


async def measure(flags: argparse.Namespace, folder: Path) -> None:
    """Start everything, then measure."""
    with RedisServer("--appendonly", "no") as redis, running_stack() as stack:
        port = free_port()
        engine = stack.exits.enter_context(Process.module("penstock.cli.bench.responder", str(port)))
        engine.wait_for_http(f"http://127.0.0.1:{port}/health")
        stack.engines.append(f"127.0.0.1:{port}")
        stack.start_discovery()
        if not flags.local:
            stack.start_scheduler()
        settings = settings_of(redis, folder)
        chosen = {
            name: one for name, one in settings.items() if not flags.only or name in flags.only.split("+")
        }
        bench = Bench(stack, redis, chosen, flags)
        await bench.run()
        bench.print()


def main() -> None:
    """Flags say how much."""
    parser = argparse.ArgumentParser(prog="limits_bench", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2, help="of each setting in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--body-bytes", type=int, default=1024, help="of each request")
    parser.add_argument("--local", action="store_true", help="without a scheduler")
    parser.add_argument("--only", default="", help="settings by name, with + between them; off is needed")
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        uvloop.run(measure(parser.parse_args(), Path(folder)))


if __name__ == "__main__":
    main()
