"""The service as a process, with many engines: start, probes, refreshes, memory."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import psutil
from integration.servers import NatsServer, Process, eventually, free_port

from discovery_bench import engines as program

PATIENCE_S = 300.0
MIB = 1024 * 1024


@contextlib.contextmanager
def engines(count: int, metrics_bytes: int) -> Iterator[list[str]]:
    """Their endpoints."""
    argv = [sys.executable, program.__file__, str(count), str(metrics_bytes)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        listed: list[str] = []
        try:
            for line in process.stdout:
                if line.strip() == "listening":
                    break
                listed.append(line.strip())
            assert len(listed) == count, "the engines did not start"
            yield listed
        finally:
            process.kill()


class Service:
    """A service of Penstock on its own ports."""

    def __init__(self, name: str, nats: NatsServer, *flags: str) -> None:
        self.name, self.port = name, free_port()
        self.started_at = time.monotonic()
        argv = ("--nats-url", nats.url, "--admin-port", str(self.port), *flags)
        self.process = Process.module(f"penstock.{name}", *argv)
        self._seen = psutil.Process(self.process.pid)

    @property
    def memory_mib(self) -> float:
        """Resident memory of the service and its workers."""
        members = [self._seen, *self._seen.children(recursive=True)]
        return sum(member.memory_info().rss for member in members) / MIB

    def cpu_s(self) -> float:
        """CPU seconds so far."""
        times = self._seen.cpu_times()
        return times.user + times.system

    async def until(self, session: aiohttp.ClientSession, metric: str, value: float) -> float:
        """Seconds from the start until a metric is at least `value`."""

        async def reached() -> bool:
            return await self.read(session, metric) >= value

        await eventually(reached, PATIENCE_S)
        return time.monotonic() - self.started_at

    async def read(self, session: aiohttp.ClientSession, metric: str) -> float:
        """The sum of a metric's samples; -1 if nobody answers."""
        try:
            async with session.get(f"http://127.0.0.1:{self.port}/metrics") as response:
                text = await response.text()
        except aiohttp.ClientError:
            return -1.0
        lines = [line for line in text.splitlines() if line.startswith((metric + " ", metric + "{"))]
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else -1.0

    async def spent(self, seconds: float) -> float:
        """Part of a core that it uses over the next seconds."""
        before, began = self.cpu_s(), time.monotonic()
        await asyncio.sleep(seconds)
        return (self.cpu_s() - before) / (time.monotonic() - began)


@contextlib.asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def measure(count: int, interval_s: float, metrics_bytes: int, folder: Path) -> Iterator[str]:
    """Lines of the report."""
    said: list[str] = []
    path = folder / "engines"
    nats = NatsServer()
    nats.start()
    with engines(count, metrics_bytes) as listed:
        path.write_text("\n".join(listed) + "\n")
        async with _session() as session:
            ingress = Service("ingress", nats, "--host", "127.0.0.1", "--port", str(free_port()))
            scheduler, mirror = Service("scheduler", nats), Service("mirror", nats)
            discovery = Service(
                "discovery", nats, "--llm-backend-endpoints", f"@{path}", "--probe-interval", str(interval_s)
            )
            await discovery.until(session, "penstock_ready", 1)
            ready_s = time.monotonic() - discovery.started_at
            started_cpu_s = discovery.cpu_s()
            await ingress.until(session, "penstock_registry_taking_work", count)
            said.append(
                f"{count} instances, cold: discovery ready after {ready_s:.1f} s "
                f"({started_cpu_s:.1f} s of CPU, start of Python included), all taking work in the ingress "
                f"after {time.monotonic() - discovery.started_at:.1f} s"
            )
            await asyncio.sleep(2 * interval_s)
            idle = await discovery.spent(20.0)
            said.append(
                f"probes every {interval_s:g} s, metrics of {metrics_bytes} bytes: "
                f"{100 * idle:.1f} % of a core, {1e6 * idle * interval_s / count:.0f} us a probe"
            )
            said.append(await _refreshes(discovery, path, listed, idle))
            said.extend(
                f"memory of {service.name}: {service.memory_mib:.0f} MiB"
                for service in (discovery, ingress, scheduler, mirror)
            )
            for service in (discovery, ingress, scheduler, mirror):
                service.process.kill()
    nats.kill()
    return iter(said)


async def _refreshes(discovery: Service, path: Path, listed: list[str], idle: float, rounds: int = 10) -> str:
    """The cost of reading the whole list again."""
    before, began = discovery.cpu_s(), time.monotonic()
    for number in range(rounds):
        fresh = path.with_name("engines.new")
        fresh.write_text("\n".join([f"# {number}", *listed, ""]))
        fresh.replace(path)
        await asyncio.sleep(1.0)
    spent = discovery.cpu_s() - before - idle * (time.monotonic() - began)
    return f"a full refresh of {len(listed)} instances without a change: {1e3 * spent / rounds:.0f} ms of CPU"
