"""The test stand: engines and contestants as processes, each on its core, each proven to answer."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import aiohttp
import msgspec
import psutil

from penstock.cli.bench import nginx, peers
from penstock.cli.bench.clients import Address
from penstock.cli.bench.contestant import Contestant, Started
from penstock.cli.bench.cores import Cores, pin
from penstock.cli.bench.settings import BenchSettings, chosen
from penstock.cli.bench.stacks import DRAIN_S, FullStack, LocalStack
from penstock.cli.bench.way import DIRECT, FULL, GATEWAY, LOCAL, NGINX, WAYS, Way
from penstock.cli.bench.wire import MODEL, NO_NONCE, PATH, answer_body
from penstock.cli.ports import FreePorts
from penstock.cli.processes import Child, Command, Supervisor
from penstock.cli.ready import Check, NotReady, until_ready
from penstock.common.settings_sources import ENV_PREFIX

HOST = "127.0.0.1"
START_S, STOP_S, ANSWER_S = 60.0, DRAIN_S + 8.0, 5.0
KEPT_LINES, SHOWN_CHARACTERS = 12, 300
_CHAT = msgspec.json.encode({"model": MODEL, "messages": [{"role": "user", "content": "Are you there?"}]})


class BenchFailed(Exception):
    """There is nothing to measure; says why."""


class Stand:
    """Everything that has to run before the first measurement."""

    def __init__(self, settings: BenchSettings, folder: Path, cores: Cores) -> None:
        self._settings, self._folder, self._cores = settings, folder, cores
        self._supervisor = Supervisor(self._on_line, self._on_death)
        self._lines: dict[str, deque[str]] = {}
        self._deaths: dict[str, str] = {}
        # Flags say what to run; settings that the user's environment holds are for other stacks.
        self._environ = {k: v for k, v in os.environ.items() if not k.startswith(ENV_PREFIX)}
        self._ports = FreePorts(HOST)
        first = self._ports.take_row(settings.engines)
        self._engines = [Address(HOST, first + number) for number in range(settings.engines)]

    async def start(self, say: Callable[[str], None]) -> list[Way]:
        """The ways that can be measured; what cannot take part is said. Raises BenchFailed."""
        wanted = chosen(self._settings.ways, WAYS)
        contestants = list(self._contestants(wanted, say))
        ports = tuple(str(engine.port) for engine in self._engines)
        argv = (sys.executable, "-m", "penstock.cli.bench.responder", *ports)
        self._supervisor.start(Command("responder", argv, self._environ))
        for contestant in contestants:
            for command in contestant.commands:
                self._supervisor.start(command)
        ways = await self._ready(contestants)
        for way in ways:
            for pid in way.parts.get(GATEWAY, ()):
                pin(pid, self._cores.gateway)
        return [way for way in ways if way.name in wanted or way.name not in WAYS]

    async def stop(self) -> None:
        """End everything."""
        await self._supervisor.stop(self._supervisor.children, STOP_S)

    def check(self) -> None:
        """Raises BenchFailed if a process has ended."""
        if self._deaths:
            raise BenchFailed(self._told(self._deaths, "; ".join(self._deaths.values())))

    def _contestants(self, wanted: Sequence[str], say: Callable[[str], None]) -> Iterator[Contestant]:
        engines, environ, log = self._engines, self._environ, self._settings.access_log
        if NGINX in wanted:
            program = nginx.find_nginx()
            if program:
                yield nginx.Nginx(program, engines, self._two_ports(), self._folder, environ, log)
            else:
                say(nginx.MISSING)
        if LOCAL in wanted:
            yield LocalStack(engines, self._two_ports(), self._folder, environ, log)
        if any(one in wanted for one in FULL):
            yield FullStack(engines, self._ports.take(), environ, log)
        for peer, fault in peers.installed() if self._settings.peers else ():
            if fault:
                say(fault)
                continue
            for policy in peers.POLICIES:
                yield peers.Router(peer, policy, engines, self._two_ports(), environ)

    def _two_ports(self) -> tuple[int, int]:
        return self._ports.take(), self._ports.take()

    async def _ready(self, contestants: Sequence[Contestant]) -> list[Way]:
        """Wait until every way answers as it should."""
        direct = Way(DIRECT, self._engines)
        async with aiohttp.ClientSession() as session:
            checks: dict[str, Check] = {"responder": partial(_missing, session, lambda: [direct])}
            for contestant in contestants:
                ways = partial(self._ways, contestant)
                checks[contestant.commands[-1].name] = partial(_missing, session, ways)
            try:
                await until_ready(checks, lambda name: None, self.check, START_S)
            except NotReady as exc:
                text = f"not ready after {START_S:g} s: {exc}"
                raise BenchFailed(self._told(self._lines, text)) from None
        return [direct, *(way for contestant in contestants for way in self._ways(contestant))]

    def _ways(self, contestant: Contestant) -> list[Way]:
        return contestant.ways(Started(self._supervisor.children))

    def _on_line(self, child: Child, raw: bytes) -> None:
        lines = self._lines.setdefault(child.command.name, deque(maxlen=KEPT_LINES))
        lines.append(raw.decode("utf-8", "replace")[:SHOWN_CHARACTERS])

    def _on_death(self, child: Child, cause: str, delay_s: float) -> None:
        child.stopping.set()
        self._deaths[child.command.name] = f"{child.command.name} {cause}"

    def _told(self, names: Iterable[str], text: str) -> str:
        """A complaint, after the last lines of those whom it concerns."""
        lines = [f"{name}: {line}" for name in names for line in self._lines.get(name, ())]
        return "\n".join([*lines, text])


async def _missing(session: aiohttp.ClientSession, find: Callable[[], Sequence[Way]]) -> str:
    """What keeps some of these ways from being measured, in words; "" if all answer as they should."""
    try:
        ways = find()
    except psutil.Error as exc:
        return f"its processes are not all there: {exc}"
    for way in ways:
        for address in (*way.addresses, *way.stream_addresses):
            fault = await _fault(session, way, address)
            if fault:
                return f"{way.name}: {fault}"
    return ""


async def _fault(session: aiohttp.ClientSession, way: Way, address: Address) -> str:
    """Why a chat that takes this way does not come back as it should."""
    headers = dict(line.split(": ") for line in way.headers.splitlines())
    headers["content-type"] = "application/json"
    url = f"http://{address.host}:{address.port}{PATH}"
    try:
        async with asyncio.timeout(ANSWER_S), session.post(url, data=_CHAT, headers=headers) as response:
            body = await response.read()
    except (aiohttp.ClientError, OSError, TimeoutError) as exc:
        return f"no answer: {exc or type(exc).__name__}"
    if response.status != 200 or body != answer_body(NO_NONCE):
        return f"answers {response.status}: {body[:200]!r}"
    head = b"".join(b"\r\n%b: %b" % field for field in response.raw_headers)
    return "" if way.mark in head else f"took another way: {head!r}"
