"""Every class of error at every point, at an instance, at a route's own endpoint and at a fallback."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from .conftest import LabOf
from .ingress_lab import HOST, Peer
from .scripted import ERROR, Endpoint, add_instance, config, refusing_port

# What the client gets: a status and who is asked after, or "broken": a response without its end.
BEFORE_CONNECT = ("refused", "no answer to SYN")
BEFORE_HEAD = ("reset before the head", "end before the head", "half a head", "no HTTP")
SERVER_ERRORS = ("500 Oh", "503 Busy", "500 without its body", "500 with a huge body")
CLIENT_ERRORS = ("400 Bad", "404 No", "429 Slow Down")
AFTER_HEAD = (
    "reset after the head",
    "end after the head",
    "silence after the head",
    "reset in the body",
    "silence in the body",
    "bad chunk in the body",
)
FAULTS = (*BEFORE_CONNECT, *BEFORE_HEAD, "silence", *SERVER_ERRORS, *CLIENT_ERRORS, *AFTER_HEAD)
TIMEOUTS = {"connect_timeout": 0.2, "request_timeout": 0.6, "stream_idle_timeout": 0.4}

MakeEndpoint = Callable[..., Awaitable[Endpoint]]


@pytest.fixture
async def endpoint() -> AsyncIterator[MakeEndpoint]:
    """Starts endpoints that play scripts."""
    started: list[Endpoint] = []

    async def make(*scripts: str) -> Endpoint:
        started.append(one := Endpoint(*scripts))
        await one.start()
        return one

    yield make
    for one in started:
        one.close()


async def outcome(client: Peer) -> tuple[str, bytes]:
    """Status, or broken; and the body."""
    client.post()
    try:
        response = await client.response()
    except (EOFError, ConnectionError):
        return "broken", b""
    return str(response.status), response.body


def alone(fault: str) -> str:
    """What the client gets where nobody else can be asked."""
    if fault in AFTER_HEAD or fault == "500 without its body":
        return "broken"
    if fault == "silence":
        return "504"
    return "502" if fault in BEFORE_CONNECT + BEFORE_HEAD else fault[:3]


@pytest.mark.parametrize("fallback", [True, False], ids=["with a fallback", "alone"])
@pytest.mark.parametrize("place", ["instance", "endpoint", "fallback"])
@pytest.mark.parametrize("fault", FAULTS)
async def test_error_by_point_and_place(
    lab_of: LabOf, endpoint: MakeEndpoint, deaf_port: int, fault: str, place: str, fallback: bool
) -> None:
    bad, good = await endpoint(fault if fault not in BEFORE_CONNECT else "ok"), await endpoint("ok")
    port = {"refused": refusing_port(), "no answer to SYN": deaf_port}.get(fault, bad.port)
    url = f"http://{HOST}:{port}"
    entries: list[dict[str, Any]] = {
        "instance": [{"base_url": "local", "weight": 1}],
        "endpoint": [{"base_url": url, "weight": 1, "fallback": True}],
        "fallback": [{"base_url": url, "weight": 0, "fallback": True}],
    }[place]
    if fallback:
        entries.append({"base_url": good.url, "fallback": True})
    lab = await lab_of(route_policy="weight", route_config=config(*entries), **TIMEOUTS)
    if place == "instance":
        add_instance(lab, port)

    status, body = await outcome(await lab.client())

    final = ("silence", *CLIENT_ERRORS) if place == "instance" else ()
    moves = fallback and fault not in AFTER_HEAD and fault not in final
    assert status == ("200" if moves else alone(fault))
    assert len(good.requests) == int(moves)
    assert len(bad.requests) == int(fault not in BEFORE_CONNECT)
    if not moves and fault in ("500 Oh", "503 Busy", *CLIENT_ERRORS):
        assert body == ERROR
    (event,) = await lab.settled()
    assert event["route"] == (
        good.url.removeprefix("http://") if moves else entries[0].get("name") or name(entries[0])
    )
    fallbacks = [event["route"] for event in await lab.events("fallback")]
    assert len(fallbacks) == (place == "fallback") + moves


def name(entry: dict[str, Any]) -> str:
    return str(entry["base_url"]).removeprefix("http://")


async def test_an_instances_failures_are_retried_elsewhere_before_the_chain(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    first, second, spare = (
        await endpoint("500 Oh"),
        await endpoint("reset before the head"),
        await endpoint("ok"),
    )
    routes = config({"base_url": "local", "weight": 1}, {"base_url": spare.url, "fallback": True})
    lab = await lab_of(route_policy="weight", route_config=routes, retry_max_count=1)
    add_instance(lab, first.port, "a")
    add_instance(lab, second.port, "b")
    response = await (await lab.client()).ask()
    assert (response.status, response.headers["x-penstock-route"]) == (200, name({"base_url": spare.url}))
    assert [len(one.requests) for one in (first, second, spare)] == [1, 1, 1]
    (retry,) = await lab.events("retry")
    assert (retry["instance"], retry["cause"], retry["result"]) == ("a", "answered", "sent")
    (event,) = await lab.settled()
    assert event["attempts"] == 3


async def test_a_chain_of_three_whose_first_two_fail_differently(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    bad, worse, good = (
        await endpoint("503 Busy"),
        await endpoint("reset before the head"),
        await endpoint("ok"),
    )
    routes = config(
        {"base_url": "local", "prefix": "*"},
        *({"base_url": one.url, "fallback": True} for one in (bad, worse, good)),
    )
    lab = await lab_of(route_policy="prefix", route_config=routes)
    response = await (await lab.client()).ask()
    assert (response.status, response.headers["x-penstock-route"]) == (200, name({"base_url": good.url}))
    assert [len(one.requests) for one in (bad, worse, good)] == [1, 1, 1]
    causes = [(event["route"], event["cause"]) for event in await lab.events("fallback")]
    assert [cause for _, cause in causes] == ["not_placed", "answered", "lost"]
    assert (
        bad.requests[0][1]["x-request-id"]
        == good.requests[0][1]["x-request-id"]
        == response.headers["x-request-id"]
    )


@pytest.mark.parametrize(
    ("scripts", "status", "body"),
    [
        (("503 Busy", "reset before the head"), 503, ERROR),
        (("reset before the head", "400 Bad"), 400, ERROR),
        (("reset before the head", "end before the head"), 502, None),
        (("429 Slow Down", "silence"), 429, ERROR),
        (("silence", "silence"), 504, None),
        (("500 without its body", "reset before the head"), 500, None),
    ],
)
async def test_the_client_sees_the_last_real_error(
    lab_of: LabOf, endpoint: MakeEndpoint, scripts: tuple[str, str], status: int, body: bytes | None
) -> None:
    members = [await endpoint(script) for script in scripts]
    routes = config(*({"base_url": one.url, "fallback": True} for one in members))
    lab = await lab_of(route_policy="prefix", route_config=routes, **TIMEOUTS)
    client = await lab.client()
    response = await client.ask()
    assert response.status == status
    assert response.body == body if body else response.error
    # The connection is whole and serves the next request.
    assert (await client.ask()).status == status
    await lab.settled()


async def test_a_primary_that_is_in_the_chain_too_is_asked_once(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    primary, other = await endpoint("500 Oh"), await endpoint("ok")
    routes = config(
        {"base_url": primary.url, "weight": 1},
        {"base_url": primary.url + "/", "fallback": True},
        {"base_url": other.url, "fallback": True},
    )
    lab = await lab_of(route_policy="weight", route_config=routes)
    assert (await (await lab.client()).ask()).status == 200
    assert (len(primary.requests), len(other.requests)) == (1, 1)


async def test_no_match_and_no_chain_is_an_unknown_model(lab_of: LabOf, endpoint: MakeEndpoint) -> None:
    engine = await endpoint("ok")
    lab = await lab_of(route_policy="prefix", route_config=config({"base_url": "local", "prefix": "other-*"}))
    add_instance(lab, engine.port)
    response = await (await lab.client()).ask()
    assert (response.status, response.error["code"], response.error["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert not engine.requests


async def test_splitting_comes_before_the_model_check(lab_of: LabOf, endpoint: MakeEndpoint) -> None:
    outside = await endpoint("ok")
    lab = await lab_of(
        route_policy="prefix", route_config=config({"base_url": outside.url, "prefix": "gpt-*"})
    )
    body = b'{ "model":"gpt-4",  "messages":[{"role":"user","content":"hi"}] }'
    response = await (await lab.client()).ask(body, "/v1/chat/completions?x=1", authorization="Bearer mine")
    assert response.status == 200
    ((first, headers, sent),) = outside.requests
    assert first == "POST /v1/chat/completions?x=1 HTTP/1.1"
    assert sent == body
    assert "authorization" not in headers
    assert "target-pod" not in response.headers


async def test_a_stream_of_an_endpoint_passes_as_it_comes(lab_of: LabOf) -> None:
    engine_lab = await lab_of()
    engine = await engine_lab.engine()
    url = f"http://{HOST}:{engine.port}"
    lab = await lab_of(route_policy="weight", route_config=config({"base_url": url, "weight": 1}))
    client = await lab.client()
    client.post()
    peer = await engine.accept()
    await peer.request()
    peer.begin_stream()
    _, headers, _ = await client.head()
    assert headers["x-penstock-route"] == f"{HOST}:{engine.port}"
    for word in "abc":
        wire = peer.event(word)
        assert await client.exactly(len(wire)) == wire
    client.close()
    await peer.gone()
    (event,) = await lab.settled()
    assert (event["outcome"], event["status"], event["chunks"]) == ("client_gone", 200, 3)


async def test_the_models_name_is_rewritten_where_a_route_says_so(
    lab_of: LabOf, endpoint: MakeEndpoint
) -> None:
    outside, engine = await endpoint("429 Slow Down"), await endpoint("500 Oh")
    routes = config(
        {"base_url": "local", "prefix": "public", "model": "m", "rewrite_model": True},
        {"base_url": outside.url, "fallback": True, "model": "theirs", "rewrite_model": True},
    )
    lab = await lab_of(route_policy="prefix", route_config=routes)
    add_instance(lab, engine.port)
    body = b'{"model":"public","messages":[{"role":"user","content":"h\\u0069"}],"n":1.50}'
    assert (await (await lab.client()).ask(body)).status == 429
    assert engine.requests[0][2] == body.replace(b'"public"', b'"m"')
    assert outside.requests[0][2] == body.replace(b'"public"', b'"theirs"')


async def test_an_endpoints_connections_are_kept(lab_of: LabOf, endpoint: MakeEndpoint) -> None:
    outside = await endpoint("ok")
    lab = await lab_of(route_policy="weight", route_config=config({"base_url": outside.url, "weight": 1}))
    client = await lab.client()
    for _ in range(5):
        assert (await client.ask()).status == 200
    assert lab.metric("penstock_ingress_external_connects_total", "connected") == 1
    assert lab.metric("penstock_ingress_routed_total", name({"base_url": outside.url}), "weight") == 5


async def test_a_small_live_split_is_proportional(lab_of: LabOf, endpoint: MakeEndpoint) -> None:
    outside, engine = await endpoint("ok"), await endpoint("ok")
    routes = config({"base_url": "local", "weight": 50}, {"base_url": outside.url, "weight": 50})
    lab = await lab_of(route_policy="weight", route_config=routes)
    add_instance(lab, engine.port)
    clients = [await lab.client() for _ in range(20)]

    async def ask(client: Peer) -> None:
        for _ in range(25):
            assert (await client.ask()).status == 200

    await asyncio.gather(*(ask(client) for client in clients))
    assert len(outside.requests) + len(engine.requests) == 500
    assert 190 <= len(outside.requests) <= 310
