"""What limited requests cost in the end, held against the engines' own counts, whichever way they took."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from integration.limit_labs import ledger, room_in_the_minute
from integration.pd_stack import pd_stack
from integration.redis_lab import RedisServer
from integration.servers import eventually
from integration.stack import MODEL, Stack, messages, metric, running_stack
from penstock.common.model import Role

pytestmark = pytest.mark.integration

LEAVE_AFTER = 5


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        yield stack


def counting(redis: RedisServer) -> tuple[str, ...]:
    """The flags of an ingress that counts in Redis."""
    url = f"redis://{redis.address}/0"
    return "--limits-store", "redis", "--limits-redis-url", url, "--limits-default-tpm", "1000000"


async def becomes(redis: RedisServer, user: str, tokens: int) -> None:
    """Wait until the ledger says so; leases go back within two seconds."""

    async def there() -> bool:
        counted = await asyncio.to_thread(ledger, redis, user)
        assert counted == tokens
        return True

    await eventually(there)


async def engine_tokens(session: aiohttp.ClientSession, engine: str) -> tuple[int, int]:
    """(prompt, generation) tokens that an engine has counted."""
    async with session.get(f"http://{engine}/metrics") as response:
        text = await response.text()
    found = dict(re.findall(r"^vllm:(prompt|generation)_tokens_total\{[^}]*\} (\S+)$", text, re.MULTILINE))
    return int(float(found["prompt"])), int(float(found["generation"]))


async def ask(
    session: aiohttp.ClientSession, url: str, user: str, number: int, model: str = MODEL, **headers: str
) -> None:
    """A request that is answered, streamed if its number is odd."""
    body: dict[str, Any] = {"model": model, "messages": messages(f"{user} {number} " * 20), "max_tokens": 9}
    body |= {"stream": True} if number % 2 else {}
    async with session.post(
        f"{url}/v1/chat/completions", json=body, headers={"user": user, **headers}
    ) as response:
        answer = await response.read()
        assert response.status == 200, answer
        # The usage that the gateway asked for is not shown.
        assert (b'"usage":{' in answer.replace(b" ", b"")) is not bool(number % 2)


async def ask_all(
    session: aiohttp.ClientSession, url: str, user: str, model: str = MODEL, **headers: str
) -> None:
    """Some of each kind at once."""
    await asyncio.gather(*(ask(session, url, user, number, model, **headers) for number in range(8)))


async def test_a_request_that_was_retried_costs_what_the_engine_counted_that_answered(
    stack: Stack, redis: RedisServer, session: aiohttp.ClientSession
) -> None:
    stack.start_sims(2)
    stack.start_discovery("--probe-interval", "60")
    ingress = stack.start_ingress("--retry-max-count", "2", *counting(redis))
    await stack.ready()
    stack.sims[0].kill()
    await room_in_the_minute(redis)
    await ask_all(session, ingress.url, "retried")
    assert await metric(session, ingress.admin_port, "penstock_ingress_moves_total") > 0
    await becomes(redis, "retried", sum(await engine_tokens(session, stack.engines[1])))


async def test_a_request_that_fell_back_costs_what_the_fallback_counted(
    stack: Stack, redis: RedisServer, session: aiohttp.ClientSession
) -> None:
    stack.start_sims(1)
    stack.start_discovery("--probe-interval", "60")
    stack.start_sims(1)
    outside = f"http://{stack.engines[1]}"
    routes = [
        {"prefix": "*", "base_url": "local"},
        {"base_url": outside, "name": "outside", "fallback": True},
    ]
    flags = ("--route-policy", "prefix", "--route-config", json.dumps(routes))
    ingress = stack.start_ingress(*flags, *counting(redis))
    await stack.ready()
    stack.sims[0].kill()
    await room_in_the_minute(redis)
    await ask_all(session, ingress.url, "fallen back")
    await becomes(redis, "fallen back", sum(await engine_tokens(session, stack.engines[1])))


async def test_a_divided_request_costs_its_prompt_once_and_what_decode_counted(
    tmp_path: Path, redis: RedisServer, session: aiohttp.ClientSession
) -> None:
    with pd_stack(tmp_path, *counting(redis), models=("nixl", "sglang"), modes=("batched",), sims=1) as pd:
        await pd.ready(session)
        for model in ("nixl", "sglang"):
            steering = {"routing-strategy": "pd"}
            await room_in_the_minute(redis)
            await ask_all(session, pd.urls["batched"], model, model, **steering)
            (prefill,), (decode,) = (pd.engines[model, role] for role in (Role.PREFILL, Role.DECODE))
            prompt, _ = await engine_tokens(session, prefill)
            _, generated = await engine_tokens(session, decode)
            assert prompt > 0 < generated
            await becomes(redis, model, prompt + generated)
        await pd.settled(session)


async def test_a_stream_whose_client_leaves_costs_what_the_engine_made_until_it_heard(
    stack: Stack, redis: RedisServer, session: aiohttp.ClientSession
) -> None:
    stack.start_sims(1, "--speedup", "1")
    stack.start_discovery()
    ingress = stack.start_ingress(*counting(redis))
    await stack.ready()
    body = {"model": MODEL, "messages": messages("go on " * 50), "max_tokens": 4000, "stream": True}
    url = f"{ingress.url}/v1/chat/completions"
    await room_in_the_minute(redis)
    async with session.post(url, json=body, headers={"user": "left"}) as response:
        came = 0
        async for line in response.content:
            came += line.startswith(b"data:")
            if came == LEAVE_AFTER:
                break
        response.close()

    async def stopped() -> bool:
        before = await engine_tokens(session, stack.engines[0])
        await asyncio.gather(*(engine_tokens(session, stack.engines[0]) for _ in range(20)))
        return before == await engine_tokens(session, stack.engines[0])

    await eventually(stopped)
    _, generated = await engine_tokens(session, stack.engines[0])

    async def settled() -> bool:
        counted = await asyncio.to_thread(ledger, redis, "left")
        # The prompt is not counted by an engine that nobody lets end: by four bytes a token, as at first.
        prompt = len(json.dumps(body["messages"], separators=(",", ":"))) // 4
        assert LEAVE_AFTER - 1 <= counted - prompt <= generated + 2, (counted, prompt, generated)
        return True

    await eventually(settled)
    assert generated < 400
