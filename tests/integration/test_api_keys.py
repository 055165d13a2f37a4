"""API keys with the services as processes: a file that changes while requests come, limits by key, and what
engines, the prober and external endpoints get to see."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from integration.servers import eventually
from integration.shadow_server import ShadowServer, shadow_server
from integration.stack import MODEL, Stack, chat, running_stack

pytestmark = pytest.mark.integration

ENGINE_KEY, OUTSIDE_KEY = "sk-engines", "sk-outside"
ALICE, BOB, LATE = "sk-alice-one", "sk-bob", "sk-late"
OUTSIDE = "outside-model"


def hashed(key: str) -> str:
    return sha256(key.encode()).hexdigest()


@dataclass
class Guarded:
    """An ingress with keys, in front of an engine and an external endpoint that write down what they get."""

    stack: Stack
    engine: ShadowServer
    outside: ShadowServer
    path: Path
    session: aiohttp.ClientSession

    def write(self, **keys: Any) -> None:
        """The file, as an editor replaces it."""
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(keys), encoding="utf-8")
        beside.replace(self.path)

    async def status(self, key: str, model: str = MODEL, **headers: str) -> int:
        """Of a chat with that key."""
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
        headers = {"authorization": f"Bearer {key}", **headers}
        url = f"{self.stack.url}/v1/chat/completions"
        async with self.session.post(url, json=body, headers=headers) as response:
            await response.read()
            return response.status

    async def becomes(self, status: int, key: str, model: str = MODEL) -> None:
        """Wait for an answer."""

        async def there() -> bool:
            return await self.status(key, model) == status

        await eventually(there)


async def engine_answer(request: web.Request) -> web.StreamResponse:
    if request.path == "/v1/models":
        return web.json_response({"data": [{"id": MODEL, "object": "model", "owned_by": "inside"}]})
    return web.json_response(
        {"choices": [{"index": 0}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    )


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with AsyncExitStack() as exits:
        stack = exits.enter_context(running_stack())
        engine, outside = [await exits.enter_async_context(shadow_server()) for _ in range(2)]
        engine.answer = engine_answer
        session = await exits.enter_async_context(aiohttp.ClientSession())
        guarded = Guarded(stack, engine, outside, tmp_path / "keys.yaml", session)
        guarded.write(
            alice={"owner": "alice", "hashes": [hashed(ALICE)]},
            bob={"owner": "bob", "hashes": [hashed(BOB)], "models": [OUTSIDE]},
        )
        stack.engines.append(engine.url.removeprefix("http://"))
        stack.start_discovery("--engine-api-key", ENGINE_KEY)
        routes = [
            {"prefix": "outside-*", "base_url": outside.url, "name": "outside", "api_key": OUTSIDE_KEY},
            {"prefix": "open-*", "base_url": outside.url, "name": "open"},
            {"prefix": "*", "base_url": "local"},
        ]
        flags = ("--engine-api-key", ENGINE_KEY, "--api-keys", str(guarded.path))
        stack.start_ingress(*flags, "--route-policy", "prefix", "--route-config", json.dumps(routes))
        await stack.ready()
        await guarded.becomes(200, ALICE)
        yield guarded


def seen(server: ShadowServer, path: str) -> set[str | None]:
    """The credentials that a server was shown on a path."""
    return {
        received.headers.get("authorization")
        for received in server.received
        if received.target.startswith(path)
    }


async def test_keys_end_at_the_gateway_and_engines_get_theirs(guarded: Guarded) -> None:
    assert await guarded.status(ALICE, user="somebody", **{"x-api-key": ALICE}) == 200
    assert await guarded.status(ALICE, OUTSIDE) == 200
    assert await guarded.status(ALICE, "open-model") == 200
    assert seen(guarded.engine, "/v1/chat") == seen(guarded.engine, "/v1/models") == {f"Bearer {ENGINE_KEY}"}
    to_outside = [(json.loads(one.body)["model"], one.headers) for one in guarded.outside.received]
    assert {model: headers.get("authorization") for model, headers in to_outside} == {
        OUTSIDE: f"Bearer {OUTSIDE_KEY}",
        "open-model": None,
    }
    for server in (guarded.engine, guarded.outside):
        assert not any(ALICE in str(one.headers) for one in server.received)
        assert not any("x-api-key" in one.headers for one in server.received)
    assert ENGINE_KEY not in str(to_outside)
    lines = guarded.stack.ingresses[0].process.stderr
    assert not [key for key in (ALICE, ENGINE_KEY, OUTSIDE_KEY, hashed(ALICE)) if key in lines]


async def test_a_file_of_keys_changes_while_requests_come(guarded: Guarded) -> None:
    assert [await guarded.status(key) for key in ("sk-nobody", BOB)] == [401, 404]
    assert await guarded.status(BOB, OUTSIDE) == 200
    new = "sk-alice-two"
    soon = datetime.now(UTC) + timedelta(seconds=3)
    guarded.write(
        alice={"owner": "alice", "hashes": [hashed(ALICE), hashed(new)]},
        late={"owner": "late", "hashes": [hashed(LATE)], "expires_at": soon.isoformat()},
    )
    await guarded.becomes(200, new)
    assert [await guarded.status(key) for key in (ALICE, new, BOB)] == [200, 200, 401]
    guarded.path.write_text("alice: {owner: alice, hashes: [broken]}", encoding="utf-8")
    await eventually(lambda: "cannot be used" in guarded.stack.ingresses[0].process.stderr)
    assert [await guarded.status(key) for key in (ALICE, new)] == [200, 200]
    guarded.write(
        alice={"owner": "alice", "hashes": [hashed(new)]},
        late={"owner": "late", "hashes": [hashed(LATE)], "expires_at": soon.isoformat()},
    )
    await guarded.becomes(401, ALICE)
    await guarded.becomes(401, LATE)
    assert time.time() >= soon.timestamp()
    assert await guarded.status(new) == 200


async def test_a_key_s_limits_are_its_owner_s_whatever_the_header_says(guarded: Guarded) -> None:
    url = f"{guarded.stack.ingresses[0].admin_url}/admin/api/users/alice"
    async with guarded.session.put(url, json={"rpm": 2}) as response:
        assert response.status == 201

    async def limited() -> bool:
        asked = [
            chat(
                guarded.session,
                guarded.stack.url,
                "hi",
                headers={"authorization": f"Bearer {ALICE}", "user": n},
            )
            for n in ("x", "y", "z")
        ]
        return 429 in [status for status, _, _ in await asyncio.gather(*asked)]

    await eventually(limited)
    assert await guarded.status(BOB, OUTSIDE, user="alice") == 200
