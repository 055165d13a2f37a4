"""Every protocol and mode at every point of failure, streamed and not: what the client gets, how often was
tried, and that nobody is left holding anything."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable

import pytest
from integration.servers import eventually

from penstock.ingress.disaggregation.protocol import Order

from .conftest import LabOf
from .ingress_lab import BODY, STREAM_BODY, Peer
from .pd_fleet import (
    MODES,
    SETTINGS,
    VARIANTS,
    D,
    Fleet,
    P,
    Point,
    drains,
    end_lease,
    forget,
    leaves,
    lose_bus,
)


def always(status: int, attempts: int) -> Callable[[Fleet], tuple[int, int] | None]:
    return lambda fleet: (status, attempts)


def asked(status: int, attempts: int, *, listened: bool = True) -> Callable[[Fleet], tuple[int, int] | None]:
    """As given where prefill is asked, and (`listened`) its answer read."""

    def result(fleet: Fleet) -> tuple[int, int] | None:
        if fleet.order is Order.DECODE_ONLY:
            return None
        return (200, 1) if listened and fleet.order is Order.TOGETHER else (status, attempts)

    return result


def in_turn(attempts: int) -> Callable[[Fleet], tuple[int, int] | None]:
    """An answer, after so many attempts where decode goes out second; else after the first."""
    return lambda fleet: (200, attempts if fleet.order is Order.PREFILL_FIRST else 1)


POINTS = (
    Point("nothing", always(200, 1)),
    Point("prefill cannot be reached", asked(200, 2, listened=False), unreachable=frozenset({P})),
    Point("prefill ends the connection", asked(200, 2, listened=False), prefill=("drop",)),
    Point("prefill fails", asked(200, 2, listened=False), prefill=("500",)),
    Point("prefill fails again and again", asked(200, 3, listened=False), prefill=("500", "500")),
    Point("prefill refuses the request", asked(422, 1, listened=False), prefill=("422",)),
    Point("prefill is full", asked(429, 1, listened=False), prefill=("429",)),
    Point("prefill is silent", asked(200, 2, listened=False), prefill=("silence",)),
    Point("prefill answers no JSON", asked(200, 2), prefill=("garbage",)),
    Point("prefill gives no parameters", asked(200, 1), prefill=("no-parameters",)),
    Point(
        "its bootstrap server fails",
        lambda fleet: (200, 2) if fleet.tells is False else None,
        prefill=("no-query",),
        between=forget,
    ),
    Point("decode cannot be reached", always(200, 2), unreachable=frozenset({D})),
    Point("decode ends the connection", always(200, 2), decode=("drop",)),
    Point("decode fails", always(200, 2), decode=("500",)),
    Point("decode fails again and again", always(500, 2), decode=("500", "500")),
    Point("decode refuses the request", always(422, 1), decode=("422",)),
    Point("decode is full", always(429, 1), decode=("429",)),
    Point("decode is silent", always(504, 1), decode=("silence",)),
    Point("decode dies in the middle", always(0, 1), decode=("mid-stream",)),
    Point("decode drains between", always(200, 1), between=drains("d1")),
    Point("decode leaves between", always(200, 1), between=leaves("d1")),
    Point("prefill drains between", always(200, 1), between=drains("p1")),
    Point("prefill leaves between", in_turn(2), between=leaves("p1")),
    Point(
        "the lease is over between",
        lambda fleet: (502, 3) if fleet.order is Order.PREFILL_FIRST else (200, 1),
        between=end_lease,
    ),
    Point("the bus is lost between", always(200, 1), between=lose_bus),
    Point("the schedulers are lost between", always(200, 1), between=Fleet.lose_schedulers),
)


async def fleet_of(lab_of: LabOf, variant: str, staged: bool) -> Fleet:
    protocol, _ = VARIANTS[variant]
    lab = await lab_of(**SETTINGS, pd_disagg_protocol=protocol, separate_pd_scheduling=staged)
    fleet = Fleet(lab, variant, staged)
    await fleet.start()
    return fleet


@pytest.mark.parametrize(("variant", "staged"), MODES)
@pytest.mark.parametrize("stream", [False, True])
async def test_at_every_point_of_failure(lab_of: LabOf, variant: str, staged: bool, stream: bool) -> None:
    fleet = await fleet_of(lab_of, variant, staged)
    for point in POINTS:
        wanted = point.result(fleet)
        if wanted is None:
            continue
        await fleet.set_up(point)
        client = await fleet.lab.client()
        client.post(STREAM_BODY if stream else BODY)
        status = await status_of(client, stream)
        fleet.lab.broker.set_up(True)
        outcome = (await fleet.lab.settled())[-1]
        assert (status, outcome["attempts"]) == wanted, (point.name, outcome, fleet.got)
        assert_sound(fleet, point)
    await fleet.close()


async def status_of(client: Peer, stream: bool) -> int:
    """Of the response; 0 if it breaks off."""
    try:
        response = await client.response()
    except (asyncio.IncompleteReadError, ConnectionError):
        return 0
    if response.status == 200:
        assert b'{"said":"all"}' in response.body
        if stream and b"upstream_unreachable" in response.body:
            return 0
    return response.status


def assert_sound(fleet: Fleet, point: Point) -> None:
    """What prefill keeps was passed on at most once, and nothing was passed on that it does not keep."""
    decodes = [body for role, body in fleet.got if role is D]
    prefills = [body for role, body in fleet.got if role is P]
    for name in ("kv_transfer_params", "bootstrap_room", "rid"):
        passed = [json.dumps(body[name], sort_keys=True) for body in decodes if name in body]
        if fleet.protocol != "vllm-kvt":
            assert max(Counter(passed).values(), default=0) <= 1, (point.name, passed)
        if fleet.order is Order.PREFILL_FIRST:
            assert len(passed) <= len(prefills), (point.name, fleet.got)
    assert all(body["max_tokens"] == 1 for body in prefills)
    # A request passes parameters to two decodes at most.
    assert len(decodes) <= 2, point.name


LEAVING = ("prefill", "decode", "stream")


@pytest.mark.parametrize(("variant", "staged"), MODES)
@pytest.mark.parametrize("moment", LEAVING)
async def test_a_client_that_leaves_takes_all_along(
    lab_of: LabOf, variant: str, staged: bool, moment: str
) -> None:
    fleet = await fleet_of(lab_of, variant, staged)
    role, act = {"prefill": (P, "wait"), "decode": (D, "wait"), "stream": (D, "hang")}[moment]
    if role is P and fleet.order is Order.DECODE_ONLY:
        role = D
    prefill, decode = ((act,), ()) if role is P else ((), (act,))
    await fleet.set_up(Point(moment, always(0, 1), prefill, decode))
    client = await fleet.lab.client()
    client.post(STREAM_BODY)
    await eventually(lambda: any(one is role for one, _ in fleet.got))
    if moment == "stream":
        await client.until(b"all")
    client.close()
    outcome = await fleet.lab.outcome()
    assert outcome["outcome"] == "client_gone"
    assert_sound(fleet, Point(moment, always(0, 1)))
    if variant == "sglang" and moment != "stream":
        await eventually(lambda: "/abort_request" in fleet.asides)
    await fleet.close()
