"""A request that finds every instance at its limit waits in its ingress, is woken, or sent away in time."""

import asyncio
from typing import Any

import pytest
from integration.servers import eventually

from penstock.common.messages import Placement, Reason, Rejection, ScheduleRequest

from .conftest import LabOf
from .ingress_lab import BODY, CHAT, Engine, Lab, Peer

LIMIT = 1


class Limited:
    """A scheduler that lets `limit` requests run on each instance, as its ledger would."""

    def __init__(self, lab: Lab, limit: int = LIMIT) -> None:
        self.lab, self.limit = lab, limit
        self.rejected = 0
        lab.scheduler.decide = self

    def __call__(self, request: ScheduleRequest) -> Placement | Rejection:
        outcome = self.lab.scheduler.first(request)
        if isinstance(outcome, Placement) and self.lab.account.on(outcome.instance) >= self.limit:
            self.rejected += 1
            return Rejection(request.decision_id, Reason.SATURATED, "all at their limit", 1.0)
        return outcome


def waiting(lab: Lab) -> int:
    return lab.gateway.waiting._lines.count


async def one_waits(lab: Lab, count: int = 1, **headers: Any) -> Peer:
    """A client whose request waits, as one of `count`."""
    client = await lab.client()
    client.post(BODY, CHAT, **headers)
    await eventually(lambda: waiting(lab) == count)
    return client


async def test_a_freed_slot_wakes_by_priority_then_by_turns_then_by_arrival(lab: Lab, engine: Engine) -> None:
    limited = Limited(lab)
    client, peer = await lab.exchange(engine)
    waiters = {}
    asked = (("a1", "a", "0"), ("a2", "a", "0"), ("b1", "b", "0"), ("low", "c", "-3"), ("high", "a", "+9"))
    for count, (name, user, priority) in enumerate(asked, 1):
        waiters[name] = await one_waits(lab, count, user=user, x_priority=priority, x_request_id=name)
    assert lab.metric("penstock_ingress_waiting", "m") == 5
    served = []
    for _ in waiters:
        peer.answer()
        await client.response()
        _, headers, _ = await peer.request()
        served.append(headers["x-request-id"])
        client = waiters[served[-1]]
    peer.answer()
    assert (await client.response()).status == 200
    assert served == ["high", "a1", "b1", "a2", "low"]
    assert max(request.priority for request in lab.scheduler.requests) == 9
    outcomes = await lab.settled()
    assert [outcome["outcome"] for outcome in outcomes] == ["completed"] * 6
    assert [outcome.get("waited_ms", 0) > 0 for outcome in outcomes] == [False, *[True] * 5]
    assert lab.metric("penstock_ingress_waiting_total", "placed") == 5
    assert limited.rejected


async def test_a_slot_that_gets_free_while_the_first_asks_is_not_given_to_the_second(
    lab: Lab, engine: Engine
) -> None:
    limited = Limited(lab)
    client, peer = await lab.exchange(engine)
    waiters = [await one_waits(lab, count, x_request_id=str(count)) for count in (1, 2)]
    lab.bus.open.clear()
    rejected = limited.rejected
    lab.gateway.waiting.fleet_changed()
    # It asked, too early, and does not know it yet.
    await eventually(lambda: limited.rejected > rejected)
    peer.answer()
    await client.response()
    lab.bus.open.set()
    for number, waiter in enumerate(waiters, 1):
        _, headers, _ = await peer.request()
        assert headers["x-request-id"] == str(number)
        peer.answer()
        assert (await waiter.response()).status == 200


@pytest.mark.parametrize("value", ["", "x", "1.5", "101", "-101", "1e1", "9" * 50])
async def test_a_priority_that_is_none_is_refused(lab: Lab, engine: Engine, value: str) -> None:
    response = await (await lab.client()).ask(x_priority=value)
    assert (response.status, response.error["code"]) == (400, "invalid_request")
    assert response.error["param"] == "x-priority"


async def test_who_comes_while_the_room_is_full_gets_a_429(lab_of: LabOf) -> None:
    lab = await lab_of(waiting_limit=1)
    engine = await lab.engine()
    Limited(lab)
    client, peer = await lab.exchange(engine)
    waiter = await one_waits(lab)
    response = await (await lab.client()).ask()
    assert (response.status, response.error["code"]) == (429, "overloaded")
    assert int(response.headers["retry-after"]) >= 1
    # One of a higher priority takes the place of the one that waits.
    urgent = await lab.client()
    urgent.post(x_priority="5", x_request_id="urgent")
    assert (await waiter.response()).status == 429
    peer.answer()
    assert (await client.response()).status == 200
    assert (await peer.request())[1]["x-request-id"] == "urgent"
    peer.answer()
    assert (await urgent.response()).status == 200
    assert lab.metric("penstock_ingress_waiting_total", "full") == 1
    assert lab.metric("penstock_ingress_waiting_total", "displaced") == 1


