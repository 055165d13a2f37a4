"""Fallbacks that answer 429, circuit breakers, and routes that change while requests come."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from integration.servers import eventually

from penstock.common.bus import Change, Entry, Listing, Position
from penstock.common.codec import encode_record
from penstock.common.live_config import ROUTE, ConfigRecord, LiveConfig, config_key

from .conftest import LabOf
from .ingress_lab import HOST, Lab, Peer
from .scripted import ERROR, SCRIPTS, Endpoint, add_instance, config, refusing_port
from .test_route_matrix import MakeEndpoint, endpoint, name

__all__ = ["endpoint"]

QUEUE = {
    "route_policy": "prefix",
    "fallback_retry_queue_enabled": True,
    "fallback_retry_init_delay_ms": 40,
    "fallback_retry_max_delay_ms": 60,
}
SLOW = "429 Slow Down"


def chain(*members: Endpoint) -> str:
    return config(*({"base_url": one.url, "fallback": True} for one in members))


async def queued(lab: Lab) -> list[str]:
    return [event["result"] for event in await lab.events("queued")]


async def test_a_429_is_sent_again_after_growing_waits_until_it_is_answered(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    member = await endpoint(SLOW, SLOW, "ok")
    lab = await lab_of(route_config=chain(member), **QUEUE)
    response = await (await lab.client()).ask()
    assert (response.status, len(member.requests)) == (200, 3)
    first, second, third = member.times
    # Half of 40 and of 60 ms at least: the other half is chance.
    assert second - first >= 0.02
    assert third - second >= 0.03
    assert await queued(lab) == ["entered", "sent", "entered", "sent", "answered"]
    assert lab.metric("penstock_ingress_retry_queue_total", "answered") == 1
    assert (await lab.outcome())["attempts"] == 4


async def test_at_most_so_many_further_calls_then_the_next_and_at_last_the_429(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    first, second = await endpoint(SLOW), await endpoint(SLOW)
    lab = await lab_of(route_config=chain(first, second), fallback_retry_max_count=2, **QUEUE)
    response = await (await lab.client()).ask()
    assert (response.status, response.body) == (429, ERROR)
    assert (len(first.requests), len(second.requests)) == (3, 3)
    assert (await queued(lab)).count("exhausted") >= 1


async def test_without_the_queue_and_with_a_count_of_zero_the_next_is_asked_at_once(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    for settings in ({"fallback_retry_queue_enabled": False}, {"fallback_retry_max_count": 0}):
        first, second = await endpoint(SLOW), await endpoint("ok")
        lab = await lab_of(route_config=chain(first, second), **{**QUEUE, **settings})
        assert (await (await lab.client()).ask()).status == 200
        assert (len(first.requests), len(second.requests)) == (1, 1)


async def test_a_429_of_the_routes_own_endpoint_or_of_an_instance_is_not_queued(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    primary, member = await endpoint(SLOW), await endpoint("ok")
    routes = config({"base_url": primary.url, "prefix": "*"}, {"base_url": member.url, "fallback": True})
    lab = await lab_of(route_config=routes, **QUEUE)
    assert (await (await lab.client()).ask()).status == 200
    assert (len(primary.requests), await queued(lab)) == (1, [])


async def test_retry_after_is_respected_if_the_request_may_wait_so_long(
    lab_of: LabOf, endpoint: MakeEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(seconds: int) -> Callable[[Peer], None]:
        return lambda peer: peer.answer(ERROR, SLOW, f"retry-after: {seconds}")

    monkeypatch.setitem(SCRIPTS, "wait a second", busy(1))
    monkeypatch.setitem(SCRIPTS, "wait an hour", busy(3600))
    hour, second = await endpoint("wait an hour"), await endpoint("wait a second", "ok")
    lab = await lab_of(route_config=chain(hour, second), **QUEUE)
    assert (await (await lab.client()).ask()).status == 200
    assert len(hour.requests) == 1
    assert second.times[1] - second.times[0] >= 0.99
    assert await queued(lab) == ["too_long", "entered", "sent", "answered"]


async def test_a_full_queue_sends_on_to_the_next(lab_of: LabOf, endpoint: MakeEndpoint) -> None:
    first, second = await endpoint(SLOW), await endpoint("ok")
    settings = {**QUEUE, "fallback_retry_init_delay_ms": 60_000, "fallback_retry_max_delay_ms": 60_000}
    lab = await lab_of(route_config=chain(first, second), fallback_retry_queue_size=1, **settings)
    waiting = await lab.client()
    waiting.post()
    await eventually(lambda: len(lab.gateway.splitting.queue) == 1)
    assert (await (await lab.client()).ask()).status == 200
    assert await queued(lab) == ["entered", "full"]


async def test_a_client_that_leaves_is_taken_out_of_the_queue(lab_of: LabOf, endpoint: MakeEndpoint) -> None:
    member = await endpoint(SLOW)
    settings = {**QUEUE, "fallback_retry_init_delay_ms": 60_000, "fallback_retry_max_delay_ms": 60_000}
    lab = await lab_of(route_config=chain(member), **settings)
    client = await lab.client()
    client.post()
    await eventually(lambda: len(lab.gateway.splitting.queue) == 1)
    client.close()
    await eventually(lambda: not lab.gateway.splitting.queue)
    assert (await lab.outcome())["outcome"] == "client_gone"
    assert len(member.requests) == 1


async def test_a_request_that_waits_too_long_goes_on_to_the_next(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    first, second = await endpoint(SLOW), await endpoint("ok")
    lab = await lab_of(
        route_config=chain(first, second),
        request_timeout=0.5,
        fallback_retry_worker_size=1,
        fallback_retry_max_count=-1,
        **QUEUE,
    )
    assert (await (await lab.client()).ask()).status == 200
    assert len(first.requests) >= 3
    assert (await queued(lab))[-1] in ("too_long", "expired")


async def test_a_drain_leaves_nobody_in_the_queue_without_an_answer(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    member = await endpoint(SLOW)
    settings = {**QUEUE, "fallback_retry_init_delay_ms": 60_000, "fallback_retry_max_delay_ms": 60_000}
    lab = await lab_of(route_config=chain(member), **settings)
    clients = [await lab.client() for _ in range(5)]
    for client in clients:
        client.post()
    await eventually(lambda: len(lab.gateway.splitting.queue) == 5)
    await lab.drain(0.1)
    for client in clients:
        response = await client.response()
        assert (response.status, response.error["code"]) == (503, "shutting_down")


class Stormy(Endpoint):
    """Answers 429 to the first two calls of each request, to the first ones when all have come; counts the
    further calls under way at once."""

    def __init__(self, requests: int) -> None:
        super().__init__("ok")
        self.calls: dict[str, int] = {}
        self.waiting: list[Peer] = []
        self.expected = requests
        self.at_once = self.highest = 0

    def play(self, peer: Peer) -> None:
        request_id = self.requests[-1][1]["x-request-id"]
        self.calls[request_id] = call = self.calls.get(request_id, 0) + 1
        if call == 1:
            self.waiting.append(peer)
            if len(self.waiting) == self.expected:
                for waiting in self.waiting:
                    waiting.answer(ERROR, SLOW)
            return
        self.at_once += 1
        self.highest = max(self.highest, self.at_once)
        asyncio.get_running_loop().call_soon(self._finish, peer, call)

    def _finish(self, peer: Peer, call: int) -> None:
        self.at_once -= 1
        if call == 2:
            peer.answer(ERROR, SLOW)
        else:
            peer.answer(b'{"ok":true}')


async def test_a_storm_of_429_with_a_thousand_waiting_clients_is_answered_whole(lab_of: LabOf) -> None:
    member = Stormy(1000)
    await member.start()
    lab = await lab_of(
        route_policy="prefix",
        route_config=chain(member),
        connection_limit=4096,
        backend_max_connections=2048,
        gateway_max_connections=2048,
        fallback_retry_queue_enabled=True,
        fallback_retry_queue_size=1000,
        fallback_retry_worker_size=25,
        fallback_retry_init_delay_ms=3000,
        fallback_retry_max_delay_ms=3000,
    )
    splitting = lab.gateway.splitting
    clients = [await lab.client() for _ in range(1000)]
    for client in clients:
        client.post()
    await eventually(
        lambda: len(member.calls) == 1000 and len(splitting.queue) + splitting.queue.working > 900
    )
    answers = await asyncio.gather(*(client.response() for client in clients))
    assert [answer.status for answer in answers] == [200] * 1000
    assert set(member.calls.values()) == {3}
    assert 1 <= member.highest <= 25
    assert (len(splitting.queue), splitting.queue.working) == (0, 0)
    assert lab.metric("penstock_ingress_retry_queue_total", "answered") == 1000
    assert len(await lab.settled()) == 1000
    member.close()


# -- circuit breakers ----------------------------------------------------------------------------------


async def test_an_endpoint_that_keeps_failing_is_left_alone_and_probed(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    bad, good = await endpoint(*["500 Oh"] * 3, "ok"), await endpoint("ok")
    routes = config(
        {"base_url": bad.url, "name": "bad", "weight": 1}, {"base_url": good.url, "fallback": True}
    )
    lab = await lab_of(route_policy="weight", route_config=routes, breaker_failures=3, breaker_open_time=0.3)
    client = await lab.client()
    for _ in range(6):
        assert (await client.ask()).status == 200
    assert (len(bad.requests), len(good.requests)) == (3, 6)
    assert lab.metric("penstock_ingress_breakers_not_closed", "endpoint") == 1

    async def probed() -> bool:
        return (await client.ask()).headers["x-penstock-route"] == "bad"

    async with asyncio.timeout(10):
        while not await probed():
            pass
    changes = [(event["target"], event["state"]) for event in await lab.events("breaker")]
    assert changes == [(bad.url, "open"), (bad.url, "half_open"), (bad.url, "closed")]
    assert (await client.ask()).headers["x-penstock-route"] == "bad"


async def test_an_open_breaker_without_a_fallback_is_a_503_at_once(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    bad = await endpoint("500 Oh")
    routes = config({"base_url": bad.url, "weight": 1})
    lab = await lab_of(route_policy="weight", route_config=routes, breaker_failures=2)
    client = await lab.client()
    answers = [await client.ask() for _ in range(3)]
    assert [answer.status for answer in answers] == [500, 500, 503]
    assert answers[2].error["code"] == "no_available_instance"
    assert answers[2].headers["retry-after"] == "1"
    assert len(bad.requests) == 2


async def test_failing_instances_are_ejected_down_to_the_floor_of_the_pool(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    engines = [await endpoint("500 Oh") for _ in range(4)]
    lab = await lab_of(breaker_failures=2, ejection_max_percent=50)
    for number, engine in enumerate(engines):
        add_instance(lab, engine.port, f"i{number}")
    client = await lab.client()
    for _ in range(12):
        assert (await client.ask()).status == 500
    # The scheduler takes the first that is left. Two of four may be left out: the worst two of the three.
    counts = [len(engine.requests) for engine in engines]
    assert (sum(counts), counts[3], min(counts[:3]) >= 2) == (12, 0, True)
    assert max(len(request.excluded) for request in lab.scheduler.requests) == 2
    assert lab.metric("penstock_ingress_breakers_not_closed", "instance") == 3


async def test_the_last_instances_are_used_in_spite_of_open_breakers(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    bad, other = await endpoint("500 Oh", "500 Oh", "ok"), await endpoint("ok")
    lab = await lab_of(breaker_failures=2)
    add_instance(lab, bad.port, "bad")
    lab.instance("other", other.port, role="decode")
    client = await lab.client()
    lab.scheduler.decide = lambda r: lab.scheduler.first(
        r if "bad" in r.excluded and len(r.excluded) > 1 else _less(r)
    )
    assert [(await client.ask()).status for _ in range(2)] == [500, 500]
    assert (await client.ask()).status == 200
    assert [request.excluded for request in lab.scheduler.requests] == [(), (), ("bad",), ()]


def _less(request: Any) -> Any:
    """The scheduler of this test knows of one instance only: the other is for decode."""
    import msgspec

    return msgspec.structs.replace(request, excluded=(*request.excluded, "other"))


async def test_nothing_is_remembered_of_instances_and_endpoints_that_are_gone(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    bad, outside = await endpoint("500 Oh"), await endpoint("500 Oh")
    routes = config(
        {"base_url": "local", "prefix": "m"}, {"base_url": outside.url, "prefix": "*", "fallback": True}
    )
    lab = await lab_of(route_policy="prefix", route_config=routes, breaker_failures=1)
    add_instance(lab, bad.port)
    assert (await (await lab.client()).ask()).status == 500
    assert len(lab.gateway.breakers.tripped) == 2
    lab.table.apply(Listing(Position("1", 9), {}))
    lab.gateway.forget_gone()
    assert lab.gateway.breakers.tripped == {f"endpoint {outside.url}"}
    live = LiveConfig()
    changed = lab.gateway.splitting.follow(live)
    empty = record({"policy": "weight", "routes": []}, 1)
    changed(live.apply(Listing(Position("1", 1), {config_key(ROUTE, ""): empty})))
    assert not lab.gateway.breakers.targets


async def test_a_retry_that_is_never_answered_leaves_the_error_before_it(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    bad, mute = await endpoint("503 Busy"), await endpoint("silence")
    lab = await lab_of(retry_max_count=1, request_timeout=0.4)
    add_instance(lab, bad.port, "a")
    add_instance(lab, mute.port, "b")
    response = await (await lab.client()).ask()
    assert (response.status, response.body) == (503, ERROR)


async def test_retries_of_an_outage_stay_within_the_budget(lab_of: LabOf, endpoint: MakeEndpoint) -> None:
    engines = [await endpoint("500 Oh") for _ in range(2)]
    lab = await lab_of(
        retry_max_count=3, retry_budget_percent=20, retry_budget_min_per_second=0, breaker_failures=0
    )
    for number, engine in enumerate(engines):
        add_instance(lab, engine.port, f"i{number}")
    client = await lab.client()
    for _ in range(50):
        assert (await client.ask()).status == 500
    assert sum(len(engine.requests) for engine in engines) <= 60
    refused = [event for event in await lab.events("retry") if event["result"] == "over_budget"]
    assert len(refused) >= 40
    assert lab.metric("penstock_ingress_retries_total", "over_budget") == len(refused)


# -- live configuration --------------------------------------------------------------------------------


def record(value: Any, version: int, *, deleted: bool = False) -> Entry:
    one = ConfigRecord(
        value, version, "ann", f"2026-01-01T00:00:0{version}Z", "admin", kind=ROUTE, deleted=deleted
    )
    return Entry(encode_record(one), version)


async def test_live_routes_win_until_they_are_deleted_and_bad_ones_change_nothing(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    first, second = await endpoint("ok"), await endpoint("ok")
    lab = await lab_of(
        route_policy="weight", route_config=config({"base_url": first.url, "weight": 1, "name": "flag"})
    )
    live = LiveConfig()
    changed = lab.gateway.splitting.follow(live)
    client = await lab.client()

    async def answers_after(event: Listing | Change) -> str:
        changed(live.apply(event))
        return (await client.ask()).headers.get("x-penstock-route", "")

    key, value = (
        config_key(ROUTE, ""),
        {
            "policy": "prefix",
            "routes": [{"base_url": second.url, "prefix": "*", "name": "live"}],
        },
    )
    assert await answers_after(Listing(Position("1", 0), {})) == "flag"
    assert await answers_after(Change(Position("1", 1), key, record(value, 1))) == "live"
    assert await answers_after(Change(Position("1", 2), key, record({"policy": "no"}, 2))) == "live"
    empty = {"policy": "weight", "routes": []}
    add_instance(lab, second.port)
    assert await answers_after(Change(Position("1", 3), key, record(empty, 3))) == ""
    assert await answers_after(Change(Position("1", 4), key, record(value, 4, deleted=True))) == "flag"
    assert lab.metric("penstock_ingress_route_configurations_total", "refused") == 1


async def test_routes_that_change_under_a_request_leave_it_its_chain(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    slow, spare = await endpoint("silence"), await endpoint("ok")
    routes = config({"base_url": slow.url, "weight": 1}, {"base_url": spare.url, "fallback": True})
    lab = await lab_of(route_policy="weight", route_config=routes, request_timeout=0.5)
    client = await lab.client()
    client.post()
    await eventually(lambda: bool(slow.requests))
    lab.gateway.splitting.routes = None
    response = await client.response()
    assert (response.status, response.headers["x-penstock-route"]) == (200, name({"base_url": spare.url}))


async def test_routing_headers_can_be_hidden(lab_of: LabOf, endpoint: MakeEndpoint) -> None:
    outside = await endpoint("ok")
    lab = await lab_of(
        route_policy="weight",
        route_config=config({"base_url": outside.url, "weight": 1}),
        expose_routing_headers=False,
    )
    assert "x-penstock-route" not in (await (await lab.client()).ask()).headers


async def test_an_external_route_needs_no_instances_and_no_secrets_are_logged(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    outside = await endpoint("reset before the head")
    routes = config(
        {"base_url": f"http://{HOST}:{refusing_port()}", "prefix": "*", "api_key": "sk-one"},
        {"base_url": outside.url, "fallback": True, "api_key": "sk-two"},
    )
    lab = await lab_of(route_policy="prefix", route_config=routes)
    assert (await (await lab.client()).ask()).status == 502
    assert outside.requests[0][1]["authorization"] == "Bearer sk-two"
    await lab.settled()
    lab.gateway.access_log.flush()
    said = [json.dumps(await lab.events(kind)) for kind in ("route", "fallback", "outcome")]
    assert "sk-" not in "".join([*said, *(line.decode() for line in lab.access_lines)])


class Faulty:
    """Waits in the queue, and cannot be sent again."""

    ended = False

    def resend(self) -> None:
        raise RuntimeError("a fault of ours")

    def broken(self) -> None:
        self.ended = True


async def test_a_fault_with_one_request_of_the_queue_ends_it_and_no_other(lab_of: LabOf) -> None:
    lab = await lab_of(route_config=config({"base_url": "local", "prefix": "*"}), **QUEUE)
    splitting = lab.gateway.splitting
    waiters = [Faulty(), Faulty()]
    assert all(splitting.enter(waiter, 0.0) for waiter in waiters)
    await eventually(lambda: all(waiter.ended for waiter in waiters))
