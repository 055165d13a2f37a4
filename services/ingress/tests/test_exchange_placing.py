"""Requests are placed by a scheduler over the bus, and by the ingress itself while there is none."""

import asyncio
import struct
import tracemalloc
from typing import Any

import pytest
from integration.servers import eventually

from penstock.common.block_hash import root_seed
from penstock.common.messages import Placement, Reason, Rejection, ScheduleRequest
from penstock.common.model import Instance, InstanceState, Role
from penstock.ingress.block_hash import chain
from penstock.ingress.ports import UpstreamListener, Upstreams
from penstock.ingress.traced import Trace

from .conftest import LabOf
from .ingress_lab import BODY, CHAT, MODEL, Engine, Lab, Peer, Response

# Short enough for a test that waits for it, and the breaker's three failures.
SHORT = 0.05


async def served(client: Peer, engine_end: Peer) -> Response:
    """One more request of a client, answered on a connection that is there."""
    client.post()
    await engine_end.request()
    engine_end.answer()
    return await client.response()


async def first_served(lab: Lab, engine: Engine) -> tuple[Peer, Peer, Response]:
    client, peer = await lab.exchange(engine)
    peer.answer()
    return client, peer, await client.response()


# -- by a scheduler ------------------------------------------------------------------------------------


async def test_a_scheduler_is_told_what_placing_needs_and_no_text(lab_of: LabOf) -> None:
    lab = await lab_of(block_hash_secret="s")
    engine = await lab.engine(owner="team")
    prompt = b'["' + b"word " * 200 + b'"]'
    client = await lab.client()
    client.post(
        b'{"model":"m","max_tokens":7,"cache_salt":"t","messages":' + prompt + b"}",
        x_owned_by="team",
        routing_strategy="random",
        config_profile="fast",
        x_session_id="session",
        user="me",
        x_request_id="r1",
    )
    peer = await engine.accept()
    await peer.request()
    (batch,) = lab.scheduler.batches
    assert (batch.ingress, batch.incarnation, batch.budget_ms) == ("lab", "1", 5000.0)
    assert batch.requests == (
        ScheduleRequest(
            "1.1",
            "r1",
            MODEL,
            owner="team",
            strategy="random",
            profile="fast",
            prompt_tokens=len(prompt) // 4,
            max_tokens=7,
            block_hashes=chain(prompt, root_seed("s", MODEL, "t"), 256),
            session="session",
            user="me",
            run_blocks=64,
        ),
    )
    assert len(batch.requests[0].block_hashes) == len(prompt) // 256 * 8
    peer.answer()
    assert (await client.response()).status == 200


async def test_requests_of_one_turn_share_messages_of_at_most_32(lab: Lab, engine: Engine) -> None:
    lab.bus.open.clear()
    clients = [await lab.client() for _ in range(70)]
    await eventually(lambda: len(lab.server.connections) == 70)
    for connection in lab.server.connections:
        # In one turn of the loop, as sockets deliver them under load.
        head = f"POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: {len(BODY)}\r\n\r\n".encode()
        connection.data_received(head + BODY)
    await eventually(lambda: len(lab.scheduler.placed) == 70)
    assert [len(batch.requests) for batch in lab.scheduler.batches] == [32, 32, 6]
    for client in clients:
        client.reset()
    lab.bus.open.set()
    assert len(await lab.settled()) == 70


def together(lab: Lab, connections: int, first: int = 0) -> None:
    """One request each of so many clients, in one turn of the loop."""
    head = f"POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: {len(BODY)}\r\n\r\n".encode()
    for connection in list(lab.server.connections)[first : first + connections]:
        connection.data_received(head + BODY)


