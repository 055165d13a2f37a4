"""A drain takes nothing further, lets what runs finish, and ends what does not."""

import asyncio
import json

import pytest
from integration.servers import eventually

from .ingress_lab import STREAM_BODY, Engine, Lab

HEALTH = b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n"


async def test_a_drain_ends_idle_connections_and_lets_a_stream_finish(lab: Lab, engine: Engine) -> None:
    idle = await lab.client()
    idle.send(HEALTH)
    await idle.response()
    client, peer = await lab.exchange(engine)
    peer.begin_stream()
    await client.head()
    async with asyncio.TaskGroup() as tasks:
        drain = tasks.create_task(lab.drain(10.0), name="drain")
        assert await idle.rest() == b""
        with pytest.raises(ConnectionRefusedError):
            await lab.client()
        await client.until(peer.event("still here"))
        assert not drain.done()
        peer.send(b"0\r\n\r\n")
        assert await client.rest() == b"0\r\n\r\n"
    assert (await lab.outcome())["outcome"] == "completed"


async def test_a_response_that_begins_during_a_drain_says_that_the_connection_ends(
    lab: Lab, engine: Engine
) -> None:
    client, peer = await lab.exchange(engine)
    client.send(HEALTH)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(lab.drain(10.0), name="drain")
        await eventually(lambda: lab.gateway.draining)
        peer.answer(b"last")
        response = await client.response()
        assert (response.body, response.headers["connection"]) == (b"last", "close")
        assert await client.rest() == b""


async def test_what_does_not_finish_in_time_is_told_so_and_ended(lab: Lab, engine: Engine) -> None:
    streaming, stream_peer = await lab.exchange(engine)
    stream_peer.begin_stream()
    await streaming.until(stream_peer.event("one"))
    waiting, waiting_peer = await lab.exchange(engine)
    plain, plain_peer = await lab.exchange(engine)
    plain_peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
    await plain.until(b"half")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(lab.drain(0.1), name="drain")
        size = int(await streaming.until(b"\r\n"), 16)
        event = await streaming.exactly(size)
        assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
        assert await streaming.rest() == b"\r\n0\r\n\r\n"
        response = await waiting.response()
        assert (response.status, response.error["code"]) == (503, "shutting_down")
        assert (response.headers["retry-after"], response.headers["connection"]) == ("1", "close")
        with pytest.raises(ConnectionResetError):
            await plain.rest()
        for peer in (stream_peer, waiting_peer, plain_peer):
            await peer.gone()
    assert [outcome["outcome"] for outcome in await lab.settled()] == ["shutdown"] * 3


async def test_a_request_still_being_placed_when_the_time_is_over_is_refused(lab: Lab) -> None:
    await lab.engine()
    lab.bus.open.clear()
    client = await lab.client()
    client.post()
    await eventually(lambda: lab.scheduler.placed)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(lab.drain(0.1), name="drain")
        assert (await client.response()).error["code"] == "shutting_down"
    (outcome,) = await lab.events("outcome")
    assert (outcome["outcome"], outcome["decisions"]) == ("shutdown", list(lab.scheduler.placed))
    # Its reply is not waited for: the leaving report releases all that is held for this ingress.
    assert lab.published[-1].leaving
    lab.released |= lab.scheduler.placed


async def test_the_last_report_says_that_the_ingress_leaves_with_nothing_in_flight(
    lab: Lab, engine: Engine
) -> None:
    client, peer = await lab.exchange(engine)
    lab.service.publish(lab.account.snapshot())
    await lab.drain(0.1)
    assert (await client.response()).status == 503
    await eventually(lambda: lab.published[-1].leaving)
    told = [([w.decision_id for w in r.in_flight], r.finished, r.leaving) for r in lab.published]
    assert told == [
        (["1.1"], (), False),
        (["1.1"], (), False),
        ([], ("1.1",), False),
        ([], (), True),
    ]
    assert [report.sequence for report in lab.published] == [1, 2, 3, 4]
    await peer.gone()


async def test_a_client_gets_what_was_written_for_it_before_its_connection_ends(lab: Lab) -> None:
    engine = await lab.engine()
    client = await lab.client(receive_buffer=16384)
    client.post(STREAM_BODY)
    peer = await engine.accept()
    await peer.request()
    body = b"x" * 8_000_000
    peer.answer(body)
    await client.head()
    received = 0
    # Read until the exchange is over: the last bytes wait in the ingress for a client that stops here.
    while lab.gateway.exchanges:
        received += len(await client.exactly(4096))
    async with asyncio.TaskGroup() as tasks:
        drain = tasks.create_task(lab.drain(0.1), name="drain")
        await eventually(lambda: lab.published and lab.published[-1].leaving)
        assert not drain.done()
        assert len(await client.rest()) == len(body) - received
