"""Hostile and broken HTTP from clients and from engines: a defined answer each, and a live gateway."""

from __future__ import annotations

import asyncio
import itertools
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import pytest
import pytest_asyncio

from integration.http_cases import CASES, SLOW, Case
from integration.http_engine_cases import ENGINE_CASES, EVENT, TIMEOUTS, EngineCase
from integration.raw_http import HEALTH, Answer, Client, HostileEngine, read_answer, sized
from integration.servers import eventually, http_status
from integration.stack import Stack, metric, running_stack

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="module")]
_nonces = itertools.count()


@dataclass
class Range:
    """A gateway between a raw client and a raw engine."""

    stack: Stack
    engine: HostileEngine
    # What clients trust, of a gateway that speaks HTTPS.
    tls: ssl.SSLContext | None = None

    async def connect(self) -> Client:
        return await Client.connect(self.port, self.tls)

    @property
    def port(self) -> int:
        return self.stack.ingresses[0].port

    async def alive(self) -> None:
        """A fresh client gets the answer to its own request."""
        nonce = b"%d" % next(_nonces)
        async with await self.connect() as client:
            await client.send(sized(b"X-Nonce: " + nonce))
            answer = await read_answer(client.reader)
        assert (answer.status, answer.body) == (200, b'{"nonce":"%b"}' % nonce)

    async def nothing_is_held(self) -> None:
        """No request is in hand any more."""
        async with aiohttp.ClientSession() as session:
            port = self.stack.ingresses[0].admin_port

            async def idle() -> bool:
                names = ("penstock_ingress_exchanges", "penstock_ingress_in_flight")
                return not any([await metric(session, port, name) for name in names])

            await eventually(idle)


@asynccontextmanager
async def running_range(*flags: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[Range]:
    """Everything of it, checked at the end."""
    engine = HostileEngine({case.name: case.behaviour for case in (*ENGINE_CASES, *TIMEOUTS)})
    address = await engine.start()
    with running_stack() as stack:
        stack.engines.append(address)
        stack.start_discovery()
        stack.start_scheduler()
        stack.start_ingress(
            "--header-timeout", "1", "--idle-timeout", "1.5", "--request-timeout", "2",
            "--stream-idle-timeout", "1", *flags,
        )  # fmt: skip
        port = stack.ingresses[0].admin_port
        await eventually(lambda: http_status(f"http://127.0.0.1:{port}/readyz") == 200)
        attacked = Range(stack, engine, tls)
        await eventually(lambda: by_a_scheduler(attacked))
        yield attacked
        await attacked.nothing_is_held()
        await engine.close()
        assert not engine.faults
        assert stack.ingresses[0].process.exit_code is None
        assert "Traceback" not in stack.ingresses[0].process.stderr


async def by_a_scheduler(attacked: Range) -> bool:
    """Whether requests are placed by one."""
    async with await attacked.connect() as client:
        await client.send(sized(b"X-Nonce: 0"))
        answer = await read_answer(client.reader)
    return answer.headers.get("routing-strategy", "local") != "local"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def attacked() -> AsyncIterator[Range]:
    async with running_range() as attacked:
        yield attacked


async def play(attacked: Range, case: Case) -> list[Answer]:
    """Send the case and compare what comes back, and what becomes of the connection."""
    async with await attacked.connect() as client:
        sending = asyncio.create_task(client.send(*case.sent), name=case.name)
        answers = [await read_answer(client.reader, bodiless=case.bodiless) for _ in case.statuses]
        assert tuple(answer.status for answer in answers) == case.statuses, answers
        if answers and answers[-1].status >= 400 and not case.bodiless:
            assert [answer.code for answer in answers][-1] == case.code, answers
        if case.kept:
            await sending
            await client.send(HEALTH)
            assert (await read_answer(client.reader)).status == 200
        assert await client.ended()
        await sending
        return answers


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
async def test_what_a_client_sends_has_one_defined_answer(attacked: Range, case: Case) -> None:
    before = attacked.engine.chats
    answers = await play(attacked, case)
    relayed = sum("target-pod" in answer.headers for answer in answers)
    assert attacked.engine.chats - before == relayed, "the engine saw a request that the client did not send"
    await attacked.alive()


async def test_a_client_that_waits_for_leave_to_send_its_body_gets_it(attacked: Range) -> None:
    async with await attacked.connect() as client:
        head, body = sized(b"Expect: 100-Continue").split(b"\r\n\r\n", 1)
        await client.send(head + b"\r\n\r\n")
        assert (await read_answer(client.reader)).status == 100
        await client.send(body)
        assert (await read_answer(client.reader)).status == 200
    await attacked.alive()


async def test_clients_that_send_nothing_more_are_ended(attacked: Range) -> None:
    await asyncio.gather(*(play(attacked, case) for case in SLOW))
    await attacked.alive()


async def ask(attacked: Range, case: EngineCase) -> None:
    """Have the engine misbehave, and compare what its client gets."""
    async with await attacked.connect() as client:
        await client.send(sized(b"X-Case: " + case.name.encode()))
        if case.broken:
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await read_answer(client.reader)
            return
        answer = await read_answer(client.reader)
        assert (answer.status, answer.code) == (case.status, case.code)
        assert "forged" not in str(answer.headers)
        assert not {"keep-alive", "x-secret"} & set(answer.headers)
        if case.last:
            assert case.last in answer.body.removeprefix(EVENT)
        elif case.code is None:
            assert answer.body == case.body
        attacked.engine.speak()
        if answer.headers.get("connection") == "close":
            assert await client.ended()
        else:
            await client.send(HEALTH)
            assert (await read_answer(client.reader)).status == 200


@pytest.mark.parametrize("case", ENGINE_CASES, ids=[case.name for case in ENGINE_CASES])
async def test_what_an_engine_answers_harms_its_own_client_at_most(attacked: Range, case: EngineCase) -> None:
    await ask(attacked, case)
    await attacked.alive()


async def test_engines_that_fall_silent_are_given_up(attacked: Range) -> None:
    await asyncio.gather(*(ask(attacked, case) for case in TIMEOUTS))
    await attacked.alive()
