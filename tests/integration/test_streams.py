"""Long responses: slow readers, and a drain with streams in flight."""

from __future__ import annotations

import asyncio
import json
import socket

import aiohttp
import psutil
import pytest

from integration.servers import eventually
from integration.stack import MODEL, chat, engine_state, messages, running_stack, stream_chat

pytestmark = pytest.mark.integration


TOKENS = 150_000
BYTES_PER_TOKEN = 180


async def test_a_slow_reader_holds_up_its_own_response_and_nobody_else() -> None:
    with running_stack() as stack:
        stack.start_sims(1, "--instant", "--kv-blocks", "20000", "--max-model-len", str(2 * TOKENS))
        stack.start_discovery()
        stack.start_ingress()
        await stack.ready()
        engine = stack.engines[0]
        worker = psutil.Process(stack.ingresses[0].process.pid).children()[0]
        before = worker.memory_info().rss
        body = json.dumps({"model": MODEL, "messages": messages("go"), "max_tokens": TOKENS, "stream": True})
        slow = socket.create_connection(("127.0.0.1", stack.ingresses[0].port))
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        slow.sendall((head + body).encode())
        async with aiohttp.ClientSession() as session:
            # The engine has computed all of it, and still has most of it in hand.
            await eventually(lambda: _has(session, engine, running=0, open=1, requests_total=1), 30.0)
            status, _, _ = await chat(session, stack.url, "meanwhile")
            assert status == 200
            grown = worker.memory_info().rss - before
            assert grown < TOKENS * BYTES_PER_TOKEN / 3
            slow.close()
            await eventually(lambda: _has(session, engine, running=0, open=0, requests_total=2))


async def _has(session: aiohttp.ClientSession, engine: str, **state: int) -> bool:
    now = await engine_state(session, engine)
    return state.items() <= now.items()


async def test_a_drain_lets_streams_finish_and_takes_no_new_client() -> None:
    with running_stack() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        stack.start_scheduler()
        ingress = stack.start_ingress()
        await stack.ready()
        async with aiohttp.ClientSession() as session:
            stream = stream_chat(session, stack.url, "a story", max_tokens=400)
            await anext(stream)
            ingress.process.terminate()

            async def closed() -> bool:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", ingress.port)
                except ConnectionRefusedError:
                    return True
                writer.close()
                return False

            await eventually(closed)
            payloads = [payload async for payload in stream]
            assert payloads[-1] == "[DONE]"
            finish = json.loads(payloads[-2])["choices"][0]["finish_reason"]
            assert finish == "length"
        await asyncio.to_thread(ingress.process.assert_exit, 0)


async def test_a_stream_that_outlives_the_drain_timeout_ends_with_an_error_event() -> None:
    with running_stack() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        ingress = stack.start_ingress("--drain-timeout", "0.5")
        await stack.ready()
        async with aiohttp.ClientSession() as session:
            stream = stream_chat(session, stack.url, "an endless story", max_tokens=20_000)
            await anext(stream)
            ingress.process.terminate()
            payloads = [payload async for payload in stream]
            assert json.loads(payloads[-1])["error"]["code"] == "shutting_down"
        await asyncio.to_thread(ingress.process.assert_exit, 0)
