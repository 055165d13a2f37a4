"""A shadow that writes down what it is sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import web

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Received:
    """One request as it came."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class ShadowServer:
    """Answers 200 unless told how else; `received` grows."""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self.answer: Answer | None = None
        self.url = ""

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.received.append(Received(request.method, request.raw_path, headers, await request.read()))
        if self.answer is not None:
            return await self.answer(request)
        return web.json_response({"choices": [{"finish_reason": "stop"}], "usage": {"completion_tokens": 3}})


@asynccontextmanager
async def shadow_server() -> AsyncIterator[ShadowServer]:
    """One that listens for as long as the block lasts."""
    shadow = ShadowServer()
    app = web.Application(client_max_size=2**24)
    app.router.add_route("*", "/{path:.*}", shadow._handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    shadow.url = f"http://{host}:{port}"
    try:
        yield shadow
    finally:
        await runner.cleanup()


async def hang(request: web.Request) -> web.StreamResponse:
    """Never answer."""
    await asyncio.Event().wait()
    raise AssertionError


async def drip(request: web.Request) -> web.StreamResponse:
    """A response that never ends."""
    response = web.StreamResponse()
    await response.prepare(request)
    while True:
        await response.write(b"data: {}\n\n" * 100)
        await asyncio.sleep(0.001)
