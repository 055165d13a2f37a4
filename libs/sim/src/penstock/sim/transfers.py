"""KV transfers of one engine on the real clock: its side channel, its holds, and its fetches from others.

The side channel is HTTP in place of RDMA: `GET /query` as Mooncake's bootstrap server answers it, `POST
/fetch` hands a hold over, `POST /compute` lets prefill compute a prompt first (KVT in one request).
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
from aiohttp import ClientError, ClientSession, ClientTimeout, web

from penstock.sim import text
from penstock.sim.blocks import chain_hashes
from penstock.sim.connectors import (
    Asked,
    Connector,
    ConnectorName,
    Keep,
    Load,
    Place,
    Task,
    Violation,
    load_failed,
)
from penstock.sim.holds import Hold, HoldError, Holds
from penstock.sim.runner import EngineRunner
from penstock.sim.spec import EngineRequest, Role, TokenEvent
from penstock.sim.wire import ApiError, Call

_CONNECT_S = 1.0
_SHOWN_VIOLATIONS = 20
# A hold that is alive so long after its lease is a leak.
_GRACE_S = 1.0
_CHECK_S = 0.25


class Fetch(msgspec.Struct):
    """What another engine asks of the side channel; `tokens` are those of a prompt to compute first."""

    key: str
    digest: str
    tokens: str = ""
    root: str = ""


@dataclass(frozen=True, slots=True)
class TransferSpec:
    """How an engine transfers KV: what is kept ends after `lease_s`, a transfer goes at `tokens_per_s`, and
    decode waits for a prefill under way for `wait_s`."""

    connector: ConnectorName = "none"
    port: int = 0
    lease_s: float = 30.0
    tokens_per_s: float = 1_000_000.0
    wait_s: float = 480.0
    dp_rank: int = 0
    dp_size: int = 1


class Transfers:
    """What one engine keeps for others and fetches from them."""

    def __init__(self, spec: TransferSpec, role: Role, place: Place, runner: EngineRunner) -> None:
        self.connector, self.place = Connector(spec.connector, role), place
        self.holds = Holds(spec.lease_s)
        self._runner, self._tokens_per_s, self._wait_s = runner, spec.tokens_per_s, spec.wait_s
        self._arrivals: dict[str, set[asyncio.Future[None]]] = {}
        self._computed = 0
        self._violations: deque[str] = deque(maxlen=_SHOWN_VIOLATIONS)
        self._violations_total = 0
        self._session = ClientSession(
            timeout=ClientTimeout(total=spec.wait_s + _CONNECT_S, sock_connect=_CONNECT_S)
        )
        self._checking = asyncio.create_task(self._check(), name=f"holds-{place.port}")

    async def close(self) -> None:
        self._checking.cancel()
        await asyncio.wait([self._checking])
        await self._session.close()

    def read(self, body: bytes, request_id: str, number: int, call: Call) -> Task:
        """What a request's body asks of the connector. Raises Violation."""
        try:
            task = self.connector.task(Asked(msgspec.json.decode(body), request_id, number), self.place)
            if task is not None and len(call.sequences) > 1:
                raise Violation("a request with several sequences is not divided")
        except Violation as exc:
            self._note(str(exc))
            raise
        return task

    async def load(self, load: Load, call: Call) -> int:
        """Fetch a prompt's KV; the number of its tokens. Raises ApiError."""
        prompt = call.sequences[0].prompt
        fetch = Fetch(load.key, text.digest(prompt, model=call.model))
        if load.computes:
            fetch.tokens, fetch.root = prompt.hex(), call.cache_root
        url = f"http://{load.host}:{load.port}/{'compute' if load.computes else 'fetch'}"
        headers = {"x-engine-id": load.engine_id, "x-wait": "1" if load.waits else "0"}
        try:
            async with self._session.post(url, data=msgspec.json.encode(fetch), headers=headers) as answer:
                why = await answer.text()
        except (ClientError, OSError, TimeoutError) as exc:
            raise load_failed(f"prefill does not answer: {exc!r}") from exc
        if answer.status != 200:
            if answer.status == 409:
                self._note(why)
            raise load_failed(why)
        tokens = text.count(prompt)
        await asyncio.sleep(tokens / self._tokens_per_s)
        return tokens

    def kept(self, keep: Keep, engine_id: str, call: Call, finish_reason: str) -> dict[str, Any] | None:
        """A prompt that is kept was computed: the hold begins, unless its answer is complete already. What
        the answer says of it."""
        if finish_reason != "length":
            self._runner.let_go(engine_id)
            return None
        prompt = call.sequences[0].prompt
        tokens = text.count(prompt)
        hold = self._hold(engine_id, text.digest(prompt, model=call.model), tokens, keep.rid)
        replaced = self.holds.keep(keep.key, hold)
        self._free([replaced] if replaced else [])
        for arrival in self._arrivals.pop(keep.key, ()):
            if not arrival.done():
                arrival.set_result(None)
        blocks = -(-tokens // self._runner.engine.spec.block_size)
        return self.connector.parameters(keep, self.place, blocks, tokens)

    def abort(self, rid: str) -> None:
        """End what is kept for a request that nobody wants any more."""
        self._free(self.holds.cancel(rid))

    @property
    def expired(self) -> int | None:
        """Prompts that nobody fetched within their lease, where the connector tells."""
        return self.holds.expired if self.connector.name == "nixl" else None

    def state(self) -> dict[str, Any]:
        """For `/sim/state`."""
        holds, now = self.holds, asyncio.get_running_loop().time()
        return {
            "side_channel": f"{self.place.host}:{self.place.port}",
            "held": len(holds),
            "kept": holds.kept,
            "fetched": holds.fetched,
            "cancelled": holds.cancelled,
            "expired": holds.expired,
            "overdue": holds.overdue(now, _GRACE_S),
            "blocks_kept": self._runner.engine.kv_blocks_kept,
            "violations_total": self._violations_total,
            "violations": list(self._violations),
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The side channel."""
        try:
            if request.path == "/query":
                engine = {
                    "engine_id": self.place.engine_id,
                    "worker_addr": {"0": {"0": "tcp://" + self.place.host}},
                }
                return web.json_response({str(self.place.dp_rank): engine})
            fetch = msgspec.json.decode(await request.read(), type=Fetch)
            if request.path == "/compute":
                await self._compute(fetch)
            elif request.headers.get("x-engine-id", "") not in ("", self.place.engine_id):
                raise HoldError(f"engine {request.headers['x-engine-id']} is not this one")
            elif request.headers.get("x-wait") == "1":
                await self._arrival(fetch.key)
            self._free([self.holds.fetch(fetch.key, fetch.digest)])
        except (HoldError, msgspec.DecodeError) as exc:
            return web.Response(status=409, text=str(exc))
        except TimeoutError:
            return web.Response(status=504, text="prefill did not come")
        except ApiError as exc:
            return web.Response(status=exc.status, text=str(exc))
        return web.Response()

    async def _arrival(self, key: str) -> None:
        if self.holds.has(key):
            return
        arrival: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals.setdefault(key, set()).add(arrival)
        try:
            async with asyncio.timeout(self._wait_s):
                await arrival
        finally:
            waiting = self._arrivals.get(key)
            if waiting is not None:
                waiting.discard(arrival)
                if not waiting:
                    del self._arrivals[key]

    async def _compute(self, fetch: Fetch) -> None:
        """Compute a prompt for decode and keep it."""
        prompt = bytes.fromhex(fetch.tokens)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._computed += 1
        engine_id = f"compute-{self._computed}"
        block_size = self._runner.engine.spec.block_size
        request = EngineRequest(
            engine_id,
            text.count(prompt),
            1,
            chain_hashes(prompt, text.TOKEN_BYTES, block_size, fetch.root),
            finish_reason="length",
            keeps=True,
        )
        self._runner.submit(request, partial(_finished, done))
        try:
            await done
        except asyncio.CancelledError:
            # Whoever asked has left; if it was between the last token and this, the prompt is kept already.
            self._runner.abort(engine_id)
            self._runner.let_go(engine_id)
            raise
        self._runner.abort(engine_id)
        self.holds.keep(fetch.key, self._hold(engine_id, fetch.digest, text.count(prompt)))

    def _hold(self, engine_id: str, digest: str, tokens: int, rid: str = "") -> Hold:
        until = asyncio.get_running_loop().time() + self.holds.lease_s
        return Hold(engine_id, digest, tokens, until, rid)

    def _free(self, holds: list[Hold]) -> None:
        for hold in holds:
            self._runner.let_go(hold.engine_id)

    def _note(self, violation: str) -> None:
        self._violations.append(violation)
        self._violations_total += 1

    async def _check(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._free(self.holds.expire(loop.time()))
            await asyncio.sleep(min(_CHECK_S, self.holds.lease_s))


def _finished(done: asyncio.Future[None], event: TokenEvent) -> None:
    if event.finished and not done.done():
        done.set_result(None)
