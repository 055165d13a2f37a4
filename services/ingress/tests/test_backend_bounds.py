"""Bounds of connections and requests, per instance and over all: what is over them waits, or is told so."""

from __future__ import annotations

from random import Random

import pytest
from integration.servers import eventually

from penstock.ingress.adapters import shared_pools
from penstock.ingress.adapters.connection_limit import counts_bytes, counts_file
from penstock.ingress.adapters.shared_pools import (
    CONNECTIONS,
    PENDING,
    REQUESTS,
    Claim,
    SharedPools,
    Slot,
)

from .conftest import LabOf
from .ingress_lab import Engine, Lab, Peer, Response


def overflows(lab: Lab, bound: str) -> float:
    return lab.metric("penstock_ingress_upstream_overflow_total", bound)


def is_overflow(response: Response, flag: str) -> bool:
    """Whether it is the answer that DESIGN 3.2 and Envoy's clients know."""
    assert (response.status, response.error["code"]) == (503, "overloaded")
    assert (response.headers["x-envoy-overloaded"], response.headers["retry-after"]) == ("true", "1")
    return flag in response.error["message"]


async def waiting(lab: Lab, count: int) -> None:
    await eventually(lambda: lab.metric("penstock_ingress_upstream_pending") == count)


async def posted(lab: Lab, count: int) -> list[Peer]:
    """Clients with a request each, which came in this order."""
    clients = []
    for number in range(count):
        clients.append(client := await lab.client())
        client.post(x_request_id=f"r{number}")
        await waiting(lab, number + 1)
    return clients


async def test_more_parallel_requests_than_the_bound_are_a_503_at_once(lab_of: LabOf) -> None:
    lab = await lab_of(backend_max_parallel_requests=1)
    first, peer = await lab.exchange(await lab.engine())
    assert is_overflow(await (await lab.client()).ask(), "--backend-max-parallel-requests 1")
    assert overflows(lab, "backend_max_parallel_requests") == 1
    peer.answer()
    assert (await first.response()).status == 200
    # Room again, on the same connection.
    first.post()
    await peer.request()
    peer.answer()
    assert (await first.response()).status == 200
    assert sorted(o["outcome"] for o in await lab.settled()) == ["completed", "completed", "rejected"]


async def test_a_client_that_leaves_makes_room(lab_of: LabOf) -> None:
    lab = await lab_of(backend_max_parallel_requests=1)
    engine = await lab.engine()
    client, peer = await lab.exchange(engine)
    client.close()
    await peer.gone()
    await eventually(lambda: not lab.bounds.requests)
    _, peer = await lab.exchange(engine)
    peer.answer()


async def test_requests_wait_for_a_connection_in_the_order_in_which_they_came(lab_of: LabOf) -> None:
    lab = await lab_of(backend_max_connections=1, backend_max_pending_requests=3)
    engine = await lab.engine()
    first, peer = await lab.exchange(engine)
    waiters = await posted(lab, 3)
    assert is_overflow(await (await lab.client()).ask(), "--backend-max-pending-requests 3")
    waiters[1].close()
    await waiting(lab, 2)
    peer.answer()
    assert (await first.response()).status == 200
    for number in (0, 2):
        _, headers, _ = await peer.request()
        assert headers["x-request-id"] == f"r{number}"
        peer.answer(b"%d" % number)
        assert (await waiters[number].response()).body == b"%d" % number
    assert (engine.connections, overflows(lab, "backend_max_pending_requests")) == (1, 1)


async def test_one_who_waits_takes_the_place_of_a_connection_that_broke(lab_of: LabOf) -> None:
    lab = await lab_of(backend_max_connections=1)
    engine = await lab.engine()
    first, peer = await lab.exchange(engine)
    (second,) = await posted(lab, 1)
    peer.reset()
    assert (await first.response()).status == 502
    fresh = await engine.accept()
    await fresh.request()
    fresh.answer(b"second")
    assert (await second.response()).body == b"second"


async def test_who_waits_too_long_for_a_connection_gets_a_504_and_no_breaker_opens(lab_of: LabOf) -> None:
    lab = await lab_of(backend_max_connections=1, request_timeout=0.5, breaker_failures=1)
    client, peer = await lab.exchange(await lab.engine())
    peer.begin_stream()
    response = await (await lab.client()).ask()
    assert (response.status, response.error["code"]) == (504, "upstream_timeout")
    assert not lab.gateway.tripped
    client.close()


async def test_where_nobody_listens_those_who_wait_need_not_find_out_one_by_one(
    lab_of: LabOf, deaf_port: int
) -> None:
    lab = await lab_of(backend_max_connections=1, connect_timeout=0.3)
    lab.instance("a", deaf_port)
    (first,) = [await lab.client()]
    first.post()
    await eventually(lambda: lab.bounds.connections == 1)
    clients = [first, *await posted(lab, 3)]
    for client in clients:
        assert (await client.response()).error["code"] == "upstream_unreachable"
    assert lab.metric("penstock_ingress_upstream_connects_total", "refused") <= 2


async def test_a_connection_serves_so_many_requests_and_is_closed(lab_of: LabOf) -> None:
    lab = await lab_of(backend_max_requests_per_connection=2)
    engine = await lab.engine()
    client = await lab.client()
    for number in range(5):
        client.post()
        if number % 2 == 0:
            peer = await engine.accept()
        await peer.request()
        peer.answer(b"%d" % number)
        assert (await client.response()).body == b"%d" % number
    assert engine.connections == 3


