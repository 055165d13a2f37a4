"""Other routers that come as wheels: installed by pip in a folder of their own, when asked for."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.cli.bench.clients import Address
from penstock.cli.bench.contestant import Contestant, Started
from penstock.cli.bench.way import GATEWAY, Way
from penstock.cli.processes import Command

FOLDER = Path(".bench")
INSTALL_S = 600
POLICIES = ("round_robin", "cache_aware")


@dataclass(frozen=True)
class Peer:
    """A wheel, and the words after the venv's folder that start its router."""

    wheel: str
    program: tuple[str, ...]


PEERS = (
    Peer("sglang-router", ("bin/python", "-m", "sglang_router.launch_router")),
    Peer("vllm-router", ("bin/vllm-router",)),
)


class Router(Contestant):
    """One router with one policy."""

    def __init__(
        self,
        peer: Peer,
        policy: str,
        engines: Sequence[Address],
        ports: tuple[int, int],
        environ: Mapping[str, str],
    ) -> None:
        self._name = f"{peer.wheel.removesuffix('-router')} {policy.partition('_')[0]}"
        port, metrics_port = ports
        self._address = Address(engines[0].host, port)
        urls = [f"http://{engine.host}:{engine.port}" for engine in engines]
        flags = ("--host", engines[0].host, "--port", str(port), "--policy", policy, "--log-level", "error")
        metrics = ("--prometheus-host", engines[0].host, "--prometheus-port", str(metrics_port))
        program = (str(FOLDER.resolve() / "venv" / peer.program[0]), *peer.program[1:])
        self.commands = [Command(self._name, (*program, *flags, *metrics, "--worker-urls", *urls), environ)]

    def ways(self, started: Started) -> list[Way]:
        """The router is one process, its threads share the gateway's core."""
        pids = [started.pid(self._name), *started.children(self._name)]
        return [Way(self._name, [self._address], parts={GATEWAY: pids})]


def installed() -> Iterator[tuple[Peer, str]]:
    """Each peer with "" once it can be started, else with why not; installs what is missing."""
    python = FOLDER / "venv" / "bin" / "python"
    if not python.exists():
        FOLDER.mkdir(exist_ok=True)
        # Nobody commits what pip put here.
        (FOLDER / ".gitignore").write_text("*\n", encoding="utf-8")
        venv.create(FOLDER / "venv", with_pip=True, symlinks=True)
    for peer in PEERS:
        yield peer, _install(python, peer.wheel)


def _install(python: Path, wheel: str) -> str:
    """Why it could not be done; "" if it is there."""
    print(f"{wheel}: making sure that it is installed in {FOLDER}", file=sys.stderr)
    words = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=INSTALL_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"{wheel} cannot be installed, going on without it: {exc}"
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return f"{wheel} cannot be installed, going on without it: {' '.join(last)}"
    return ""
