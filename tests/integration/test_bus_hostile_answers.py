"""Hostile answers of a scheduler: each request is served or refused, in the gateway's own form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import aiohttp
import msgspec
import pytest
from nats.aio.msg import Msg

from integration.bus_users import StackOfUsers, stack_of_users
from integration.hostile import EVIL_TEXT, attacker
from integration.servers import eventually
from integration.stack import metric
from integration.under_attack import nothing_in_flight, response_head
from penstock.common.codec import decode, encode
from penstock.common.messages import Heartbeat, Placement, Reason, Rejection, ScheduleBatch, ScheduleReply
from penstock.common.permissions import JOIN
from penstock.common.subjects import HEARTBEAT, SCHEDULE

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def unscheduled() -> Iterator[StackOfUsers]:
    """No scheduler but the fake one; nothing may make it wait long for one that is not there."""
    with stack_of_users() as stack:
        stack.start_sims(1)
        stack.start_discovery()
        stack.start_ingress("--schedule-timeout", "0.5", "--waiting-timeout", "1")
        yield stack


def answers(decision: str, engine: str) -> dict[str, tuple[bytes, set[int]]]:
    """What a scheduler may say of a request, and the statuses that may come of it."""
    good = Placement(decision, engine, policy=EVIL_TEXT)
    no = Rejection(decision, Reason.SATURATED, EVIL_TEXT * 10, 3600.0)

    def reply(*outcomes: Placement | Rejection) -> bytes:
        return encode(ScheduleReply(EVIL_TEXT, outcomes))

    nan: list[Any] = ["r", [["rejection", decision, "saturated", "", float("nan")]]]
    return {
        "a policy of control characters": (reply(good), {200}),
        "a refusal of control characters": (reply(no), {429, 503}),
        "no outcome": (reply(), {200}),
        "an instance that nobody knows": (reply(Placement(decision, EVIL_TEXT)), {200}),
        "somebody else's decision": (reply(Placement("other", engine)), {200}),
        "the same decision often": (reply(*[good] * 31, no), {429, 503}),
        "more outcomes than a batch": (reply(*[good] * 33), {200}),
        "NaN seconds": (msgspec.msgpack.encode(nan), {200, 429}),
        "no message": (b"\xff" * 100, {200}),
        "nothing": (b"", {200}),
        "a megabyte": (b"\x91\xda" + bytes(1_000_000), {200}),
    }


@pytest.mark.parametrize("case", answers("d", "e"))
async def test_whatever_a_scheduler_answers_a_request_is_served_or_refused_in_form(
    unscheduled: StackOfUsers, case: str
) -> None:
    stack = unscheduled
    await stack.ready()
    async with aiohttp.ClientSession() as session, stack.users.client("scheduler") as guest:
        asked: list[str] = []

        async def take(message: Msg) -> None:
            decision = decode(ScheduleBatch, message.data).requests[0].decision_id
            asked.append(decision)
            await message.respond(answers(decision, stack.engines[0])[case][0])

        await guest.client.subscribe(SCHEDULE.request.pattern, queue="scheduler", cb=take)
        await guest.client.flush()

        async def head() -> bytes:
            # An open breaker, left by the case before, asks now and then only.
            asked.clear()
            head = await response_head(stack.url)
            return head if asked else b""

        wire = await eventually(head)
        assert int(wire.split(b" ")[1]) in answers("d", "e")[case][1]
        assert b"\nx-evil" not in wire.lower()
        assert b"\nx-request-id: " in wire
        await nothing_in_flight(session, stack)
        assert not [line for line in stack.ingresses[0].process.lines if "Traceback" in line]


async def test_a_forged_heartbeat_does_not_make_anybody_wait_for_a_scheduler_that_is_not_there(
    unscheduled: StackOfUsers,
) -> None:
    await unscheduled.ready()
    (ingress,) = unscheduled.ingresses
    asked = "penstock_ingress_schedule_attempts_total"
    async with attacker(unscheduled.users, JOIN) as hostile, aiohttp.ClientSession() as session:
        for number in range(1000):
            beat = Heartbeat("scheduler", f"forged-{number}", "run", True)
            hostile.publish(HEARTBEAT.name("scheduler"), encode(beat))
        await hostile.settle()
        await eventually(lambda: metric(session, ingress.admin_port, "penstock_ingress_schedulers"))
        before = await metric(session, ingress.admin_port, asked)
        head = await response_head(unscheduled.url)
        assert await metric(session, ingress.admin_port, asked) <= before + 2
        assert head.startswith(b"HTTP/1.1 200 ")
        assert b"routing-strategy: local" in head
