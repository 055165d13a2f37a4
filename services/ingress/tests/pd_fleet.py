"""Engines that speak the protocols of disaggregation and fail as told, for tests over a lab."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import msgspec

from penstock.common.bus import Entry, Listing, Position
from penstock.common.codec import encode_record
from penstock.common.instances import complete_key, encode_instance, instance_key
from penstock.common.messages import (
    CompleteMarker,
    Mode,
    Placement,
    Reason,
    Rejection,
    ScheduleRequest,
    Stage,
)
from penstock.common.model import Instance, InstanceState, Role
from penstock.ingress.disaggregation.protocols import method_of

from .ingress_lab import MODEL, Engine, Lab, Peer

SETTINGS: dict[str, Any] = {
    "retry_max_count": 2,
    "retry_budget_percent": 100,
    "breaker_failures": 0,
    "breaker_error_percent": 0,
}
# Protocol, and whether prefill's answer holds the parameters (None: it is not asked for them).
VARIANTS = {
    "nixl": ("vllm-nixl", True),
    "mooncake": ("vllm-mooncake", False),
    "mooncake-old": ("vllm-mooncake", True),
    "kvt": ("vllm-kvt", None),
    "sglang": ("sglang-mooncake", None),
}
MODES = [
    (name, staged) for name in VARIANTS for staged in (False, True) if (name, staged) != ("sglang", True)
]
OUT_OF_ORDER = "500 Internal Server Error"
P, D = Role.PREFILL, Role.DECODE


class Fleet:
    """Two prefill and two decode engines that speak a protocol, one of each that nobody can connect to, and a
    scheduler that takes the first of each that is there. `acts` are what the next requests of a role meet."""

    def __init__(self, lab: Lab, variant: str, staged: bool) -> None:
        self.lab, self.staged = lab, staged
        self.protocol, self.tells = VARIANTS[variant]
        self.order = method_of(self.protocol, staged=staged).protocol.order
        self.acts: dict[Role, list[str]] = {Role.PREFILL: [], Role.DECODE: []}
        self.got: list[tuple[Role, dict[str, Any]]] = []
        self.between: Callable[[], Awaitable[None]]
        self.asides: list[str] = []
        self._lost = False
        self._records: list[Instance] = []
        self._kept, self._revisions = count(1), count(1000)
        self._loops: list[asyncio.Task[None]] = []
        lab.scheduler.decide = self.decide

    async def start(self) -> None:
        for role in (Role.PREFILL, Role.DECODE):
            for number in (1, 2):
                engine = await self.lab.engine(f"{role.value[0]}{number}", role=role, group="g")
                self._record(engine)
                self._serve(self._accept(engine, role))
            self.lab.instance(f"{role.value[0]}0", 1, role=role, group="g", kv_address="h:1")
        self._records = list(self.lab._instances)

    async def set_up(self, point: Point) -> None:
        """Everybody is there again, but for what goes wrong at this point."""
        lab = self.lab
        lab.gateway.dividing.lease_s = 30.0
        lab.broker.set_up(True)
        hidden = {f"{role.value[0]}0" for role in (P, D) if role not in point.unreachable}
        self._publish([one for one in self._records if one.id not in hidden])
        self.acts = {P: list(point.prefill), D: list(point.decode)}
        self.got.clear()
        self.asides.clear()
        self.between = lambda: point.between(self)
        if self._lost:
            self._lost = False
            await lab.start_scheduler()

    async def lose_schedulers(self) -> None:
        if not self._lost:
            self._lost = True
            await self.lab.stop_scheduler()

    def _record(self, engine: Engine) -> None:
        """What the protocol needs to know."""
        bootstrap_port = engine.port if self.tells is False else 0
        self.change(engine.name, kv_address=f"127.0.0.1:{engine.port}", bootstrap_port=bootstrap_port)

    def change(self, name: str, *, gone: bool = False, **fields: Any) -> None:
        """Change a record, or take it out."""
        instances = self.lab._instances
        kept = [
            msgspec.structs.replace(one, **fields) if one.id == name else one
            for one in instances
            if not (gone and one.id == name)
        ]
        self._publish(kept)

    def _publish(self, instances: list[Instance]) -> None:
        """As what the registry holds from here on."""
        self.lab._instances[:] = instances
        entries = {
            instance_key(one.id): Entry(encode_instance(one), next(self._revisions)) for one in instances
        }
        entries[complete_key("lab")] = Entry(encode_record(CompleteMarker("lab", ("lab",))), 1)
        self.lab.table.apply(Listing(Position("1", next(self._revisions)), entries))

    def decide(self, request: ScheduleRequest) -> Placement | Rejection:
        table = self.lab.table

        def first(role: Role) -> Instance | None:
            wanted = [one for one in table.serving(request.model) if one.role is role and one.takes_work]
            wanted = [one for one in wanted if one.id not in request.excluded]
            return min(wanted, key=lambda one: one.id, default=None)

        prefill, decode = first(Role.PREFILL), first(Role.DECODE)
        name = request.decision_id
        if request.stage is Stage.DECODE and decode is not None:
            return Placement(name, decode.id, request.prefill_instance, "pairs")
        if request.mode is Mode.PD_STAGED and prefill is not None and decode is not None:
            return Placement(name, prefill.id, prefill.id, "pairs")
        if decode is not None:
            return Placement(name, decode.id, prefill.id if prefill is not None else "", "pairs")
        return Rejection(name, Reason.NO_INSTANCE, "nobody is left", 1.0)

    async def close(self) -> None:
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    def _serve(self, serving: Any) -> None:
        self._loops.append(asyncio.create_task(serving))

    async def _accept(self, engine: Engine, role: Role) -> None:
        while True:
            peer = await engine._accepted.get()
            self._serve(self._speak(peer, role))

    async def _speak(self, peer: Peer, role: Role) -> None:
        try:
            while True:
                raw = await peer.reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: *(\d+)", raw)
                body = await peer.reader.readexactly(int(length[1]) if length else 0)
                if not raw.startswith(b"POST /v1/"):
                    self._aside(peer, raw.split()[1].decode())
                else:
                    await self._generate(peer, role, json.loads(body))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass

    def _aside(self, peer: Peer, path: str) -> None:
        self.asides.append(path)
        if path == "/query" and "no-query" in self.acts[Role.PREFILL]:
            self.acts[Role.PREFILL].remove("no-query")
            peer.answer(b"{}", OUT_OF_ORDER)
        else:
            peer.answer(b'{"0":{"engine_id":"e-1"}}')

    async def _generate(self, peer: Peer, role: Role, body: dict[str, Any]) -> None:
        self.got.append((role, body))
        acts = [act for act in self.acts[role] if act != "no-query"]
        act = acts[0] if acts else "answer"
        if acts:
            self.acts[role].remove(act)
        if act == "drop":
            peer.reset()
        elif act in ("500", "422", "429"):
            peer.answer(b'{"error":"%b"}' % act.encode(), OUT_OF_ORDER if act == "500" else f"{act} No")
        elif act == "silence":
            # Time is up at once.
            for exchange in self.lab.gateway.exchanges:
                exchange.deadline = self.lab.gateway.clock()
                if role is Role.DECODE and exchange.divided is not None:
                    exchange.divided._deadline = exchange.deadline
        elif act == "wait":
            pass
        elif role is Role.PREFILL:
            await self._prefilled(peer, act)
        else:
            self._decoded(peer, body, act)

    async def _prefilled(self, peer: Peer, act: str) -> None:
        await self.between()
        if act == "garbage":
            peer.answer(b"<html>")
        elif self.tells and act != "no-parameters":
            peer.answer(b'{"kv_transfer_params":{"remote_block_ids":[[%d]]}}' % next(self._kept))
        else:
            peer.answer(b'{"kv_transfer_params":null}')

    def _decoded(self, peer: Peer, body: dict[str, Any], act: str) -> None:
        if not body.get("stream"):
            if act == "mid-stream":
                peer.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 20\r\n\r\n{")
            else:
                peer.answer(b'{"said":"all"}')
        else:
            peer.begin_stream()
            peer.event('{"said":"all"}')
            if act == "answer":
                peer.send(b"0\r\n\r\n")
        if act == "mid-stream":
            peer.close()


Between = Callable[[Fleet], Awaitable[None]]


async def nothing(fleet: Fleet) -> None:
    pass


def drains(name: str) -> Between:
    async def change(fleet: Fleet) -> None:
        fleet.change(name, state=InstanceState.DRAINING)

    return change


def leaves(name: str) -> Between:
    async def change(fleet: Fleet) -> None:
        fleet.change(name, gone=True)

    return change


async def lose_bus(fleet: Fleet) -> None:
    fleet.lab.broker.set_up(False)


async def end_lease(fleet: Fleet) -> None:
    fleet.lab.gateway.dividing.lease_s = 0.0


async def forget(fleet: Fleet) -> None:
    """What bootstrap servers have told before."""
    for one in fleet.lab.table.serving(MODEL):
        fleet.lab.gateway.dividing.forget(one)


@dataclass(frozen=True)
class Point:
    """What goes wrong, and what becomes of it: status (0: broken off), attempts, and requests that prefill
    and decode received, by the order of the protocol; None: it cannot go wrong there."""

    name: str
    result: Callable[[Fleet], tuple[int, int] | None]
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    unreachable: frozenset[Role] = frozenset()
    between: Between = nothing
