"""One simulated engine on its own listening socket."""

import asyncio
import contextlib
import socket
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from aiohttp import web

from penstock.sim.connectors import Place
from penstock.sim.engine import Engine
from penstock.sim.http import EngineServer, Profile
from penstock.sim.kv_log import KvEncoding, KvLog
from penstock.sim.kv_publisher import KvPublisher
from penstock.sim.runner import EngineRunner
from penstock.sim.spec import EngineSpec
from penstock.sim.transfers import Transfers, TransferSpec

_BACKLOG = 1024
# What runs at the end is cut off, as an engine cuts off its streams.
_SHUTDOWN_S = 0.1
# vLLM's, so that pooled connections go stale on a gateway as they do with real engines.
DEFAULT_KEEP_ALIVE_S = 5.0


@dataclass(frozen=True)
class KvEventsAt:
    """Where KV-cache events are published: ports, of which 0 picks a free one; without replay at -1."""

    port: int = 0
    replay_port: int = 0
    encoding: KvEncoding = "vllm"


class Instance:
    """Starts and stops, as an async context manager too; `port` 0 picks a free one."""

    def __init__(
        self,
        spec: EngineSpec,
        profile: Profile,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        keep_alive_s: float = DEFAULT_KEEP_ALIVE_S,
        kv_events: KvEventsAt | None = None,
        transfer: TransferSpec | None = None,
    ) -> None:
        self._kv_log = KvLog(spec.block_size) if kv_events is not None else None
        self._kv_events = kv_events
        self.kv_publisher: KvPublisher | None = None
        self.engine = Engine(spec, self._kv_log)
        self.host = host
        self.port = port
        self._profile = profile
        self._keep_alive_s = keep_alive_s
        self._transfer = transfer
        self._transfers: Transfers | None = None
        self._side_channel: asyncio.AbstractServer | None = None
        self._refusal: asyncio.Task[None] | None = None
        self._healed = asyncio.Event()
        # Connections with a request in progress.
        self._busy: set[web.RequestHandler] = set()

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    async def start(self) -> None:
        """Raises OSError if the address is taken or not ours."""
        loop = asyncio.get_running_loop()
        bound = self._bind(self.port)
        self.port = bound.getsockname()[1]
        publisher = self._publisher(bound)
        self._runner = EngineRunner(self.engine, loop, publisher.flush if publisher is not None else None)
        if self._transfer is not None:
            await self._open_side_channel(self._transfer)
        self._interface = EngineServer(self._runner, self._profile, self._refuse, publisher, self._transfers)
        self._server = web.Server(
            self._handle,
            handler_cancellation=True,
            request_factory=self._request,
            access_log=None,
            # Engines take bodies as they come.
            auto_decompress=False,
            keepalive_timeout=self._keep_alive_s,
        )
        self._listener = await self._listen(bound)

    async def stop(self) -> None:
        if self._refusal is not None:
            self._refusal.cancel()
            await asyncio.wait([self._refusal])
        self._listener.close()
        self._server.pre_shutdown()
        await self._server.shutdown(_SHUTDOWN_S)
        if self._transfers is not None and self._side_channel is not None:
            self._side_channel.close()
            await self._side.shutdown(_SHUTDOWN_S)
            await self._transfers.close()
        self._runner.close()
        if self.kv_publisher is not None:
            await self.kv_publisher.stop()

    def _publisher(self, bound: socket.socket) -> KvPublisher | None:
        at, log = self._kv_events, self._kv_log
        if at is None or log is None:
            return None
        try:
            self.kv_publisher = KvPublisher(
                log,
                at.encoding,
                self.engine.spec.block_size,
                host=self.host,
                port=at.port,
                replay_port=at.replay_port,
            )
        except OSError:
            bound.close()
            raise
        self.kv_publisher.start()
        return self.kv_publisher

    async def __aenter__(self) -> "Instance":
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _open_side_channel(self, spec: TransferSpec) -> None:
        bound = self._bind(spec.port)
        place = Place(self.host, bound.getsockname()[1], uuid4().hex, spec.dp_rank, spec.dp_size)
        self._transfers = Transfers(spec, self.engine.spec.role, place, self._runner)
        self._side = web.Server(self._transfers.handle, handler_cancellation=True, access_log=None)
        loop = asyncio.get_running_loop()
        self._side_channel = await loop.create_server(self._side, sock=bound, backlog=_BACKLOG)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = request.protocol
        self._busy.add(connection)
        try:
            return await self._interface.handle(request)
        finally:
            self._busy.discard(connection)

    def _request(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        limit = self._profile.max_body_bytes
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=limit)

    def _bind(self, port: int) -> socket.socket:
        family, kind, protocol, _, address = socket.getaddrinfo(
            self.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
        return bound

    async def _listen(self, bound: socket.socket) -> asyncio.AbstractServer:
        loop = asyncio.get_running_loop()
        return await loop.create_server(self._server, sock=bound, backlog=_BACKLOG)

    def heal(self) -> None:
        """Refuse no longer, if it refuses: nobody can tell it so over HTTP meanwhile."""
        self._healed.set()

    def _refuse(self, seconds: float) -> None:
        if self._refusal is not None and not self._refusal.done():
            return
        self._listener.close()
        # Bound but not listening: connections are refused, and nobody else gets the port meanwhile.
        held = self._bind(self.port)
        for connection in self._server.connections:
            # Idle connections go at once, as those of a dead process do; busy ones after their answer.
            if connection in self._busy:
                connection.close()
            else:
                connection.force_close()
        self._healed.clear()
        self._refusal = asyncio.create_task(self._listen_after(seconds, held), name=f"refuse-{self.port}")

    async def _listen_after(self, seconds: float, held: socket.socket) -> None:
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._healed.wait()
        except asyncio.CancelledError:
            held.close()
            raise
        self._listener = await self._listen(held)
