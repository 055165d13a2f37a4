"""The services as processes around a real NATS, for tests; and a load that checks every answer."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import re
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from integration.servers import NatsServer, Process, eventually, free_port
from penstock.sim.text import expected_text

MODEL = "sim-model"
READY_TIMEOUT_S = 60.0


@dataclass
class Ingress:
    """One ingress and its two listeners."""

    process: Process
    port: int
    admin_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.admin_port}"


@dataclass
class Stack:
    """What runs. `sims` are the engines' base addresses, `host:port`."""

    nats: NatsServer
    engines: list[str] = field(default_factory=list)
    sims: list[Process] = field(default_factory=list)
    discovery: Process | None = None
    schedulers: list[Process] = field(default_factory=list)
    scheduler_ports: list[int] = field(default_factory=list)
    ingresses: list[Ingress] = field(default_factory=list)
    mirrors: list[Process] = field(default_factory=list)
    exits: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def url(self) -> str:
        """The first ingress."""
        return self.ingresses[0].url

    @property
    def events_url(self) -> str:
        """Where the routing log is read."""
        return self.nats.url

    def start_sims(self, count: int, *flags: str) -> None:
        """`count` engines, each a process of its own, so that each can be killed and frozen."""
        for _ in range(count):
            sim = self._run("penstock.sim", "--port", "0", "--speedup", "20", *flags)
            match = sim.wait_for_line(r"listening on http://(\S+)")
            self.sims.append(sim)
            self.engines.append(match[1])

    def run_sim(self, *flags: str) -> Process:
        """A process of engines that nobody waits for yet."""
        self.sims.append(sim := self._run("penstock.sim", *flags))
        return sim

    def restart_sim(self, index: int, *flags: str) -> None:
        """Start an engine again on its old port."""
        port = self.engines[index].rsplit(":", 1)[1]
        self.sims[index] = self._run("penstock.sim", "--port", port, "--speedup", "20", *flags)
        self.sims[index].wait_for_line("listening on")

    def start_discovery(self, *flags: str) -> int:
        """Discovery of the engines started so far; its admin port."""
        port, engines = free_port(), ",".join(self.engines)
        self.discovery = self._service(
            "discovery",
            "--llm-backend-endpoints",
            engines,
            "--probe-interval",
            "0.5",
            *flags,
            admin_port=port,
        )
        return port

    def start_discovery_of(self, sources: str, *flags: str) -> None:
        """Discovery by sources other than the list of the engines started."""
        self.discovery = self._service(
            "discovery", "--llm-backend-discovery", sources, "--probe-interval", "0.5", *flags
        )

    def start_scheduler(self, *flags: str) -> None:
        """One more replica."""
        port = free_port()
        self.schedulers.append(self._service("scheduler", *flags, admin_port=port))
        self.scheduler_ports.append(port)

    def start_mirror(self, config: Path, *flags: str) -> int:
        """One more mirror, which reads `config`; its admin port."""
        port = free_port()
        self.mirrors.append(self._service("mirror", "--mirror-config", str(config), *flags, admin_port=port))
        return port

    def start_ingress(self, *flags: str) -> Ingress:
        """One more ingress."""
        port, admin_port = free_port(), free_port()
        process = self._service(
            "ingress", "--host", "127.0.0.1", "--port", str(port), *flags, admin_port=admin_port
        )
        ingress = Ingress(process, port, admin_port)
        self.ingresses.append(ingress)
        return ingress

    async def ready(self) -> None:
        """Every ingress and scheduler is ready, and a request is placed by a scheduler if there is one."""
        async with aiohttp.ClientSession() as session:
            try:
                for port in [*(i.admin_port for i in self.ingresses), *self.scheduler_ports]:
                    await eventually(partial(_is_ready, session, port), READY_TIMEOUT_S)
                for ingress in self.ingresses if self.schedulers else []:
                    await eventually(partial(self._by_scheduler, session, ingress), READY_TIMEOUT_S)
            except AssertionError as exc:
                raise AssertionError(f"{exc}\n{self._last_words()}") from exc

    def _last_words(self) -> str:
        """Whether each part still runs, and the end of what it said."""
        parts = [*self.schedulers, *(ingress.process for ingress in self.ingresses)]
        return "\n".join(
            f"{part.name}, exit code {part.exit_code}:\n" + "\n".join(part.lines[-20:]) for part in parts
        )

    async def _by_scheduler(self, session: aiohttp.ClientSession, ingress: Ingress) -> bool:
        _, headers, _ = await chat(session, ingress.url, "are you there", max_tokens=1)
        return headers.get("routing-strategy") not in (None, "local")

    def _service(self, name: str, *flags: str, admin_port: int = 0) -> Process:
        return self._run(
            f"penstock.{name}", "--nats-url", self.nats.url, "--admin-port", str(admin_port), *flags
        )

    def _run(self, module: str, *flags: str) -> Process:
        return self.exits.enter_context(Process.module(module, *flags))


