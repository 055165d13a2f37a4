"""Requests with large bodies against a real helper process that is killed, frozen, flooded and idle."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
from integration.servers import eventually

from penstock.common.block_hash import root_seed
from penstock.common.telemetry import Metrics
from penstock.ingress.adapters.body_helper import MAX_WAITING, BodyHelper
from penstock.ingress.block_hash import chain, condense
from penstock.ingress.large_bodies import LARGE_BODY_BYTES, Setup
from penstock.ingress.openai import parse

from .conftest import LabOf
from .ingress_lab import CHAT, Engine, Lab, Peer

LARGE = b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % (b"long words " * 30_000)
assert len(LARGE) > LARGE_BODY_BYTES


def running(pid: int) -> bool:
    """Whether the process is there, zombies aside."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def helper_of(lab: Lab) -> int:
    """Its helper, once there is one."""
    return await eventually(lambda: lab.large_bodies.pid)


async def serve(engine: Engine) -> None:
    """Answer whatever comes."""

    async def answer(peer: Peer) -> None:
        try:
            while True:
                _, _, body = await peer.request()
                peer.answer(b'{"size":%d}' % len(body))
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            return

    async with asyncio.TaskGroup() as peers:
        while True:
            peers.create_task(answer(await engine.accept()))


async def test_a_large_body_is_hashed_as_a_small_one_and_reaches_the_engine_as_it_is(
    lab: Lab, engine: Engine
) -> None:
    client = await lab.client()
    client.post(LARGE, x_session_id="s")
    peer = await engine.accept()
    _, _, body = await peer.request()
    peer.answer(b"done")
    assert (body, (await client.response()).body) == (LARGE, b"done")
    inference = parse(CHAT.encode(), "application/json", LARGE)
    (asked,) = lab.scheduler.requests
    assert asked.block_hashes == chain(condense(inference.prompt), root_seed("", "m"), 256)
    assert (asked.model, asked.prompt_tokens, asked.session) == ("m", inference.prompt_tokens, "s")
    assert lab.metric("penstock_ingress_large_bodies_total", "read") == 1


