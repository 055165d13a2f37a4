"""Engines behind https: probed and served by a verified connection, or not at all."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import trustme
from aiohttp import web

from integration.servers import eventually, free_port
from integration.stack import MODEL, Stack, chat, metric, running_stack, stream_chat

pytestmark = pytest.mark.integration


async def models(_: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": MODEL}]})


async def answer(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    if not asked.get("stream"):
        return web.json_response({"asked": asked["messages"][0]["content"]})
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for n in range(20):
        await response.write(b"data: %d\n\n" % n)
    await response.write(b"data: [DONE]\n\n")
    return response


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    """Two ingresses; only the first knows the authority of the engine's certificate."""
    authority, port = trustme.CA(), free_port()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    app = web.Application()
    app.add_routes([web.get("/v1/models", models), web.post("/v1/chat/completions", answer)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "localhost", port, ssl_context=context).start()
    known = ("--engine-tls-ca", str(tmp_path / "ca.pem"))
    with running_stack() as stack:
        stack.engines.append(f"https://localhost:{port}")
        stack.start_discovery(*known)
        stack.start_ingress(*known)
        stack.start_ingress()
        await stack.ready()
        yield stack
    await runner.cleanup()


async def test_an_engine_behind_https_serves_whoever_can_verify_it(stack: Stack) -> None:
    knowing, ignorant = stack.ingresses
    async with aiohttp.ClientSession() as session:

        async def healthy() -> bool:
            return await metric(session, knowing.admin_port, "penstock_registry_taking_work") == 1

        await eventually(healthy)
        for n in range(3):
            status, _, body = await chat(session, knowing.url, f"over TLS {n}")
            assert (status, body) == (200, {"asked": f"over TLS {n}"})
            payloads = [payload async for payload in stream_chat(session, knowing.url, "streamed")]
            assert payloads == [*map(str, range(20)), "[DONE]"]
        # One connection serves them all.
        assert await metric(session, knowing.admin_port, "penstock_ingress_upstream_connects_total") == 1
        status, _, body = await chat(session, ignorant.url, "unverified")
        assert (status, body["error"]["code"]) == (502, "upstream_unreachable")
        assert "certificate" in body["error"]["message"].lower()