@pytest.mark.parametrize(
    ("first", "meanwhile", "messages"),
    [
        pytest.param(7, 1, [7, 1], id="few are asked for: at once"),
        pytest.param(8, 32, [8, 32], id="a whole message is there: at once"),
        pytest.param(8, 3, [8, 3], id="no answer: after a moment"),
    ],
)
async def test_requests_do_not_wait_for_an_answer_that_does_not_come(
    lab_of: LabOf, first: int, meanwhile: int, messages: list[int]
) -> None:
    lab = await lab_of()
    await lab.engine()
    lab.scheduler.silent = True
    for _ in range(first + meanwhile):
        await lab.client()
    await eventually(lambda: len(lab.server.connections) == first + meanwhile)
    together(lab, first)
    await eventually(lambda: len(lab.scheduler.batches) == 1)
    together(lab, meanwhile, first)
    await eventually(lambda: len(lab.scheduler.batches) == 2)
    assert [len(batch.requests) for batch in lab.scheduler.batches] == messages
    assert lab.metric("penstock_ingress_schedule_attempts_total", "timeout") == 0


async def test_while_enough_are_asked_for_the_next_share_a_message_that_follows_the_answer(
    lab: Lab, engine: Engine
) -> None:
    # Without an answer they would wait for a tenth of it.
    lab.placer._attempt_s = 60.0
    lab.bus.open.clear()
    for _ in range(20):
        await lab.client()
    await eventually(lambda: len(lab.server.connections) == 20)
    together(lab, 8)
    await eventually(lambda: len(lab.scheduler.batches) == 1)
    turn = asyncio.get_running_loop().call_soon
    for number in range(8, 20):
        together(lab, 1, number)
        turned = asyncio.Event()
        turn(turned.set)
        await turned.wait()
    lab.bus.open.set()
    await eventually(lambda: len(lab.scheduler.placed) == 20, timeout_s=5)
    assert [len(batch.requests) for batch in lab.scheduler.batches] == [8, 12]


async def test_long_headers_of_many_clients_do_not_make_a_message_too_large(
    lab_of: LabOf,
) -> None:
    lab = await lab_of()
    engine = await lab.engine(owner="\ufffd" * 512)
    names = ("x-owned-by", "routing-strategy", "config-profile", "x-session-id", "user")
    # A byte that is no UTF-8 has three in the message.
    fields = "".join(f"{name}: " + "\xff" * 512 + "\r\n" for name in names)
    body = b'{"model":"m","messages":["' + b"x" * 60_000 + b'"]}'
    head = f"POST {CHAT} HTTP/1.1\r\nhost: g\r\n{fields}content-length: {len(body)}\r\n\r\n"
    clients = [await lab.client() for _ in range(32)]
    await eventually(lambda: len(lab.server.connections) == 32)
    for connection in lab.server.connections:
        connection.data_received(head.encode("latin-1") + body)
    for _ in clients:
        peer = await engine.accept()
        await peer.request()
        peer.answer()
    for client in clients:
        assert (await client.response()).headers["routing-strategy"] == "first"
    assert sum(len(batch.requests) for batch in lab.scheduler.batches) == 32
    assert lab.metric("penstock_ingress_schedule_attempts_total", "unavailable") == 0


@pytest.mark.parametrize(
    ("reason", "status", "code", "param", "retry_after"),
    [
        (Reason.UNKNOWN_MODEL, 404, "model_not_found", "model", None),
        (Reason.NO_INSTANCE, 503, "no_available_instance", None, "3"),
        (Reason.BAD_STRATEGY, 400, "invalid_strategy", "routing-strategy", None),
        (Reason.BAD_REQUEST, 400, "invalid_request", None, None),
    ],
)
async def test_a_rejection_becomes_an_error_that_names_its_cause(
    lab: Lab, engine: Engine, reason: Reason, status: int, code: str, param: str, retry_after: str | None
) -> None:
    lab.scheduler.decide = lambda request: Rejection(
        request.decision_id, reason, 'no "luck"', 2.6 if retry_after else 0.0
    )
    client = await lab.client()
    response = await client.ask()
    assert response.status == status
    assert (response.error["code"], response.error["param"]) == (code, param)
    assert response.error["message"] == 'no "luck"'
    assert response.headers.get("retry-after") == retry_after
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["status"]) == ("rejected", status)
    assert engine.connections == 0
    # The connection goes on.
    assert (await client.ask()).status == status