@contextlib.contextmanager
def running_stack() -> Iterator[Stack]:
    """A NATS server and nothing else yet; everything started on it ends with the block."""
    with NatsServer() as nats, contextlib.ExitStack() as exits:
        yield Stack(nats, exits=exits)


async def _is_ready(session: aiohttp.ClientSession, port: int) -> bool:
    try:
        async with session.get(f"http://127.0.0.1:{port}/readyz") as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False


def messages(prompt: str) -> list[dict[str, str]]:
    """A chat of one user message."""
    return [{"role": "user", "content": prompt}]


async def chat(
    session: aiohttp.ClientSession,
    url: str,
    prompt: str,
    *,
    max_tokens: int = 8,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], Any]:
    """(status, headers in lower case, JSON body) of one plain chat."""
    body = {"model": MODEL, "messages": messages(prompt), "max_tokens": max_tokens}
    async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        answer = json.loads(await response.read())
        return response.status, {k.lower(): v for k, v in response.headers.items()}, answer


async def stream_chat(
    session: aiohttp.ClientSession,
    url: str,
    prompt: str,
    *,
    max_tokens: int = 8,
    headers: dict[str, str] | None = None,
) -> AsyncGenerator[str, None]:
    """The `data:` payloads of one streamed chat, as they come."""
    body = {"model": MODEL, "messages": messages(prompt), "max_tokens": max_tokens, "stream": True}
    async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: "):
                yield line[6:].strip().decode()


async def metric(session: aiohttp.ClientSession, admin_port: int, name: str) -> float:
    """The sum of a metric's samples, 0 if it has none; AssertionError if nobody declares it."""
    async with session.get(f"http://127.0.0.1:{admin_port}/metrics") as response:
        text = await response.text()
    assert f"# HELP {name} " in text, f"no metric {name}"
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values))


async def engine_state(session: aiohttp.ClientSession, engine: str) -> dict[str, Any]:
    """What a simulated engine says of itself."""
    async with session.get(f"http://{engine}/sim/state") as response:
        state: dict[str, Any] = await response.json()
        return state


class Load:
    """Clients that ask without a pause until told to stop, alternately plain and streamed; every answer is
    compared with what an engine has to say to that very prompt."""

    def __init__(self, urls: list[str], clients: int = 16) -> None:
        self._urls, self._clients = urls, clients
        self._numbers = itertools.count()
        self._name = f"load-{random.getrandbits(32):08x}"
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.answered = 0
        self.failures: list[str] = []
        # Of the requests that were answered.
        self.ids: list[str] = []

    async def __aenter__(self) -> Load:
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        self._tasks = [asyncio.create_task(self._client(n), name=f"client {n}") for n in range(self._clients)]
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Let every client end its request."""
        self._stop.set()
        await asyncio.gather(*self._tasks)
        await self._session.close()

    async def answers(self, count: int) -> None:
        """Return once `count` more requests have been answered."""
        goal = self.answered + count
        await eventually(lambda: self.answered + len(self.failures) >= goal, 60.0)

    async def _client(self, number: int) -> None:
        url = self._urls[number % len(self._urls)]
        while not self._stop.is_set():
            count = next(self._numbers)
            prompt, request_id = f"request {count} of the load", f"{self._name}-{count}"
            ask = self._streamed if number % 2 else self._plain
            try:
                text = await ask(url, prompt, {"x-request-id": request_id})
            except (aiohttp.ClientError, AssertionError, TimeoutError, ValueError, KeyError) as exc:
                self.failures.append(f"{prompt}: {exc!r}")
                continue
            if text != expected_text(messages(prompt), model=MODEL, max_tokens=8):
                self.failures.append(f"{prompt}: answered {text!r}")
            self.ids.append(request_id)
            self.answered += 1

    async def _plain(self, url: str, prompt: str, headers: dict[str, str]) -> str:
        status, _, body = await chat(self._session, url, prompt, headers=headers)
        assert status == 200, body
        return str(body["choices"][0]["message"]["content"])

    async def _streamed(self, url: str, prompt: str, headers: dict[str, str]) -> str:
        payloads = [payload async for payload in stream_chat(self._session, url, prompt, headers=headers)]
        assert payloads[-1] == "[DONE]", payloads[-1]
        chunks = [json.loads(payload) for payload in payloads[:-1]]
        return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
