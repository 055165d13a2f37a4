"""What the bus port promises about messages and requests, asked of both adapters.

Buckets and watches are in test_bus_contract_state.py, streams and the routing log in
test_bus_contract_streams.py.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import msgspec
import pytest

from integration.bus_labs import Lab, Member
from integration.servers import eventually
from penstock.common.codec import encode
from penstock.common.errors import BusTimeout, BusUnavailable, MessageTooLarge
from penstock.common.messages import (
    EngineStatus,
    Heartbeat,
    InFlight,
    LoadReport,
    Placement,
    ScheduleBatch,
    ScheduleReply,
    ScheduleRequest,
)
from penstock.common.model import EngineLoad
from penstock.common.subjects import HEARTBEAT, LOAD, SCHEDULE, STATUS, Service, Subject

pytestmark = pytest.mark.integration


def beat(name: str) -> Heartbeat:
    return Heartbeat("ingress", name, "run1", True)


def batch(name: str) -> ScheduleBatch:
    return ScheduleBatch("ingress1", "run1", 50.0, (ScheduleRequest(name, name, "model-a"),))


def placing(replica: str, seen: list[str] | None = None) -> Callable[[ScheduleBatch], ScheduleReply]:
    """A handler that places every request on instance `x`."""

    def place(asked: ScheduleBatch) -> ScheduleReply:
        if seen is not None:
            seen.extend(request.decision_id for request in asked.requests)
        return ScheduleReply(replica, tuple(Placement(r.decision_id, "x") for r in asked.requests))

    return place


async def ask(member: Member, name: str, deadline_s: float = 5.0) -> ScheduleReply:
    return await member.bus.request(SCHEDULE, batch(name), "0", deadline_s=deadline_s)


async def test_a_message_reaches_those_who_asked_for_its_name_or_for_all_names(lab: Lab) -> None:
    sender, receiver = await lab.member("sender"), await lab.member("receiver")
    of_a: list[str] = []
    of_all: list[str] = []
    await receiver.bus.subscribe(HEARTBEAT, lambda m: of_a.append(m.id), "a")
    await receiver.bus.subscribe(HEARTBEAT, lambda m: of_all.append(m.id))
    for token, name in (("b", "1"), ("a", "2"), ("model/with.every *thing>", "3"), ("a", "4")):
        assert sender.bus.publish(HEARTBEAT, beat(name), token)
    await eventually(lambda: len(of_all) == 4 and len(of_a) == 2)
    assert (of_a, of_all) == (["2", "4"], ["1", "2", "3", "4"])


async def test_messages_arrive_in_the_order_they_were_sent(lab: Lab) -> None:
    sender, receiver = await lab.member("sender"), await lab.member("receiver")
    seen: list[str] = []
    await receiver.bus.subscribe(HEARTBEAT, lambda m: seen.append(m.id))
    sent = [str(number) for number in range(2000)]
    for name in sent:
        sender.bus.publish(HEARTBEAT, beat(name), "a")
    await eventually(lambda: len(seen) == len(sent))
    assert seen == sent


async def test_a_handler_runs_on_a_later_turn_than_the_publish(lab: Lab) -> None:
    member = await lab.member()
    seen: list[str] = []
    await member.bus.subscribe(HEARTBEAT, lambda m: seen.append(m.id))
    member.bus.publish(HEARTBEAT, beat("1"), "a")
    assert not seen
    await eventually(lambda: seen)


async def test_nothing_arrives_once_a_subscription_is_closed(lab: Lab) -> None:
    member = await lab.member()
    closed: list[str] = []
    alive: list[str] = []
    subscription = await member.bus.subscribe(HEARTBEAT, lambda m: closed.append(m.id))
    await member.bus.subscribe(HEARTBEAT, lambda m: alive.append(m.id))
    member.bus.publish(HEARTBEAT, beat("before"), "a")
    await eventually(lambda: closed and alive)
    await subscription.close()
    member.bus.publish(HEARTBEAT, beat("after"), "a")
    await eventually(lambda: alive[-1] == "after")
    assert closed == ["before"]


async def test_what_was_delivered_before_a_subscription_is_closed_is_handled(lab: Lab) -> None:
    member = await lab.member()
    seen: list[str] = []
    first: list[str] = []
    subscription = await member.bus.subscribe(HEARTBEAT, lambda m: seen.append(m.id))
    await member.bus.subscribe(HEARTBEAT, lambda m: first.append(m.id))
    for number in range(500):
        member.bus.publish(HEARTBEAT, beat(str(number)), "a")
    await eventually(lambda: first)
    await subscription.close()
    await eventually(lambda: len(first) == 500)
    assert len(seen) == 500


async def test_each_request_is_answered_by_one_member_and_all_members_get_some(lab: Lab) -> None:
    seen: list[list[str]] = [[], []]
    for number in range(2):
        await (await lab.member(f"s{number}")).bus.serve(SCHEDULE, placing(str(number), seen[number]))
    asking = await lab.member("asking")
    names = [str(number) for number in range(60)]
    replies = await asyncio.gather(*(ask(asking, name) for name in names))
    assert [r.outcomes[0].decision_id for r in replies] == names
    assert sorted(itertools.chain(*seen)) == sorted(names)
    assert all(seen)


async def test_a_request_nobody_answers_in_time_is_a_timeout_that_names_its_subject(lab: Lab) -> None:
    member = await lab.member()
    await member.bus.serve(SCHEDULE, lambda _: None)
    with pytest.raises(BusTimeout) as caught:
        await ask(member, "1", deadline_s=0.05)
    assert (caught.value.subject, caught.value.deadline_s) == (SCHEDULE.request.name("0"), 0.05)


async def test_messages_to_skip_are_not_decoded(lab: Lab) -> None:
    sender, receiver = await lab.member("sender"), await lab.member("receiver")
    heard: list[str] = []
    skipped: list[bytes] = []

    def skip(data: bytes) -> bool:
        if b"own" in data:
            skipped.append(data)
        return b"own" in data

    await receiver.bus.subscribe(HEARTBEAT, lambda message: heard.append(message.id), skip=skip)
    for name in ("a", "own", "b"):
        sender.bus.publish(HEARTBEAT, beat(name), "ingress")
    await eventually(lambda: heard == ["a", "b"])
    assert skipped == [encode(beat("own"))]


async def test_what_follows_an_answer_comes_after_it_and_its_fault_costs_nothing(lab: Lab) -> None:
    server, asker = await lab.member("server"), await lab.member("asker")
    seen: list[str] = []

    def follow() -> None:
        seen.append("then")
        raise ValueError("what follows")

    await server.bus.serve(SCHEDULE, placing("r", seen), then=follow)
    for name in ("a", "b"):
        assert (await ask(asker, name)).outcomes == (Placement(name, "x"),)
    await eventually(lambda: seen == ["a", "then", "b", "then"])
    answers = await asyncio.gather(*(ask(asker, f"together-{number}") for number in range(4)))
    assert len(answers) == 4
    # Once for messages that came together, at least.
    await eventually(lambda: seen[-1] == "then")
    assert 3 <= seen.count("then") <= 6


async def test_a_request_that_nobody_serves_fails_at_once_and_names_its_subject(lab: Lab) -> None:
    member = await lab.member()
    with pytest.raises(BusUnavailable) as caught:
        await ask(member, "1", deadline_s=60)
    assert caught.value.subject == SCHEDULE.request.name("0")
    served = await member.bus.serve(SCHEDULE, placing("r"))
    assert (await ask(member, "2")).replica == "r"
    await served.close()
    with pytest.raises(BusUnavailable):
        await ask(member, "3", deadline_s=60)


HOSTILE = {
    "empty": b"",
    "reserved byte": b"\xc1",
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "another message": encode(beat("1")),
    "deep nesting": b"\x91" * 100_000,
    "array of four billion": b"\xdd\xff\xff\xff\xff",
    "blob of four billion": b"\xc6\xff\xff\xff\xff",
    "text that is no UTF-8": b"\x93\xa2\xff\xff\xa1b\x01",
    "number out of range": b"\x93\xa1a\xa1b\xff",
    "name over its bound": encode(LoadReport("a" * 1000, "b", 1)),
    "not a number": msgspec.msgpack.encode(["a", "b", float("nan")]),
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
async def test_bytes_that_are_no_message_are_counted_and_the_subscription_lives(
    lab: Lab, payload: bytes
) -> None:
    member = await lab.member()
    seen: list[int] = []
    await member.bus.subscribe(LOAD, lambda m: seen.append(m.sequence))
    await lab.deliver(LOAD.name("x"), payload, encode(LoadReport("a", "b", 7)))
    await eventually(lambda: seen == [7])
    assert member.dropped(LOAD.pattern, "undecodable") == 1


async def test_a_message_over_the_bound_of_its_subject_is_not_decoded(lab: Lab) -> None:
    member = await lab.member()
    seen: list[str] = []
    await member.bus.subscribe(HEARTBEAT, lambda m: seen.append(m.id))
    big = msgspec.msgpack.encode({**msgspec.to_builtins(beat("big")), "more": "x" * HEARTBEAT.max_bytes})
    await lab.deliver(HEARTBEAT.name("x"), big, encode(beat("small")))
    await eventually(lambda: seen == ["small"])
    assert member.dropped(HEARTBEAT.pattern, "over the bound") == 1


async def test_an_undecodable_request_costs_only_itself(lab: Lab) -> None:
    member = await lab.member()
    await member.bus.serve(SCHEDULE, placing("r"))
    await lab.deliver(SCHEDULE.request.name("0"), b"\xc1", b"")
    await eventually(lambda: member.dropped(SCHEDULE.request.pattern, "undecodable") == 2)
    assert (await ask(member, "1")).replica == "r"


async def test_an_undecodable_answer_is_no_answer(lab: Lab) -> None:
    member = await lab.member()
    impostor = Service(SCHEDULE.request, Heartbeat)
    await member.bus.serve(impostor, lambda _: beat("1"))
    with pytest.raises(BusTimeout):
        await ask(member, "1", deadline_s=60)
    assert member.dropped(SCHEDULE.request.pattern, "undecodable reply") == 1


async def test_a_handler_that_raises_costs_its_message_and_not_the_subscription(lab: Lab) -> None:
    member = await lab.member()
    seen: list[str] = []

    def handle(message: Heartbeat) -> None:
        if message.id == "bad":
            raise KeyError(message.id)
        seen.append(message.id)

    await member.bus.subscribe(HEARTBEAT, handle)
    for name in ("1", "bad", "2"):
        member.bus.publish(HEARTBEAT, beat(name), "a")
    await eventually(lambda: seen == ["1", "2"])
    assert member.dropped(HEARTBEAT.pattern, "handler failed") == 1


async def test_a_server_that_raises_leaves_one_request_without_answer(lab: Lab) -> None:
    member = await lab.member()

    def serve(asked: ScheduleBatch) -> ScheduleReply:
        if asked.requests[0].decision_id == "bad":
            raise ZeroDivisionError
        return placing("r")(asked)

    await member.bus.serve(SCHEDULE, serve)
    with pytest.raises(BusTimeout):
        await ask(member, "bad", deadline_s=0.05)
    assert (await ask(member, "good")).replica == "r"
    assert member.dropped(SCHEDULE.request.pattern, "handler failed") == 1


async def test_a_message_over_its_bound_is_refused_with_the_bound(lab: Lab) -> None:
    member = await lab.member()
    small = Subject(HEARTBEAT.pattern, Heartbeat, max_bytes=64)
    with pytest.raises(MessageTooLarge, match="over the limit of 64") as caught:
        member.bus.publish(small, beat("x" * 100), "a")
    assert (caught.value.subject, caught.value.limit_bytes) == (small.pattern, 64)
    assert caught.value.size_bytes > 100
    service = Service(Subject(SCHEDULE.request.pattern, ScheduleBatch, max_bytes=8), ScheduleReply)
    with pytest.raises(MessageTooLarge, match="over the limit of 8"):
        await member.bus.request(service, batch("1"), "0", deadline_s=5)


class LaterReport(LoadReport, frozen=True, array_like=True):
    """A load report of a later release."""

    added: str = "?"
    also_added: tuple[int, ...] = (1, 2)


class LaterStatus(EngineStatus, frozen=True):
    """An engine status of a later release."""

    added: tuple[int, ...] = (1,)


class EarlierReport(msgspec.Struct, frozen=True, array_like=True):
    """A load report of a release that knew three fields only."""

    ingress: str
    incarnation: str
    sequence: int


async def test_fields_of_a_later_release_are_ignored_and_those_an_earlier_one_lacks_have_defaults(
    lab: Lab,
) -> None:
    member = await lab.member()
    reports: list[LoadReport] = []
    statuses: list[EngineStatus] = []
    await member.bus.subscribe(LOAD, reports.append)
    await member.bus.subscribe(STATUS, statuses.append)
    report = LoadReport("i", "run1", 3, (InFlight("d", "x"),), leaving=True)
    later = LaterReport(*(getattr(report, name) for name in LoadReport.__struct_fields__))
    member.bus.publish(Subject(LOAD.pattern, LaterReport), later, "i")
    member.bus.publish(Subject(LOAD.pattern, EarlierReport), EarlierReport("i", "run1", 4), "i")
    status = EngineStatus("x", EngineLoad(running=1))
    member.bus.publish(
        Subject(STATUS.pattern, LaterStatus), LaterStatus("x", EngineLoad(running=1), added=(1, 2)), "x"
    )
    await eventually(lambda: len(reports) == 2 and statuses)
    assert reports == [report, LoadReport("i", "run1", 4)]
    assert statuses == [status]


async def test_a_subscriber_that_cannot_follow_loses_what_is_over_its_bound_and_counts_it(lab: Lab) -> None:
    member = await lab.member()
    narrow = Subject("penstock.contract.*", Heartbeat, pending_messages=8)
    seen: list[str] = []
    await member.bus.subscribe(narrow, lambda m: seen.append(m.id))
    sent = [str(number) for number in range(2000)]
    await lab.deliver(narrow.name("a"), *(encode(beat(name)) for name in sent))
    await eventually(lambda: len(seen) + member.dropped(narrow.pattern, "pending limit") == len(sent))
    assert 0 < len(seen) < len(sent)
    assert seen == sorted(seen, key=int)
    member.bus.publish(narrow, beat("later"), "a")
    await eventually(lambda: seen[-1] == "later")


async def test_without_the_bus_everything_fails_at_once_and_afterwards_works_as_before(lab: Lab) -> None:
    member, server = await lab.member("asking"), await lab.member("serving")
    seen: list[str] = []
    await member.bus.subscribe(HEARTBEAT, lambda m: seen.append(m.id))
    await server.bus.serve(SCHEDULE, placing("r"))
    await lab.down()
    assert member.connection == [False]
    assert not member.bus.publish(HEARTBEAT, beat("lost"), "a")
    assert member.dropped(HEARTBEAT.pattern, "disconnected") == 1
    with pytest.raises(BusUnavailable) as caught:
        await ask(member, "1", deadline_s=60)
    assert caught.value.subject == SCHEDULE.request.name("0")
    await lab.up()
    assert member.connection == [False, True]
    assert member.bus.publish(HEARTBEAT, beat("found"), "a")
    await eventually(lambda: seen)
    assert seen == ["found"]
    assert (await ask(member, "2")).replica == "r"


async def test_a_request_under_way_when_the_bus_goes_fails_at_once(lab: Lab) -> None:
    member = await lab.member()
    asked: list[str] = []

    def swallow(message: ScheduleBatch) -> None:
        asked.append(message.ingress)

    await member.bus.serve(SCHEDULE, swallow)
    request = asyncio.ensure_future(ask(member, "1", deadline_s=60))
    await eventually(lambda: asked)
    await lab.down()
    with pytest.raises(BusUnavailable) as caught:
        await request
    assert caught.value.subject == SCHEDULE.request.name("0")


async def test_a_subscription_made_while_the_bus_is_away_works_when_it_is_back(lab: Lab) -> None:
    member = await lab.member()
    await lab.down()
    seen: list[str] = []
    await member.bus.subscribe(HEARTBEAT, lambda m: seen.append(m.id))
    closed = await member.bus.subscribe(HEARTBEAT, lambda m: seen.append("closed"))
    await closed.close()
    await lab.up()
    member.bus.publish(HEARTBEAT, beat("1"), "a")
    member.bus.publish(HEARTBEAT, beat("2"), "a")
    await eventually(lambda: len(seen) >= 2)
    assert seen == ["1", "2"]


async def test_what_was_published_before_close_is_sent(lab: Lab) -> None:
    leaving, staying = await lab.member("leaving"), await lab.member("staying")
    seen: list[str] = []
    await staying.bus.subscribe(HEARTBEAT, lambda m: seen.append(m.id))
    for number in range(500):
        leaving.bus.publish(HEARTBEAT, beat(str(number)), "a")
    await leaving.bus.close()
    await eventually(lambda: len(seen) == 500)


async def test_a_registered_service_stands_in_the_directory_also_after_the_bus_was_away(lab: Lab) -> None:
    member = await lab.member()
    await member.bus.register("scheduler", "7f3a", "0.1.0", {"shard": "0"})
    await eventually(lambda: _listed(lab))
    await lab.down()
    await lab.up()
    await eventually(lambda: _listed(lab))


async def _listed(lab: Lab) -> bool:
    return "penstock-scheduler" in await lab.services()
