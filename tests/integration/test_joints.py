"""One request through many features at once: what each of them leaves to the others."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from aiohttp import web

from integration.drills import following
from integration.servers import eventually, http_status
from integration.shadow_server import Received, ShadowServer, shadow_server
from integration.stack import MODEL, Stack, messages, metric, running_stack

pytestmark = pytest.mark.integration

ALICE, BOB, ENGINE_KEY, OUTSIDE_KEY = "sk-alice", "sk-bob", "sk-engines", "sk-outside"
ENDLESS = 30_000
PROFILES = {
    MODEL: {"default": "calm", "profiles": {"calm": {}, "fast": {"routing_strategy": "least-latency"}}}
}


async def completion(request: web.Request) -> web.Response:
    """What the endpoint outside says."""
    return web.json_response({"outside": True, "usage": {"prompt_tokens": 5, "completion_tokens": 6}})


@dataclass
class Joined:
    """A gateway with HTTPS, keys, limits, profiles, waiting, routes and a mirror, all at once."""

    stack: Stack
    outside: ShadowServer
    shadow: ShadowServer
    session: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.stack.ingresses[0].port}/v1/chat/completions"

    def ask(self, key: str, max_tokens: int, *, stream: bool = True, **headers: str) -> Any:
        """A chat of an owner's key, as `async with` has it."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        body = {
            "model": MODEL,
            "messages": messages(f"{key} asks"),
            "max_tokens": max_tokens,
            "stream": stream,
            "owned_by": "penstock",
        }
        return self.session.post(
            self.url, json=body, headers={"authorization": f"Bearer {key}", "x-owned-by": "nobody", **sent}
        )

    async def administer(self, path: str, value: Any) -> None:
        url = f"{self.stack.ingresses[0].admin_url}/admin/api/{path}"
        async with self.session.put(url, json=value) as response:
            assert response.status == 201, await response.text()

    async def waiting(self, count: int) -> bool:
        port = self.stack.ingresses[0].admin_port
        return await metric(self.session, port, "penstock_ingress_waiting") == count


@pytest.fixture
async def joined(tmp_path: Path) -> AsyncIterator[Joined]:
    authority, trust = trustme.CA(), ssl.create_default_context()
    authority.configure_trust(trust)
    pair = authority.issue_cert("127.0.0.1")
    (tmp_path / "tls.crt").write_bytes(pair.cert_chain_pems[0].bytes())
    (tmp_path / "tls.key").write_bytes(pair.private_key_pem.bytes())
    keys = {
        name: {"owner": name, "hashes": [sha256(key.encode()).hexdigest()]}
        for name, key in (("alice", ALICE), ("bob", BOB))
    }
    (tmp_path / "keys.yaml").write_text(json.dumps(keys), encoding="utf-8")
    (tmp_path / "profiles.yaml").write_text(json.dumps(PROFILES), encoding="utf-8")
    async with AsyncExitStack() as exits:
        stack = exits.enter_context(running_stack())
        outside, shadow = [await exits.enter_async_context(shadow_server()) for _ in range(2)]
        outside.answer = completion
        (tmp_path / "mirror.json").write_text(
            json.dumps({"Enable": True, "Target": shadow.url, "Ratio": 100}), encoding="utf-8"
        )
        stack.start_sims(1)
        stack.start_discovery("--engine-api-key", ENGINE_KEY)
        stack.start_scheduler(
            "--max-requests-per-instance", "1", "--profiles-file", str(tmp_path / "profiles.yaml")
        )
        routes = [
            {"prefix": "*", "base_url": "local"},
            {"base_url": outside.url, "name": "outside", "fallback": True, "api_key": OUTSIDE_KEY},
        ]
        stack.start_ingress(
            *("--tls-cert", str(tmp_path / "tls.crt"), "--tls-key", str(tmp_path / "tls.key")),
            *("--api-keys", str(tmp_path / "keys.yaml"), "--engine-api-key", ENGINE_KEY),
            *("--route-policy", "prefix", "--route-config", json.dumps(routes)),
        )
        mirror = stack.start_mirror(tmp_path / "mirror.json")
        connector = aiohttp.TCPConnector(ssl=trust, limit=0, force_close=True)
        session = await exits.enter_async_context(aiohttp.ClientSession(connector=connector))
        joined = Joined(stack, outside, shadow, session)
        # Requests are placed by the scheduler, and copied.
        for port in (mirror, stack.ingresses[0].admin_port):
            await eventually(lambda: http_status(f"http://127.0.0.1:{port}/readyz") == 200)  # noqa: B023
        await eventually(lambda: metric(session, mirror, "penstock_config_synced"))
        await eventually(lambda: _placed(joined))
        yield joined