async def test_an_unknown_model_is_refused_without_asking(lab: Lab, engine: Engine) -> None:
    response = await (await lab.client()).ask(BODY.replace(b'"m"', b'"gpt-\xc3\xa4"'))
    assert (response.status, response.error["code"], response.error["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert response.error["message"] == "The model 'gpt-ä' does not exist; models: m"
    assert (lab.scheduler.requests, await lab.settled()) == ([], [])


async def test_nothing_is_placed_before_the_instances_are_known(lab: Lab) -> None:
    lab.table.synced = False
    response = await (await lab.client()).ask()
    assert (response.status, response.error["code"]) == (503, "no_available_instance")
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("name", ["x-session-id", "user", "x-owned-by", "routing-strategy", "config-profile"])
async def test_a_header_too_long_for_the_bus_is_an_error_that_names_it(
    lab: Lab, engine: Engine, name: str
) -> None:
    header: dict[str, Any] = {name: "x" * 513}
    response = await (await lab.client()).ask(**header)
    assert (response.status, response.error["param"]) == (400, name)


async def test_salts_of_clients_are_not_kept(lab: Lab, engine: Engine) -> None:
    client, peer, _ = await first_served(lab, engine)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(20):
            salt = b'"cache_salt":"%d' % number + b"s" * 500_000 + b'",'
            client.post(b'{"model":"m",' + salt + b'"messages":[1]}')
            await peer.request()
            peer.answer()
            assert (await client.response()).status == 200
        assert tracemalloc.get_traced_memory()[0] - before < 4_000_000
    finally:
        tracemalloc.stop()


# -- answers that are of no use ------------------------------------------------------------------------


async def test_a_placement_on_an_unknown_instance_is_replaced_by_one_of_our_own(
    lab: Lab, engine: Engine
) -> None:
    lab.scheduler.decide = lambda request: Placement(request.decision_id, "never heard of")
    _, _, response = await first_served(lab, engine)
    assert (response.headers["target-pod"], response.headers["routing-strategy"]) == ("e1", "local")
    assert lab.metric("penstock_ingress_placing_locally") == 0


async def test_a_request_without_an_outcome_in_the_reply_is_placed_here(lab: Lab, engine: Engine) -> None:
    lab.scheduler.decide = lambda request: None
    _, _, response = await first_served(lab, engine)
    assert response.headers["routing-strategy"] == "local"


async def test_a_placement_that_cannot_be_used_is_released(lab: Lab) -> None:
    lab.instance("draining", 1, state=InstanceState.DRAINING)
    lab.scheduler.decide = lambda request: Placement(request.decision_id, "never heard of")
    response = await (await lab.client()).ask()
    assert (response.status, response.error["code"]) == (503, "no_available_instance")
    await lab.settled()
    assert lab.released == lab.scheduler.placed != set()


# -- by the ingress itself -----------------------------------------------------------------------------


async def test_without_a_scheduler_requests_are_placed_here_until_one_is_back(lab: Lab) -> None:
    engine = await lab.engine()
    await lab.stop_scheduler()
    client, peer, response = await first_served(lab, engine)
    assert response.headers["routing-strategy"] == "local"
    assert lab.metric("penstock_ingress_placing_locally") == 1
    await lab.start_scheduler()

    async def placed_by_scheduler() -> bool:
        return (await served(client, peer)).headers["routing-strategy"] == "first"

    await eventually(placed_by_scheduler)
    assert (await served(client, peer)).headers["routing-strategy"] == "first"
    assert lab.metric("penstock_ingress_placing_locally") == 0
    degraded = await lab.events("degraded")
    assert [(e["what"], e["active"]) for e in degraded] == [
        ("placing locally", True),
        ("placing locally", False),
    ]
    local = [e for e in await lab.events("placement") if e["policy"] == "local"]
    assert {(e["replica"], e["ingress"], e["instance"]) for e in local} == {("lab", "lab", "e1")}


async def test_without_a_bus_requests_are_placed_here_until_it_is_back(lab: Lab, engine: Engine) -> None:
    lab.broker.set_up(False)
    client, peer, response = await first_served(lab, engine)
    assert response.headers["routing-strategy"] == "local"
    assert lab.scheduler.requests == []
    lab.broker.set_up(True)
    assert (await served(client, peer)).headers["routing-strategy"] == "first"


async def test_a_scheduler_that_does_not_answer_is_asked_twice_with_the_same_ids(lab_of: LabOf) -> None:
    lab = await lab_of(schedule_timeout=SHORT)
    lab.scheduler.silent = True
    engine = await lab.engine()
    _, _, response = await first_served(lab, engine)
    assert response.headers["routing-strategy"] == "local"
    first, second = lab.scheduler.batches
    assert first.requests == second.requests
    outcome = await lab.outcome()
    assert outcome["decisions"] == [first.requests[0].decision_id]
    assert lab.released == {first.requests[0].decision_id}


async def test_after_three_silences_the_scheduler_is_used_again_once_a_probe_is_answered(
    lab_of: LabOf,
) -> None:
    lab = await lab_of(schedule_timeout=SHORT)
    lab.scheduler.silent = True
    engine = await lab.engine()
    client, peer, _ = await first_served(lab, engine)
    await served(client, peer)
    # Two attempts for the first request, one for the second, which opened the breaker.
    assert len(lab.scheduler.batches) == 3
    lab.scheduler.silent = False

    async def asked_again() -> bool:
        return (await served(client, peer)).headers["routing-strategy"] == "first"

    await eventually(asked_again)
    for _ in range(3):
        assert (await served(client, peer)).headers["routing-strategy"] == "first"


@pytest.mark.parametrize(
    "fields",
    [
        {"state": InstanceState.DRAINING},
        {"state": InstanceState.UNHEALTHY},
        {"role": Role.PREFILL},
    ],
    ids=str,
)
async def test_only_instances_that_can_serve_alone_are_chosen_here(lab: Lab, fields: dict[str, Any]) -> None:
    lab.instance("a", 1, owner="us", **fields)
    lab.instance("b", 1, owner="others")
    lab.broker.set_up(False)
    client = await lab.client()
    response = await client.ask(x_owned_by="us")
    assert (response.status, response.error["code"]) == (503, "no_available_instance")
    lab.broker.set_up(True)
    assert (await lab.events("rejection"))[0]["reason"] == "no_instance"


async def test_where_no_instance_is_neutral_those_that_decode_do_all_of_it_here(lab: Lab) -> None:
    lab.instance("a", 1, role=Role.PREFILL)
    engine = await lab.engine("b", role=Role.DECODE)
    await lab.stop_scheduler()
    client = await lab.client()
    client.post()
    peer = await engine.accept()
    await peer.request()
    peer.answer()
    response = await client.response()
    assert (response.status, response.headers["target-pod"]) == (200, "b")


async def test_a_session_stays_on_its_instance_and_others_spread_when_placed_here(lab: Lab) -> None:
    for number in range(4):
        await lab.engine(f"e{number}")
    await lab.stop_scheduler()
    clients = []
    for number in range(12):
        clients.append(client := await lab.client())
        client.post(x_session_id="s" if number < 4 else "")
        await eventually(lambda: len(lab.account) == len(clients))
        if number == 3:
            assert [requests for _, requests in lab.account.by_instance()] == [4]
    assert sorted(requests for _, requests in lab.account.by_instance()) == [2, 3, 3, 4]


async def test_equal_prompts_have_equal_hashes_and_another_secret_none_of_them(lab_of: LabOf) -> None:
    body = b'{"model":"m","messages":["' + b"x" * 2000 + b'"]}'
    hashes = []
    for secret in ("a", "a", "b"):
        lab = await lab_of(block_hash_secret=secret)
        lab.scheduler.decide = lambda request: Rejection(request.decision_id, Reason.NO_INSTANCE)
        assert (await (await lab.client()).ask(body)).status == 404
        await lab.engine()
        assert (await (await lab.client()).ask(body)).status == 503
        packed = lab.scheduler.requests[0].block_hashes
        hashes.append(set(struct.unpack(f"<{len(packed) // 8}Q", packed)))
    assert hashes[0] == hashes[1]
    assert not hashes[0] & hashes[2]


# -- faults of our own ---------------------------------------------------------------------------------


class Broken(Exception):
    """What a fault of this program would raise."""


class FaultyUpstreams:
    """Connections of which every second one meets a fault of ours."""

    def __init__(self, sound: Upstreams) -> None:
        self._sound, self._asked = sound, 0

    def acquire(self, instance: Instance, listener: UpstreamListener) -> None:
        self._asked += 1
        if self._asked % 2:
            raise Broken
        self._sound.acquire(instance, listener)


@pytest.mark.parametrize("local", [False, True], ids=["by a scheduler", "locally"])
async def test_a_fault_with_one_request_does_not_cost_those_placed_with_it(
    lab: Lab, engine: Engine, local: bool
) -> None:
    if local:
        await lab.stop_scheduler()
    lab.gateway.upstreams = FaultyUpstreams(lab.upstreams)
    clients = [await lab.client() for _ in range(4)]
    for client in clients:
        client.post()
    for _ in range(2):
        peer = await engine.accept()
        await peer.request()
        peer.answer()
    responses = [await client.response() for client in clients]
    assert sorted(response.status for response in responses) == [200, 200, 503, 503]
    codes = [response.error["code"] for response in responses if response.status == 503]
    assert codes == ["internal_error"] * 2
    outcomes = [outcome["outcome"] for outcome in await lab.settled()]
    assert sorted(outcomes) == ["completed", "completed", "failed", "failed"]


class HopelessAsker:
    """An asker of whom everything fails."""

    trace: Trace | None = None
    waiting = True

    def __init__(self, request: ScheduleRequest) -> None:
        self.request, self.decisions = request, [request.decision_id]
        self.ended = asyncio.Event()

    def placed(self, placement: Placement, instance: Instance) -> None:
        raise Broken

    def rejected(self, rejection: Rejection) -> None:
        raise Broken

    def broken(self) -> None:
        self.ended.set()
        raise Broken


async def test_a_request_that_cannot_even_be_ended_costs_only_itself(lab: Lab, engine: Engine) -> None:
    asker = HopelessAsker(ScheduleRequest("d", "r", MODEL))
    lab.placer.submit(asker)
    client, peer, response = await first_served(lab, engine)
    await asker.ended.wait()
    assert response.status == 200
    # The account of a request that nobody holds any more.
    lab.account.finish("d")
    assert (await served(client, peer)).status == 200


async def test_requests_that_cannot_be_asked_for_are_ended_and_not_left_waiting(lab: Lab) -> None:
    lab.bus.fault = Broken()
    lab.instance("e1", 1)
    client = await lab.client()
    client.post()
    response = await client.response()
    assert (response.status, response.error["code"]) == (503, "internal_error")


async def test_tenants_share_no_hashes_when_asked_for_and_each_agrees_with_itself(lab_of: LabOf) -> None:
    body = b'{"model":"m","messages":["' + b"x" * 2000 + b'"]}'
    lab = await lab_of(block_hash_tenant="user")
    lab.scheduler.decide = lambda request: Rejection(request.decision_id, Reason.NO_INSTANCE)
    await lab.engine()
    for user in ("a", "b", "a"):
        assert (await (await lab.client()).ask(body, user=user)).status == 503
    first, other, again = (request.block_hashes for request in lab.scheduler.requests)
    assert first == again
    assert not set(struct.unpack(f"<{len(first) // 8}Q", first)) & set(
        struct.unpack(f"<{len(other) // 8}Q", other)
    )
