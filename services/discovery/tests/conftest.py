"""Small real engines on free ports, and patience with a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from penstock.common.model import Endpoint

PATIENCE_S = 30.0
POLL_S = 0.005

LOAD = 'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_waiting{engine="0"} 1\n'

Check = Callable[[], object]


class Engine:
    """An OpenAI-compatible server whose answers a test sets; `hits` counts requests by path."""

    def __init__(self) -> None:
        self.models: Any = [{"id": "m", "owned_by": "vllm", "object": "model"}]
        self.health_status = 200
        self.models_status = 200
        self.metrics = LOAD
        self.redirect_to = ""
        self.body_bytes = 0
        self.answering = asyncio.Event()
        self.answering.set()
        self.hanging_path = ""
        self._ending = asyncio.Event()
        self.hits: dict[str, int] = {}
        self.headers: dict[str, str] = {}
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("127.0.0.1", self.port)

    async def start(self) -> None:
        """Listen; on the same port again after `stop`."""
        app = web.Application()
        app.router.add_get("/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        self._ending.set()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.hits[request.path] = self.hits.get(request.path, 0) + 1
        self.headers = dict(request.headers)
        await self.answering.wait()
        if request.path == self.hanging_path:
            await self._ending.wait()
        if self.redirect_to:
            raise web.HTTPFound(self.redirect_to)
        if self.body_bytes:
            return web.Response(body=b" " * self.body_bytes)
        match request.path:
            case "/health":
                return web.Response(status=self.health_status)
            case "/v1/models" if isinstance(self.models, bytes):
                return web.Response(body=self.models, status=self.models_status)
            case "/v1/models":
                return web.json_response({"object": "list", "data": self.models}, status=self.models_status)
            case "/metrics":
                return web.Response(text=self.metrics)
        raise web.HTTPNotFound


@asynccontextmanager
async def _running() -> AsyncIterator[Engine]:
    engine = Engine()
    await engine.start()
    try:
        yield engine
    finally:
        engine.answering.set()
        await engine.stop()


@pytest.fixture
async def new_engine() -> AsyncIterator[Callable[[], Awaitable[Engine]]]:
    """Starts engines that end with the test."""
    async with AsyncExitStack() as stack:

        async def start() -> Engine:
            return await stack.enter_async_context(_running())

        yield start


@pytest.fixture
async def engine(new_engine: Callable[[], Awaitable[Engine]]) -> Engine:
    """One engine."""
    return await new_engine()


@pytest.fixture
def eventually() -> Callable[[Check], Awaitable[None]]:
    """Waits until a check holds; fails with it when patience ends."""

    async def wait(check: Check) -> None:
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        while not check():
            assert asyncio.get_running_loop().time() < deadline, "it never came true"
            await asyncio.sleep(POLL_S)

    return wait
