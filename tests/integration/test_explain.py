"""Explaining on real processes: `penstock explain` by request id, and where a request would go now."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import aiohttp
import pytest

from integration.servers import eventually
from integration.stack import MODEL, Stack, chat, engine_state, messages, running_stack

pytestmark = pytest.mark.integration

STRATEGY = "prefix-cache:6,least-request:1"
PROMPT = "a prompt of several blocks, " * 60


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(2)
        stack.start_discovery()
        stack.start_scheduler()
        stack.start_ingress("--block-hash-secret", "a-secret-of-the-tests", "--block-hash-tenant", "user")
        yield stack


@pytest.fixture
async def session(stack: Stack) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        await stack.ready()
        yield session


async def would_go(session: aiohttp.ClientSession, stack: Stack, body: Any) -> tuple[int, Any]:
    async with session.post(f"{stack.ingresses[0].admin_url}/admin/api/explain", json=body) as response:
        return response.status, json.loads(await response.read())


async def explain(stack: Stack, name: str) -> tuple[int, Any]:
    """Exit code of the command, and what it printed."""
    arguments = ("-m", "penstock.cli", "explain", name, "--json", "--nats-url", stack.nats.url)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=pipe, stderr=pipe)
    out, err = await asyncio.wait_for(process.communicate(), 60)
    return process.returncode or 0, json.loads(out) if out else err.decode()


async def test_where_a_request_would_go_is_where_it_goes(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    headers = {"routing-strategy": STRATEGY, "user": "ann"}
    _, answered, _ = await chat(session, stack.url, PROMPT, headers=headers)
    holder = answered["target-pod"]
    # As the client library writes it: prompts match byte for byte.
    body = {"model": MODEL, "messages": messages(PROMPT), "max_tokens": 8}
    before = [(await engine_state(session, engine))["requests_total"] for engine in stack.engines]

    async def told(user: str) -> Any:
        routing = {"strategy": STRATEGY, "user": user}
        status, answer = await would_go(session, stack, {**body, "routing": routing})
        assert status == 200, answer
        return answer

    answer = await told("ann")
    assert (answer["instance"], answer["policy"], answer["reason"]) == (holder, STRATEGY, None)
    assert answer["matched_blocks"] == answer["blocks"] > 3
    assert {one["instance"] for one in answer["candidates"]} == set(stack.engines)
    best = answer["candidates"][0]
    assert best["terms"]["prefix-cache"] == 1.0
    assert best["terms"].keys() == answer["weights"].keys() == {"prefix-cache", "least-request"}
    assert answer["recomputed"] == "same pick, same score"
    # Another tenant's prefix is not hers.
    assert (await told("bob"))["matched_blocks"] == 0
    assert [(await engine_state(session, engine))["requests_total"] for engine in stack.engines] == before


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"messages": []}, (400, "messages")),
        ({"messages": None}, (400, "messages")),
        ({"prompt": "x"}, (400, "prompt")),
        ({"model": 7}, (400, "model")),
        ({"routing": {"priority": 10**9}}, (400, "routing.priority")),
        ({"routing": {"colour": "red"}}, (400, "routing.colour")),
        ({"routing": {"owner": "nobody"}}, (404, "owned_by")),
    ],
)
async def test_what_cannot_be_explained_is_refused_with_its_field(
    stack: Stack, session: aiohttp.ClientSession, change: dict[str, Any], expected: tuple[int, str]
) -> None:
    status, answer = await would_go(session, stack, {"model": MODEL, "messages": messages("x"), **change})
    assert (status, answer["error"]["param"]) == expected


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"model": "nobody-has-it"}, "unknown_model"), ({"routing": {"strategy": "best"}}, "bad_strategy")],
)
async def test_a_request_that_would_be_refused_is_told_why(
    stack: Stack, session: aiohttp.ClientSession, change: dict[str, Any], reason: str
) -> None:
    status, answer = await would_go(session, stack, {"model": MODEL, "messages": messages("x"), **change})
    assert (status, answer["instance"], answer["reason"]) == (200, None, reason)
    assert answer["message"]


async def test_the_command_tells_of_a_request_placed_by_a_scheduler_and_of_one_placed_without(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    _, headers, _ = await chat(session, stack.url, PROMPT, headers={"x-request-id": "asked-1"})
    code, story = await explain(stack, "asked-1")
    assert code == 0, story
    text = json.dumps(story)
    assert headers["target-pod"] in text
    assert "same pick, same score" in text
    assert PROMPT[:20] not in text

    await asyncio.to_thread(stack.schedulers[0].kill)

    async def locally() -> bool:
        _, headers, _ = await chat(session, stack.url, "y", headers={"x-request-id": "asked-2"})
        return headers.get("routing-strategy") == "local"

    await eventually(locally)
    code, story = await explain(stack, "asked-2")
    assert code == 0, story
    assert '"local"' in json.dumps(story)
    assert (await explain(stack, "nobody-asked"))[0] == 1
    status, answer = await would_go(session, stack, {"model": MODEL, "messages": messages("x")})
    assert (status, answer["error"]["code"]) == (503, "bus_unavailable")
