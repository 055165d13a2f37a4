"""Simulated engines on free ports, on the loop they have in production."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
import uvloop

from penstock.sim.http import Profile
from penstock.sim.instance import Instance
from penstock.sim.spec import EngineSpec

INSTANT = EngineSpec(prefill_tokens_per_s=1e15, decode_step_s=0.0, decode_step_per_seq_s=0.0)
# The first token comes at once, the second one never within a test.
SLOW = EngineSpec(prefill_tokens_per_s=1e15, decode_step_s=3600.0)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"uvloop": uvloop.new_event_loop}


class Client:
    """Talks to one instance with an HTTP client, or with bare sockets."""

    def __init__(self, instance: Instance, session: aiohttp.ClientSession) -> None:
        self.instance = instance
        self.session = session
        self.url = instance.url

    async def get(self, path: str) -> Any:
        async with self.session.get(self.url + path) as response:
            response.raise_for_status()
            return await response.json(content_type=None)

    async def text(self, path: str) -> str:
        async with self.session.get(self.url + path) as response:
            response.raise_for_status()
            return await response.text()

    async def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        """Status and decoded body; underscores in header names stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(self.url + path, json=body, headers=named) as response:
            return response.status, await response.json(content_type=None)

    @asynccontextmanager
    async def stream(self, path: str, body: object, **headers: str) -> AsyncIterator[aiohttp.ClientResponse]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self.session.post(self.url + path, json=body, headers=named) as response:
            yield response

    async def raw(self, data: bytes) -> bytes:
        """Everything the engine answers to these bytes until it closes the connection."""
        reader, writer = await asyncio.open_connection(self.instance.host, self.instance.port)
        try:
            writer.write(data)
            async with asyncio.timeout(30):
                return await reader.read()
        finally:
            writer.close()

    async def state(self) -> Any:
        return await self.get("/sim/state")

    async def eventually(self, **expected: object) -> Any:
        """The state once it has these values; fails after 30 s."""
        async with asyncio.timeout(30):
            while True:
                state = await self.state()
                if all(state[name] == value for name, value in expected.items()):
                    return state
                await asyncio.sleep(0.005)


Start = Callable[..., Awaitable[Client]]


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    """Starts instances: `await start(spec, **profile)`."""
    async with AsyncExitStack() as stack:

        async def start_one(spec: EngineSpec = INSTANT, **profile: Any) -> Client:
            keep_alive_s = profile.pop("keep_alive_s", 60.0)
            instance = Instance(spec, Profile(**profile), keep_alive_s=keep_alive_s)
            await stack.enter_async_context(instance)
            session = await stack.enter_async_context(aiohttp.ClientSession())
            return Client(instance, session)

        yield start_one


@pytest.fixture
async def client(start: Start) -> Client:
    """An instance that computes in no time."""
    return await start()


@pytest.fixture
async def slow(start: Start) -> Client:
    """An instance that computes the first token at once and the second one never."""
    return await start(SLOW)


@pytest.fixture
def chat_body() -> dict[str, Any]:
    return {"model": "sim-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
