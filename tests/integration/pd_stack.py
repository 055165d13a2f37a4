"""A stack with prefill and decode instances of every KV connector, each under a model of its own."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.request
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp

from integration.servers import Process, eventually
from integration.stack import Stack, metric, running_stack
from penstock.common.model import Endpoint, Instance, Role
from penstock.common.records import PENSTOCK, write_record

# Model -> (connector of the simulated engines, what their records say of it).
CONNECTORS: dict[str, tuple[str, dict[str, Any]]] = {
    "nixl": ("nixl", {"labels": {"kv_connector": "NixlConnector"}}),
    "mooncake": ("mooncake", {"labels": {"kv_connector": "mooncake"}}),
    "mooncake-old": ("mooncake-llumnix", {"labels": {"kv_connector": "vllm-mooncake"}}),
    "kvt": ("kvt", {"labels": {"kv_connector": "kvt"}}),
    "sglang": ("sglang", {"engine": "sglang"}),
}
ROLES = (Role.PREFILL, Role.DECODE)
LEASE_S = 2.0


@dataclass
class PdStack:
    """`engines` by model and role, as `host:port`; ingresses by mode."""

    stack: Stack
    engines: dict[tuple[str, Role], list[str]] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)
    admin_ports: dict[str, int] = field(default_factory=dict)

    @property
    def every_engine(self) -> list[str]:
        return [engine for engines in self.engines.values() for engine in engines]

    async def ready(self, session: aiohttp.ClientSession) -> None:
        """Every ingress knows every engine."""
        expected = len(self.every_engine)

        async def known() -> bool:
            for port in self.admin_ports.values():
                assert await metric(session, port, "penstock_registry_taking_work") == expected
            return True

        await eventually(partial(retried, known))

    async def settled(self, session: aiohttp.ClientSession) -> None:
        """Nobody holds anything, nobody broke a protocol, nothing is in flight."""

        async def quiet() -> bool:
            for engine in self.every_engine:
                state = await sim_state(session, engine)
                transfers = state["transfers"]
                assert transfers["violations"] == [], (engine, transfers)
                assert transfers["overdue"] == 0, (engine, transfers)
                assert (state["open"], state["running"], transfers["held"]) == (0, 0, 0), (engine, transfers)
                assert transfers["blocks_kept"] == 0, (engine, transfers)
            return True

        await eventually(quiet)
        for port in self.stack.scheduler_ports:
            await eventually(partial(_is_zero, session, port, "penstock_scheduler_in_flight_requests"))
        for port in self.admin_ports.values():
            async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
                page = await response.text()
            for name in (
                "penstock_ingress_in_flight",
                "penstock_ingress_exchanges",
                "penstock_ingress_prompt_holds",
                "penstock_ingress_prompt_leaks_total",
            ):
                values = [float(line.split()[-1]) for line in page.splitlines() if line.startswith(name)]
                assert sum(values) == 0, name


@contextlib.contextmanager
def pd_stack(
    folder: Path,
    *flags: str,
    models: Iterable[str] = tuple(CONNECTORS),
    modes: Iterable[str] = ("batched", "staged"),
    schedulers: int = 0,
    sims: int = 2,
) -> Iterator[PdStack]:
    """An ingress for each mode; `flags` are further ones of theirs."""
    with running_stack() as stack:
        pd = PdStack(stack)
        kinds = [(model, role) for model in models for role in ROLES]
        for model, role in kinds:
            stack.run_sim(
                *("--port", "0", "--count", str(sims), "--speedup", "50", "--model", model),
                *("--role", role.value, "--kv-connector", CONNECTORS[model][0]),
                *("--kv-lease-ms", str(int(LEASE_S * 1000))),
            )
        lines = []
        for (model, role), sim in zip(kinds, stack.sims, strict=True):
            sim.wait_until(lambda sim=sim: len(addresses(sim)) == sims, "engines", 60.0)  # type: ignore[misc]
            pd.engines[model, role] = addresses(sim)
            lines += [record(model, role, engine) for engine in addresses(sim)]
        listing = folder / "engines"
        listing.write_bytes(b"\n".join(lines))
        stack.engines = [f"@{listing}"]
        stack.start_discovery()
        for _ in range(schedulers):
            stack.start_scheduler()
        for mode in modes:
            separate = str(mode == "staged").lower()
            ingress = stack.start_ingress("--separate-pd-scheduling", separate, *flags)
            pd.urls[mode], pd.admin_ports[mode] = ingress.url, ingress.admin_port
        yield pd


async def _is_zero(session: aiohttp.ClientSession, port: int, name: str) -> bool:
    try:
        return await metric(session, port, name) == 0
    except aiohttp.ClientConnectionError:
        # A scheduler that was killed holds nothing.
        return True


async def retried(check: Callable[[], Awaitable[bool]]) -> bool:
    """False while nobody listens yet."""
    try:
        return await check()
    except aiohttp.ClientConnectionError:
        return False


def addresses(sim: Process) -> list[str]:
    """`host:port` of each engine of a process, as far as they listen."""
    return re.findall(r"listening on http://(\S+)", sim.stdout)


def record(model: str, role: Role, engine: str) -> bytes:
    """What discovery is told of a simulated engine."""
    host, port = engine.split(":")
    with urllib.request.urlopen(f"http://{engine}/sim/state?requests=0") as response:
        side_channel = json.load(response)["transfers"]["side_channel"]
    said: dict[str, Any] = dict(CONNECTORS[model][1])
    if model == "kvt":
        said["kv_address"] = side_channel
    if model in ("mooncake", "sglang"):
        said["bootstrap_port"] = int(side_channel.split(":")[1])
    instance = Instance(
        id=f"{model}-{role}-{port}", endpoint=Endpoint(host, int(port)), models=(model,), role=role, **said
    )
    return write_record((instance,), 0, PENSTOCK)


async def sim_state(session: aiohttp.ClientSession, engine: str) -> dict[str, Any]:
    """What a simulated engine says of itself."""
    async with session.get(f"http://{engine}/sim/state?requests=0") as response:
        state: dict[str, Any] = await response.json()
        return state
