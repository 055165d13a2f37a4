"""Traffic splitting with the services as processes: by prefix, by weight, changed while requests come."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from integration.servers import eventually
from integration.stack import MODEL, Stack, messages, running_stack

pytestmark = pytest.mark.integration

OTHER = "Qwen/Qwen2.5-7B"
KEY = "sk-outside"


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    """An instance inside, one outside that discovery does not know, and an ingress by prefix."""
    with running_stack() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        stack.start_sims(1, "--model", OTHER)
        stack.start_scheduler()
        routes = [
            {"prefix": "sim-*", "base_url": "local"},
            {"prefix": "Qwen/Qwen2.5-*", "base_url": outside(stack), "name": "outside", "fallback": True},
        ]
        stack.start_ingress("--route-policy", "prefix", "--route-config", json.dumps(routes))
        await stack.ready()
        yield stack


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def outside(stack: Stack) -> str:
    return f"http://{stack.engines[1]}"


async def route_of(stack: Stack, session: aiohttp.ClientSession, model: str = MODEL) -> tuple[int, str]:
    body = {"model": model, "messages": messages("hi"), "max_tokens": 1}
    async with session.post(f"{stack.url}/v1/chat/completions", json=body) as response:
        await response.read()
        return response.status, response.headers.get("x-penstock-route", "")


async def test_prefixes_fallback_and_live_changes(stack: Stack, session: aiohttp.ClientSession) -> None:
    assert await route_of(stack, session) == (200, "local")
    assert await route_of(stack, session, OTHER) == (200, "outside")

    # No route takes it: the chain is asked, whose endpoint does not know the model and says so.
    status, route = await route_of(stack, session, "nobody's")
    assert (status, route) == (404, "outside")

    # By weight, through the admin API; the outside one is told the name that it knows.
    admin = f"{stack.ingresses[0].admin_url}/admin/api/routes"
    entries: list[dict[str, Any]] = [
        {"base_url": "local", "weight": 50},
        {
            "base_url": outside(stack),
            "name": "live",
            "weight": 50,
            "fallback": True,
            "api_key": KEY,
            "model": OTHER,
            "rewrite_model": True,
        },
    ]
    by_weight = {"policy": "weight", "routes": entries}
    async with session.put(admin, json=by_weight) as response:
        assert response.status == 201
        assert KEY not in await response.text()
    async with session.put(admin, json={"policy": "weight", "routes": [{"base_url": "ftp://x"}]}) as response:
        assert response.status == 400
    await eventually(lambda: seen_live(stack, session))
    routes = Counter([await route_of(stack, session) for _ in range(100)])
    assert routes.keys() == {(200, "local"), (200, "live")}
    assert 25 <= routes[200, "live"] <= 75

    # The inside dies: what is drawn for it goes to the chain.
    await asyncio.to_thread(stack.sims[0].kill)
    for _ in range(10):
        assert await route_of(stack, session) == (200, "live")

    # Deleted, the flags are in force again; rolled back, the weights.
    async with session.delete(admin) as response:
        assert response.status == 200
    await eventually(lambda: is_route(stack, session, OTHER, "outside"))
    async with session.post(f"{admin}/rollback?version=1") as response:
        assert response.status == 200
        assert KEY not in await response.text()
    await eventually(lambda: is_route(stack, session, MODEL, "live"))


async def seen_live(stack: Stack, session: aiohttp.ClientSession) -> bool:
    return await is_route(stack, session, MODEL, "live")


async def is_route(stack: Stack, session: aiohttp.ClientSession, model: str, name: str) -> bool:
    return (await route_of(stack, session, model))[1] == name