async def test_a_large_chunked_body_arrives_whole(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.send(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
    chunks = [LARGE[start : start + 100] for start in range(0, len(LARGE), 100)]
    client.send(b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n")
    peer = await engine.accept()
    _, _, body = await peer.request()
    peer.answer()
    assert (body, (await client.response()).status) == (LARGE, 200)


async def test_a_large_body_of_several_megabytes_is_sent_to_an_engine_that_reads_slowly(
    lab: Lab, engine: Engine
) -> None:
    body = LARGE + b" " * 3_000_000
    client = await lab.client(receive_buffer=4096)
    client.post(body)
    peer = await engine.accept()
    _, headers, _ = await peer.head()
    received = b""
    while len(received) < int(headers["content-length"]):
        received += await peer.exactly(min(50_000, len(body) - len(received)))
    peer.answer()
    assert (received, (await client.response()).status) == (body, 200)


@pytest.mark.parametrize(
    "body",
    [LARGE[:-1], LARGE[:-1] + b',"model":1}', b"[" * 300_000, LARGE.replace(b'"messages"', b'"message"')],
    ids=["cut", "bad field", "deep", "no messages"],
)
async def test_a_large_body_that_is_not_valid_is_refused_in_the_words_of_a_small_one(
    lab: Lab, body: bytes
) -> None:
    lab.list_instances()
    await lab.engine()
    with pytest.raises(Exception) as raised:
        parse(CHAT.encode(), "application/json", body)
    client = await lab.client()
    answer = await client.ask(body)
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")
    assert (answer.error["message"], answer.error["param"]) == (raised.value.message, raised.value.param)  # type: ignore[attr-defined]
    # The connection is as good as before.
    assert (await client.ask(body)).status == 400


async def test_a_body_whose_helper_is_killed_is_read_by_the_next_one(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.post(LARGE)
    pid = await helper_of(lab)
    os.kill(pid, signal.SIGKILL)
    peer = await engine.accept()
    await peer.request()
    peer.answer()
    assert (await client.response()).status == 200
    assert lab.large_bodies.pid != pid
    assert lab.metric("penstock_ingress_body_helpers_lost_total") == 1
    degraded = await lab.events("degraded")
    assert [(event["what"], event["active"]) for event in degraded] == [
        ("reading large bodies", True),
        ("reading large bodies", False),
    ]


async def test_a_body_that_ends_two_helpers_is_refused_and_the_next_one_is_read(
    lab: Lab, engine: Engine
) -> None:
    client = await lab.client()
    client.post(LARGE)
    first = await helper_of(lab)
    os.kill(first, signal.SIGKILL)
    second = await eventually(lambda: lab.large_bodies.pid if lab.large_bodies.pid != first else None)
    os.kill(second, signal.SIGKILL)
    answer = await client.response()
    assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "overloaded", "1")
    client.post(LARGE)
    peer = await engine.accept()
    await peer.request()
    peer.answer()
    assert (await client.response()).status == 200


async def test_a_frozen_helper_is_replaced_and_small_bodies_never_wait_for_it(
    lab: Lab, engine: Engine
) -> None:
    client, other = await lab.client(), await lab.client()
    async with asyncio.TaskGroup() as tasks:
        engines = tasks.create_task(serve(engine))
        assert (await client.ask(LARGE)).status == 200
        frozen = await helper_of(lab)
        os.kill(frozen, signal.SIGSTOP)
        client.post(LARGE)
        for _ in range(3):
            assert (await other.ask()).status == 200
        assert lab.large_bodies.pid == frozen
        assert (await client.response()).status == 200
        engines.cancel()
    assert not running(frozen)


async def test_a_client_that_leaves_takes_its_body_out_of_the_queue(lab: Lab, engine: Engine) -> None:
    first, second = await lab.client(), await lab.client()
    first.post(LARGE)
    os.kill(await helper_of(lab), signal.SIGSTOP)
    second.post(LARGE)
    await eventually(lambda: lab.metric("penstock_ingress_large_bodies_waiting") == 1)
    second.close()
    await eventually(lambda: lab.metric("penstock_ingress_large_bodies_waiting") == 0)
    first.close()
    await eventually(lambda: not lab.gateway.exchanges)
    os.kill(await helper_of(lab), signal.SIGCONT)
    await eventually(lambda: lab.metric("penstock_ingress_large_bodies_total", "client_gone") == 2)
    assert engine.connections == 0


async def test_a_full_queue_refuses_at_once_and_everybody_else_is_served(lab: Lab, engine: Engine) -> None:
    clients = [await lab.client() for _ in range(MAX_WAITING + 2)]
    async with asyncio.TaskGroup() as tasks:
        engines = tasks.create_task(serve(engine))
        clients[0].post(LARGE)
        helper = await helper_of(lab)
        os.kill(helper, signal.SIGSTOP)
        for client in clients[1:]:
            client.post(LARGE)
        refused = await eventually(
            lambda: lab.metric("penstock_ingress_large_bodies_total", "overloaded") == 1
        )
        os.kill(helper, signal.SIGCONT)
        answers = [await client.response() for client in clients]
        engines.cancel()
    assert refused
    assert sorted(answer.status for answer in answers) == [200] * (MAX_WAITING + 1) + [503]
    assert [answer.error["code"] for answer in answers if answer.status == 503] == ["overloaded"]


async def test_an_idle_helper_ends_and_another_one_starts_when_it_is_needed(lab_of: LabOf) -> None:
    lab = await lab_of()
    engine = await lab.engine()
    brief = BodyHelper(Setup("", 256), Metrics(), lab.gateway.degraded, idle_s=0.01)
    lab.gateway.large_bodies = brief
    loop = asyncio.create_task(brief.run())
    client = await lab.client()
    pids = set()
    async with asyncio.TaskGroup() as tasks:
        engines = tasks.create_task(serve(engine))
        for _ in range(2):
            client.post(LARGE)
            pids.add(pid := await eventually(lambda: brief.pid))
            assert (await client.response()).status == 200
            await eventually(lambda: brief.pid is None)
            # Killed is not gone: on a busy machine the kernel takes its time.
            await eventually(lambda: not running(pid))  # awaited in its round
        engines.cancel()
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    assert len(pids) == 2


async def test_a_helper_that_cannot_be_started_is_an_answer_too(lab: Lab, engine: Engine) -> None:
    absent = BodyHelper(Setup("", 256), Metrics(), lab.gateway.degraded, argv=("/nowhere/python",))
    lab.gateway.large_bodies = absent
    loop = asyncio.create_task(absent.run())
    answer = await (await lab.client()).ask(LARGE)
    assert (answer.status, answer.error["code"]) == (503, "overloaded")
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)


async def test_nothing_is_left_when_the_worker_stops(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.post(LARGE)
    pid = await helper_of(lab)
    (loop,) = [task for task in asyncio.all_tasks() if task.get_name() == "large-bodies"]
    loop.cancel()
    await asyncio.gather(loop, return_exceptions=True)
    assert not running(pid)
    client.close()