async def test_nobody_waits_with_a_limit_of_zero(lab_of: LabOf) -> None:
    lab = await lab_of(waiting_limit=0)
    engine = await lab.engine()
    Limited(lab)
    await lab.exchange(engine)
    assert (await (await lab.client()).ask()).status == 429


@pytest.mark.parametrize("bound", ["waiting_timeout", "request_timeout"])
async def test_who_waited_too_long_gets_a_503(lab_of: LabOf, bound: str) -> None:
    lab = await lab_of(**{bound: 0.2})
    await lab.engine()
    Limited(lab, 0)
    response = await (await lab.client()).ask()
    assert (response.status, response.error["code"]) == (503, "overloaded")
    assert int(response.headers["retry-after"]) >= 1
    outcome = await lab.outcome()
    assert (outcome["outcome"], len(outcome["decisions"])) == ("rejected", 1)
    assert outcome["waited_ms"] > 100
    assert lab.metric("penstock_ingress_waiting_total", "timeout") == 1


async def test_a_client_that_leaves_gives_up_its_place_at_once(lab: Lab, engine: Engine) -> None:
    Limited(lab)
    client, peer = await lab.exchange(engine)
    gone = await one_waits(lab)
    stays = await one_waits(lab, 2)
    gone.reset()
    await eventually(lambda: waiting(lab) == 1)
    peer.answer()
    await client.response()
    await peer.request()
    peer.answer()
    assert (await stays.response()).status == 200
    assert sorted(o["outcome"] for o in await lab.settled()) == ["client_gone", "completed", "completed"]


async def test_capacity_that_became_free_elsewhere_is_found_and_used_up(lab: Lab, engine: Engine) -> None:
    limited = Limited(lab, 0)
    clients = [await one_waits(lab, count) for count in range(1, 6)]
    limited.limit = 5
    peers = [await engine.accept() for _ in clients]
    for peer in peers:
        await peer.request()
        peer.answer()
    assert [(await client.response()).status for client in clients] == [200] * 5


async def test_an_instance_that_comes_takes_one_that_waits(lab: Lab) -> None:
    busy = await lab.engine()
    Limited(lab)
    await lab.exchange(busy)
    client = await one_waits(lab)
    fresh = await lab.engine("e2")
    lab.scheduler.decide = lambda request: Placement(request.decision_id, "e2", policy="p")
    peer = await fresh.accept()
    await peer.request()
    peer.answer()
    assert (await client.response()).status == 200


async def test_who_waits_for_instances_that_are_gone_is_told_so(lab: Lab, engine: Engine) -> None:
    Limited(lab, 0)
    clients = [await one_waits(lab, count) for count in range(1, 4)]
    lab.scheduler.decide = lambda request: Rejection(request.decision_id, Reason.NO_INSTANCE, "gone", 1.0)
    answers = [await client.response() for client in clients]
    assert {answer.error["code"] for answer in answers} == {"no_available_instance"}


async def test_a_drain_serves_who_waits_and_its_end_sends_the_rest_away(lab: Lab, engine: Engine) -> None:
    Limited(lab)
    client, peer = await lab.exchange(engine)
    served, left = await one_waits(lab), await one_waits(lab, 2)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(lab.drain(1.0), name="drain")
        await eventually(lambda: lab.gateway.draining)
        peer.answer()
        assert (await client.response()).status == 200
        again = await engine.accept() if peer.reader.at_eof() else peer
        await again.request()
        assert (await left.response()).error["code"] == "shutting_down"
    await served.gone()
    assert not lab.gateway.waiting.busy


async def test_placed_here_requests_wait_for_the_same_limits(lab_of: LabOf) -> None:
    lab = await lab_of(max_requests_per_instance=5)
    engine = await lab.engine(labels={"penstock/max-requests": "1"})
    await lab.stop_scheduler()
    client, peer = await lab.exchange(engine)
    waiter = await one_waits(lab)
    peer.answer()
    assert (await client.response()).headers["routing-strategy"] == "local"
    assert (await peer.request())[0] == f"POST {CHAT} HTTP/1.1"
    peer.answer()
    assert (await waiter.response()).status == 200
    assert len(lab.account) == 0