@pytest.mark.parametrize(("most", "tried"), [(0, 1), (1, 2)])
async def test_retries_beyond_the_bound_are_not_made_and_the_failure_is_the_answer(
    lab_of: LabOf, most: int, tried: int
) -> None:
    lab = await lab_of(backend_max_parallel_retries=most, retry_max_count=1, retry_budget_percent=100)
    bad, good = await lab.engine("a"), await lab.engine("b")
    client, peer = await lab.exchange(bad)
    peer.answer(b"broken", "500 Internal Server Error")
    if tried == 1:
        response = await client.response()
        assert (response.status, response.body) == (500, b"broken")
        assert overflows(lab, "backend_max_parallel_retries") == 1
    else:
        # The one retry at a time is taken by the first.
        held = await good.accept()
        await held.request()
        second = await lab.client()
        second.post()
        await peer.request()
        peer.answer(b"broken too", "500 Internal Server Error")
        assert (await second.response()).body == b"broken too"
        held.answer(b"retried")
        assert (await client.response()).body == b"retried"
    await lab.settled()


# -- over all instances --------------------------------------------------------------------------------


async def two(lab: Lab) -> tuple[Engine, Engine]:
    """Two engines, the second of them for another model."""
    return await lab.engine("a"), await lab.engine("b", models=("other",))


OTHER = b'{"model":"other","messages":[{"role":"user","content":"hi"}]}'


async def test_the_bound_of_all_requests_counts_those_at_every_instance(lab_of: LabOf) -> None:
    lab = await lab_of(gateway_max_requests=1)
    a, _ = await two(lab)
    first, peer = await lab.exchange(a)
    client = await lab.client()
    client.post(OTHER)
    assert is_overflow(await client.response(), "--gateway-max-requests 1")
    peer.answer()
    assert (await first.response()).status == 200


async def test_an_idle_connection_elsewhere_makes_room_and_one_in_use_does_not(lab_of: LabOf) -> None:
    lab = await lab_of(gateway_max_connections=1, gateway_max_pending_requests=1)
    a, b = await two(lab)
    first, peer = await lab.exchange(a)
    second = await lab.client()
    second.post(OTHER)
    await waiting(lab, 1)
    third = await lab.client()
    third.post(OTHER)
    assert is_overflow(await third.response(), "--gateway-max-pending-requests 1")
    peer.answer()
    assert (await first.response()).status == 200
    other = await b.accept()
    await other.request()
    await peer.gone()
    other.answer(b"second")
    assert (await second.response()).body == b"second"
    assert lab.bounds.connections == 1


# -- of several workers --------------------------------------------------------------------------------


def regions(count: int) -> list[SharedPools]:
    """As the workers of one ingress have them."""
    with counts_file(count) as file:
        return [SharedPools(file.fileno(), counts_bytes(count), count, index) for index in range(count)]


def claimed(pools: SharedPools, address: object) -> Slot:
    slot = pools.claim(address)
    assert slot is not None
    return slot


def test_workers_see_what_the_others_have_and_not_their_own() -> None:
    pools = regions(3)
    slots = [claimed(worker, ("h", 1, "http")) for worker in pools]
    elsewhere = claimed(pools[1], ("h", 2, "http"))
    elsewhere.publish(100, 100, 100)
    elsewhere.claim(100)
    for number, slot in enumerate(slots):
        slot.publish(10**number, 0, 0)
        slot.claim(2 * 10**number)
    assert [slot.others(CONNECTIONS) for slot in slots] == [110, 101, 11]
    assert [slot.others(REQUESTS) for slot in slots] == [220, 202, 22]
    pools[0].clear(2)
    assert [slot.others(CONNECTIONS) for slot in slots[:2]] == [10, 1]
    claimed(pools[2], ("h", 1, "http")).publish(5, 7, 0)
    assert (slots[0].others(CONNECTIONS), slots[0].others(PENDING)) == (15, 7)


def test_places_are_used_again_once_nobody_is_counted_there() -> None:
    one, other = regions(2)
    # More addresses than there are places, a few at a time.
    for number in range(3 * shared_pools.SLOTS):
        mine, theirs = claimed(one, number), claimed(other, number)
        mine.publish(number, 0, 0)
        theirs.publish(1, 0, 0)
        assert theirs.others(CONNECTIONS) == number
        assert mine.others(CONNECTIONS) == 1
        one.give_back(mine)
        other.give_back(theirs)


def test_where_every_place_is_taken_there_is_none() -> None:
    (one,) = regions(1)
    slots = [one.claim(number) for number in range(2 * shared_pools.SLOTS)]
    assert None in slots
    held = [slot.at for slot in slots if slot is not None]
    assert len(set(held)) == len(held) <= shared_pools.SLOTS


@pytest.mark.parametrize("most", [1, 2, 7, 64, 1024, 5000])
def test_workers_never_have_more_requests_than_the_bound_and_nearly_all_of_it(most: int) -> None:
    """Whoever asks in whatever order; at most a sixteenth lies idle, and of small bounds nothing."""
    count, random = 4, Random(most)
    claims = [Claim(claimed(worker, "a"), most, count) for worker in regions(count)]
    held = [0] * count
    for _ in range(20 * most + 200):
        worker = random.randrange(count)
        if random.random() < 0.6:
            if claims[worker].reaches(held[worker] + 1):
                held[worker] += 1
            else:
                assert sum(held) >= most - most // 16
        elif held[worker]:
            held[worker] -= 1
            claims[worker].fit(held[worker])
        assert sum(held) <= most
    # One alone may have nearly all, once the others let go.
    for worker in range(1, count):
        claims[worker].fit(0)
    claims[0].fit(0)
    assert claims[0].reaches(most - most // 16)
    assert not claims[1].reaches(most // 16 + 1)