async def _placed(joined: Joined) -> bool:
    try:
        async with joined.ask(BOB, 1, stream=False) as response:
            await response.read()
            return response.headers.get("config-profile") == "calm" and bool(joined.shadow.received)
    except aiohttp.ClientError:
        return False


async def test_a_stream_over_https_waits_for_its_turn_under_its_profile_and_is_copied_without_its_key(
    joined: Joined,
) -> None:
    await joined.administer("users/alice", {"tpm": 1_000_000})
    async with following(joined.stack, ("outcome",)) as log:

        async def limited() -> bool:
            async with joined.ask(ALICE, 1, stream=False) as response:
                return response.status == 200 and "x-ratelimit-limit-tokens" in response.headers

        await eventually(limited)
        async with joined.ask(BOB, ENDLESS) as held:
            await held.content.readline()

            async def alice() -> tuple[Any, list[str]]:
                async with joined.ask(ALICE, 6, config_profile="fast", x_request_id="the-one") as response:
                    lines = [line.decode().strip() async for line in response.content if line.strip()]
                    return response, lines

            task = asyncio.create_task(alice(), name="alice")
            await eventually(lambda: joined.waiting(1))
        response, lines = await task
        assert (response.status, response.headers["config-profile"]) == (200, "fast")
        assert response.headers["routing-strategy"] == "least-latency"
        assert response.headers["x-ratelimit-limit-tokens"] == "1000000"
        assert response.headers["x-penstock-route"] == "local"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        # The gateway asks for the usage, and keeps it.
        assert lines[-1] == "data: [DONE]"
        assert all(chunk["choices"] and not chunk.get("usage") for chunk in chunks)

        def of_the_one() -> list[dict[str, Any]]:
            return [data for _, data in log if data["request_id"] == "the-one"]

        (outcome,) = await eventually(of_the_one)
        assert (outcome["outcome"], outcome["status"], outcome["route"]) == ("completed", 200, "local")
        assert (outcome["completion_tokens"], outcome["stream"]) == (6, True)
        assert outcome["waited_ms"] > 0

    def copies() -> list[Received]:
        return [one for one in joined.shadow.received if f"{ALICE} asks".encode() in one.body]

    for one in await eventually(copies):
        assert (one.headers.get("authorization"), one.headers.get("x-owned-by")) == (None, None)
        assert b"owned_by" not in one.body


async def test_a_fallback_outside_gets_its_own_key_and_the_client_s_limit_counts_its_tokens(
    joined: Joined,
) -> None:
    await joined.administer("users/alice", {"tpm": 40})
    await asyncio.to_thread(joined.stack.sims[0].kill)
    async with following(joined.stack, ("outcome",)) as log:
        async with joined.ask(ALICE, 6, stream=False, x_request_id="outside-1") as response:
            assert (response.status, (await response.json())["outside"]) == (200, True)
            assert response.headers["x-penstock-route"] == "outside"
        (sent,) = [one for one in joined.outside.received if "chat" in one.target]
        assert sent.headers["authorization"] == f"Bearer {OUTSIDE_KEY}"
        assert not {"x-owned-by", "x-api-key"} & sent.headers.keys()
        body = json.loads(sent.body)
        assert "owned_by" not in body
        assert body["model"] == MODEL

        def of_the_one() -> list[dict[str, Any]]:
            return [data for _, data in log if data["request_id"] == "outside-1"]

        (outcome,) = await eventually(of_the_one)
        assert (outcome["route"], outcome["status"], outcome["completion_tokens"]) == ("outside", 200, 6)

        async def over() -> bool:
            async with joined.ask(ALICE, 6, stream=False) as response:
                if response.status != 429:
                    return False
                error = (await response.json())["error"]
                return error["code"] == "rate_limit_exceeded" and "retry-after" in response.headers

        await eventually(over)
        # Bob's account is his own.
        async with joined.ask(BOB, 6, stream=False) as response:
            assert response.status == 200
