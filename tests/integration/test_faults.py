"""Engines that misbehave before and during a response: what clients see, and that nothing leaks."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest

from integration.servers import eventually
from integration.stack import Stack, chat, engine_state, metric, running_stack, stream_chat

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(2)
        stack.start_discovery()
        stack.start_scheduler()
        stack.start_ingress("--request-timeout", "2", "--stream-idle-timeout", "1")
        asyncio.run(stack.ready())
        yield stack


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


async def assert_nothing_is_held(stack: Stack, session: aiohttp.ClientSession) -> None:
    """Ingress, schedulers and engines agree that no request runs."""

    async def idle() -> bool:
        ingress = stack.ingresses[0]
        held = [
            await metric(session, ingress.admin_port, f"penstock_ingress_{n}")
            for n in ("exchanges", "in_flight")
        ]
        held += [
            await metric(session, port, "penstock_scheduler_in_flight_requests")
            for port in stack.scheduler_ports
        ]
        states = [await engine_state(session, engine) for engine in stack.engines]
        held += [state["running"] + state["waiting"] for state in states]
        return not any(held)

    await eventually(idle)


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("429", 429, None),
        ("500", 500, None),
        ("drop-before-headers", 502, "upstream_unreachable"),
        ("garbage", 502, "upstream_unreachable"),
        ("hang-before-headers", 504, "upstream_timeout"),
    ],
)
async def test_a_fault_before_the_first_byte_is_a_typed_error(
    stack: Stack, session: aiohttp.ClientSession, fault: str, status: int, code: str | None
) -> None:
    answered, _, body = await chat(session, stack.url, "hello", headers={"x-sim-fault": fault})
    assert answered == status
    if code:
        assert body["error"]["code"] == code
    await assert_nothing_is_held(stack, session)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("drop-mid-stream;tokens=3", "upstream_unreachable"),
        ("hang-mid-stream;tokens=3", "upstream_timeout"),
        ("garbage-mid-stream;tokens=3", "upstream_unreachable"),
    ],
)
async def test_a_fault_during_a_stream_is_its_last_event(
    stack: Stack, session: aiohttp.ClientSession, fault: str, code: str
) -> None:
    payloads = [p async for p in stream_chat(session, stack.url, "hello", headers={"x-sim-fault": fault})]
    assert json.loads(payloads[-1])["error"]["code"] == code
    assert all("choices" in json.loads(payload) for payload in payloads[:-1])
    assert len(payloads) > 2
    await assert_nothing_is_held(stack, session)


async def test_a_fault_during_a_plain_answer_breaks_the_connection(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    with pytest.raises(aiohttp.ClientPayloadError):
        await chat(session, stack.url, "hello", headers={"x-sim-fault": "drop-mid-stream"})
    await assert_nothing_is_held(stack, session)


async def test_a_client_that_leaves_ends_the_engines_work(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    before = await aborted(stack, session)
    stream = stream_chat(session, stack.url, "a long story", max_tokens=5000)
    await anext(stream)
    await stream.aclose()
    await assert_nothing_is_held(stack, session)
    assert await aborted(stack, session) == before + 1


async def aborted(stack: Stack, session: aiohttp.ClientSession) -> int:
    """Requests that the engines broke off."""
    states = [await engine_state(session, engine) for engine in stack.engines]
    return sum(state["aborted"] for state in states)


async def test_an_engine_that_refuses_connections_costs_no_request(
    stack: Stack, session: aiohttp.ClientSession
) -> None:
    stack.sims[0].kill()
    for n in range(20):
        status, headers, _ = await chat(session, stack.url, f"request {n}")
        assert status == 200
        assert headers["target-pod"] == stack.engines[1]
    await assert_fleet(stack, session, 1)
    stack.restart_sim(0)
    await eventually(lambda: _is_used(stack, session, stack.engines[0]))


async def assert_fleet(stack: Stack, session: aiohttp.ClientSession, taking_work: int) -> None:
    """A killed engine is noticed by the prober and taken out."""
    port = stack.ingresses[0].admin_port

    async def seen() -> bool:
        return taking_work == await metric(session, port, "penstock_registry_taking_work")

    await eventually(seen)


async def _is_used(stack: Stack, session: aiohttp.ClientSession, engine: str) -> bool:
    _, headers, _ = await chat(session, stack.url, "hello", headers={"routing-strategy": "round-robin"})
    return engine == headers["target-pod"]
