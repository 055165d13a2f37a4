"""Penstock itself: the whole stack of `penstock up`, and an ingress that has no scheduler to ask."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from penstock.cli.bench.clients import Address
from penstock.cli.bench.contestant import Contestant, Started
from penstock.cli.bench.way import FULL, GATEWAY, LOCAL, NATS, REST, SCHEDULER, Way
from penstock.cli.nats_server import find_program
from penstock.cli.processes import Command

DRAIN_S = 2
# Words of a command line, and the part that it makes a process; the rest is REST.
_PARTS = {
    "penstock.ingress.worker": GATEWAY,
    "penstock.scheduler": SCHEDULER,
    "nats-server": NATS,
}


class FullStack(Contestant):
    """`penstock up` with the engines of the bench; one ingress for two routing strategies."""

    def __init__(
        self, engines: Sequence[Address], port: int, environ: Mapping[str, str], access_log: bool
    ) -> None:
        self._address = Address(engines[0].host, port)
        flags = (
            f"--llm-backend-endpoints={_listed(engines)}",
            f"--port={port}",
            "--admin-port=0",
            "--log-json",
            f"--drain-timeout={DRAIN_S}",
            f"--access-log={str(access_log).lower()}",
        )
        self.commands = [Command("up", (sys.executable, "-m", "penstock.cli", "up", *flags), environ)]

    def ways(self, started: Started) -> list[Way]:
        """By routing strategy."""
        parts = _parts([started.pid("up"), *started.children("up")])
        return [self._way(strategy, parts) for strategy in FULL]

    def _way(self, strategy: str, parts: Mapping[str, Sequence[int]]) -> Way:
        headers, mark = f"routing-strategy: {strategy}\r\n", f"\r\nrouting-strategy: {strategy}".encode()
        return Way(strategy, [self._address], headers=headers, mark=mark, parts=parts)


class LocalStack(Contestant):
    """NATS, discovery and an ingress: nobody answers when it asks for a placement."""

    def __init__(
        self,
        engines: Sequence[Address],
        ports: tuple[int, int],
        folder: Path,
        environ: Mapping[str, str],
        access_log: bool,
    ) -> None:
        nats_port, port = ports
        host = engines[0].host
        self._address = Address(host, port)
        bus = (f"--nats-url=nats://{host}:{nats_port}", "--admin-port=0", f"--drain-timeout={DRAIN_S}")
        store = ("-js", "-sd", str(folder / "local-nats"))
        nats = (find_program() or "nats-server", "-a", host, "-p", str(nats_port), *store)
        listener = (f"--host={host}", f"--port={port}", f"--access-log={str(access_log).lower()}")
        endpoints = f"--llm-backend-endpoints={_listed(engines)}"
        python = (sys.executable, "-m")
        self.commands = [
            Command("local-nats", nats, environ),
            Command("local-discovery", (*python, "penstock.discovery", *bus, endpoints), environ),
            Command("local-ingress", (*python, "penstock.ingress", *bus, *listener), environ),
        ]

    def ways(self, started: Started) -> list[Way]:
        """One, that never leaves the ingress."""
        names = [command.name for command in self.commands]
        pids = [pid for name in names for pid in (started.pid(name), *started.children(name))]
        return [Way(LOCAL, [self._address], mark=b"\r\nrouting-strategy: local", parts=_parts(pids))]


def _listed(engines: Sequence[Address]) -> str:
    return ",".join(f"{engine.host}:{engine.port}" for engine in engines)


def _parts(pids: Sequence[int]) -> dict[str, list[int]]:
    parts: dict[str, list[int]] = {}
    for pid in pids:
        words = psutil.Process(pid).cmdline()
        names = {Path(word).name for word in words}
        part = next((part for name, part in _PARTS.items() if name in names), REST)
        parts.setdefault(part, []).append(pid)
    return parts
