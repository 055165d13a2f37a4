"""Rate limits with real Redis and several workers: settled by what was used, live, through outages."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from typing import Any

import aiohttp
import pytest

from integration.limit_labs import asked, counting_ingress, ledger, within_a_minute
from integration.redis_lab import RedisServer
from integration.servers import eventually
from integration.stack import MODEL, Stack, chat, messages, metric, stream_chat
from penstock.ingress.adapters.limit_store import RedisLimitStore
from penstock.ingress.limit_settings import LimitSettings
from penstock.ingress.limits import TOKENS, Part
from penstock.ingress.ports import StoreLost

pytestmark = pytest.mark.integration

WORKERS = "8" if "PENSTOCK_SOAK_SECONDS" in os.environ else "2"
LOST = "penstock_ingress_limits_store_lost"
LEAVE_AFTER = 5


async def test_the_ledger_is_the_engine_s_own_count(
    stack: Stack, redis: RedisServer, session: aiohttp.ClientSession
) -> None:
    ingress = await counting_ingress(
        stack, redis, "redis", WORKERS, "--limits-default-tpm", "1000000", "--retry-max-count", "2"
    )
    url = f"http://{stack.engines[0]}/metrics"

    async def engine_tokens() -> int:
        async with session.get(url) as response:
            text = await response.text()
        found = re.findall(r"^vllm:(?:prompt|generation)_tokens_total\{[^}]*\} (\S+)$", text, re.MULTILINE)
        assert len(found) == 2
        return int(sum(map(float, found)))

    async def ask(user: str) -> None:
        before = await engine_tokens()
        plain = [chat(session, ingress.url, f"p{n}" * n, headers={"user": user}) for n in range(1, 9)]
        streams = [_streamed(session, ingress.url, f"s{n}" * n, user) for n in range(1, 9)]
        await asyncio.gather(*plain, *streams)
        used = await engine_tokens() - before
        await eventually(lambda: _is_counted(redis, user, used))

    await within_a_minute(ask)
    ingress.process.terminate()


async def _streamed(session: aiohttp.ClientSession, url: str, prompt: str, user: str) -> None:
    events = [event async for event in stream_chat(session, url, prompt, headers={"user": user})]
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["choices"] for event in events[:-1])


async def _is_counted(redis: RedisServer, user: str, tokens: int) -> bool:
    return await asyncio.to_thread(ledger, redis, user) == tokens


async def test_an_aborted_stream_is_counted_by_what_came(
    stack: Stack, redis: RedisServer, session: aiohttp.ClientSession
) -> None:
    ingress = await counting_ingress(stack, redis, "redis", WORKERS, "--limits-default-tpm", "100000")

    async def leave(user: str) -> None:
        body: dict[str, Any] = {"model": MODEL, "messages": messages("go on"), "max_tokens": 4000}
        async with session.post(
            f"{ingress.url}/v1/chat/completions", json=body | {"stream": True}, headers={"user": user}
        ) as response:
            came = 0
            async for line in response.content:
                came += line.startswith(b"data:")
                if came == LEAVE_AFTER:
                    break
            response.close()

        async def counted_in_part() -> bool:
            return LEAVE_AFTER <= await asyncio.to_thread(ledger, redis, user) < 4000

        await eventually(counted_in_part)

    await within_a_minute(leave)
    ingress.process.terminate()


async def test_users_records_count_at_once_in_every_worker(
    stack: Stack, redis: RedisServer, session: aiohttp.ClientSession
) -> None:
    ingress = await counting_ingress(stack, redis, "redis", WORKERS)

    async def write(user: str) -> None:
        record = {"rpm": 0, "models": {MODEL: {"rpm": 3}}}
        async with session.put(f"{ingress.admin_url}/admin/api/users/{user}", json=record) as response:
            assert response.status == 201

        async def limited() -> bool:
            asked = [chat(session, ingress.url, "hi", headers={"user": user}) for _ in range(8)]
            answers = await asyncio.gather(*asked)
            return all("x-ratelimit-limit-requests" in headers for _, headers, _ in answers)

        await eventually(limited)
        status, _, answer = await chat(session, ingress.url, "hi", headers={"user": user})
        assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
        async with session.put(f"{ingress.admin_url}/admin/api/users/{user}", json={"rmp": 1}) as response:
            assert response.status == 400

    await within_a_minute(write)
    ingress.process.terminate()


async def test_a_profile_s_requests_per_second_count_at_once_over_all_workers(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    stack.ingresses.clear()
    ingress = stack.start_ingress("--workers", WORKERS)
    await stack.ready()
    url = f"{ingress.admin_url}/admin/api/profiles/{MODEL}"
    async with session.put(url, json={"profiles": {"default": {"requests_per_second": 1}}}) as response:
        assert response.status == 201

    async def limited() -> bool:
        """As many pass as seconds of the clock began."""
        begun = int(time.time())
        asked = [chat(session, ingress.url, "hi", max_tokens=1) for _ in range(8)]
        answers = await asyncio.gather(*asked)
        passed = sum(status == 200 for status, _, _ in answers)
        refused = [headers for status, headers, _ in answers if status == 429]
        assert passed <= 1 + int(time.time()) - begun
        return bool(refused) and all(h["x-error-model-rps-exceeded"] == "true" for h in refused)

    try:
        await eventually(limited)
    finally:
        async with session.delete(url) as response:
            assert response.status in (200, 204)
        ingress.process.terminate()


@pytest.mark.parametrize(
    ("kind", "mode", "away"),
    [
        ("redis", "local", {200, 429}),
        ("redis", "open", {200}),
        ("redis", "closed", {503}),
        ("nats", "local", {200, 429}),
        ("nats", "closed", {503}),
    ],
    ids=str,
)
async def test_the_store_is_restarted_in_a_burst(
    stack: Stack, redis: RedisServer, session: aiohttp.ClientSession, kind: str, mode: str, away: set[int]
) -> None:
    server = redis if kind == "redis" else stack.nats
    flags = ("--limits-default-rpm", "5", "--limits-on-store-loss", mode)
    ingress = await counting_ingress(stack, redis, kind, 1, *flags)
    statuses: list[int] = []
    stop, down = asyncio.Event(), False

    async def client(number: int) -> None:
        asked = 0
        while not stop.is_set():
            user = f"{kind} {mode} {number} {asked // 10}"
            status, _, _ = await chat(session, ingress.url, "hi", max_tokens=1, headers={"user": user})
            statuses.append(status)
            asked += 1

    async def lost(value: float) -> bool:
        return await metric(session, ingress.admin_port, LOST) == value

    async def more() -> set[int]:
        """The statuses of what is asked from now on."""
        start = len(statuses) + 8
        await eventually(lambda: len(statuses) >= start + 60)
        return set(statuses[start:])

    clients = [asyncio.create_task(client(number)) for number in range(4)]
    try:
        assert await more() == {200, 429}
        server.kill()
        down = True
        await eventually(lambda: lost(1.0))
        assert await more() == away
        await asyncio.to_thread(server.start)
        down = False
        await eventually(lambda: lost(0.0))
        assert await more() == {200, 429}
    finally:
        stop.set()
        await asyncio.gather(*clients)
        if down:
            server.start()
        ingress.process.terminate()
    assert set(statuses) <= {200, 429} | away


async def test_what_is_no_redis_and_what_is_no_count(redis: RedisServer) -> None:
    claims = [[Part("k", 60, 1, 10, TOKENS, "")]]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        addresses = [f"127.0.0.1:{server.sockets[0].getsockname()[1]}/0", f"{redis.address}/2"]
        with redis.client() as client:
            client.select(2)
            seconds, _ = client.time()
            for minute in (0, 1):
                client.rpush(f"penstock:limits:k:{seconds // 60 + minute}", "a list")
        for address in addresses:
            store = RedisLimitStore(
                LimitSettings(limits_store="redis", limits_redis_url=f"redis://{address}")
            )
            with pytest.raises(StoreLost):
                await asked(store, claims)
            await store.close()
