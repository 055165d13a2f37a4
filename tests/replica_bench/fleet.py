"""The processes of a measurement: NATS, schedulers, and for live ones engines, discovery and an ingress."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from integration.servers import NatsServer, Process, free_port


@dataclass
class Fleet:
    """What runs. `engines` are the addresses of each engine process."""

    nats: NatsServer
    folder: Path
    exits: contextlib.ExitStack
    schedulers: list[Process] = field(default_factory=list)
    admin_ports: list[int] = field(default_factory=list)
    engines: dict[Process, list[str]] = field(default_factory=dict)
    url: str = ""
    admin_url: str = ""

    @property
    def list_of_engines(self) -> Path:
        """The file that discovery reads."""
        return self.folder / "engines"

    def start_scheduler(self, *flags: str) -> None:
        """One more replica, ready."""
        port = free_port()
        self.admin_ports.append(port)
        self.schedulers.append(self._service("scheduler", "--admin-port", str(port), *flags))

    def start_engines(self, count: int, *flags: str) -> Process:
        """A process of so many engines; they are listed once `list_engines` is called."""
        sim = Process.module("penstock.sim", "--count", str(count), "--port", "0", *flags)
        self.exits.enter_context(sim)
        sim.wait_until(lambda: len(_addresses(sim)) == count or None, f"{count} engines")
        self.engines[sim] = _addresses(sim)
        return sim

    def list_engines(self) -> None:
        """Let discovery find those that run."""
        fresh = self.folder / "engines.new"
        fresh.write_text("\n".join(address for group in self.engines.values() for address in group) + "\n")
        fresh.replace(self.list_of_engines)

    def start_discovery(self) -> None:
        """Discovery of the listed engines."""
        listed = f"@{self.list_of_engines}"
        flags = "--llm-backend-endpoints", listed, "--probe-interval", "1", "--admin-port", "0"
        self._service("discovery", *flags)

    def start_ingress(self, workers: int, *flags: str) -> None:
        """One ingress with so many worker processes."""
        port, admin_port = free_port(), free_port()
        listeners = "--port", str(port), "--admin-port", str(admin_port)
        self._service("ingress", *listeners, "--workers", str(workers), *flags)
        self.url, self.admin_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}"

    def _service(self, name: str, *flags: str) -> Process:
        process = Process.module(f"penstock.{name}", "--nats-url", self.nats.url, *flags)
        self.exits.enter_context(process)
        return process


def _addresses(sim: Process) -> list[str]:
    return re.findall(r"listening on http://(\S+)", sim.stdout)


@contextlib.contextmanager
def running_fleet() -> Iterator[Fleet]:
    """A NATS server, and whatever is started on it until the block ends."""
    with NatsServer() as nats, contextlib.ExitStack() as exits:
        folder = exits.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-"))
        yield Fleet(nats, Path(folder), exits)
