"""The public listener: what it answers by itself, what it refuses, and for how long it waits."""

import asyncio
import json

import pytest
from integration.servers import eventually

from penstock.common.model import InstanceState
from penstock.common.telemetry import Metrics
from penstock.ingress.adapters.connection_limit import ConnectionLimit, SharedCounts, counts_file

from .conftest import LabOf
from .ingress_lab import BODY, CHAT, Engine, Lab, Peer, Response


async def ask(lab: Lab, method: str, path: str, **headers: str) -> Response:
    client = await lab.client()
    lines = [f"{method} {path} HTTP/1.1", "host: g", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
    client.send("\r\n".join(lines).encode())
    return await client.response(bodiless=method == "HEAD")


async def refused(client: Peer) -> Response:
    """The answer to something that was no request, after which the connection ends."""
    response = await client.response()
    assert response.headers["connection"] == "close"
    assert response.headers["x-request-id"]
    assert await client.rest() == b""
    return response


# -- answers without an instance -----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/health", "/healthz", "/readyz", "/health?verbose=1"])
async def test_probes_are_answered(lab: Lab, path: str) -> None:
    response = await ask(lab, "GET", path)
    assert (response.status, json.loads(response.body)) == (200, {"status": "ok"})
    assert response.headers["content-type"] == "application/json"


async def test_readyz_says_no_before_the_instances_are_known_and_while_draining(lab: Lab) -> None:
    lab.gateway.draining = True
    assert (await ask(lab, "GET", "/readyz")).status == 503
    lab.gateway.draining = False
    lab.table.synced = False
    assert (await ask(lab, "GET", "/readyz")).status == 503
    assert (await ask(lab, "GET", "/health")).status == 200


async def test_models_are_those_of_the_instances(lab: Lab) -> None:
    lab.instance("a", 1, models=("m1", "m2"), lora_adapters=("lora",), owner="team")
    lab.instance("b", 2, models=("m1",))
    lab.instance("c", 3, models=("m3",), state=InstanceState.UNHEALTHY)
    lab.instance("d", 4, models=("m1",), state=InstanceState.STALE)
    response = await ask(lab, "GET", "/v1/models")
    listed = json.loads(response.body)
    assert listed["object"] == "list"
    assert [(m["id"], m["owned_by"], m["object"]) for m in listed["data"]] == [
        ("lora", "team", "model"),
        ("m1", "penstock", "model"),
        ("m1", "team", "model"),
        ("m2", "team", "model"),
    ]
    assert [m.get("parent") for m in listed["data"]] == ["m1", None, None, None]


@pytest.mark.parametrize("path", ["/v1/models", "/health", "/no/such/path", CHAT])
async def test_head_gets_the_head_of_a_get_and_no_body(lab: Lab, path: str) -> None:
    client = await lab.client()
    for method in ("HEAD", "GET"):
        client.send(f"{method} {path} HTTP/1.1\r\nhost: g\r\nx-request-id: r\r\n\r\n".encode())
    head, get = await client.response(bodiless=True), await client.response()
    if path == CHAT:
        assert (head.status, get.status) == (405, 405)
    else:
        assert get.wire == head.wire + get.body
    assert get.body


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/", 404, "not_found"),
        ("POST", "/v1/chat/completions/", 404, "not_found"),
        ("POST", "//v1/chat/completions", 404, "not_found"),
        ("POST", "/V1/chat/completions", 404, "not_found"),
        ("POST", "/v1/chat%2fcompletions", 404, "not_found"),
        ("POST", "/v1/../v1/chat/completions", 404, "not_found"),
        ("GET", "/metrics", 404, "not_found"),
        ("OPTIONS", "*", 404, "not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("post", CHAT, 405, "method_not_allowed"),
        ("DELETE", CHAT, 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_unknown_paths_and_wrong_methods_are_refused_and_the_connection_kept(
    lab: Lab, method: str, path: str, status: int, code: str
) -> None:
    client = await lab.client()
    for _ in range(2):
        client.send(f"{method} {path} HTTP/1.1\r\nhost: g\r\ncontent-length: 3\r\n\r\nabc".encode())
        response = await client.response()
        assert (response.status, response.error["code"]) == (status, code)
        allowed = None if status == 404 else "POST" if path == CHAT else "GET, HEAD"
        assert response.headers.get("allow") == allowed


async def test_an_absolute_target_is_served_by_its_path(lab: Lab, engine: Engine) -> None:
    assert (await ask(lab, "GET", "http://elsewhere/v1/models")).status == 200
    client = await lab.client()
    client.post(path=f"http://elsewhere{CHAT}?a=b")
    peer = await engine.accept()
    first, headers, _ = await peer.request()
    assert first == f"POST {CHAT}?a=b HTTP/1.1"
    assert headers["host"] == f"127.0.0.1:{engine.port}"
    peer.answer()
    assert (await client.response()).status == 200


async def test_a_client_that_says_close_is_answered_and_closed(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.post(Connection="close")
    peer = await engine.accept()
    assert "connection" not in (await peer.request())[1]
    peer.answer(b"bye")
    response = await client.response()
    assert (response.body, response.headers["connection"]) == (b"bye", "close")
    assert await client.rest() == b""
    second = await lab.client()
    second.send(b"GET /health HTTP/1.0\r\n\r\n")
    assert (await second.response()).headers["connection"] == "close"
    assert await second.rest() == b""


async def test_a_bad_body_is_an_error_and_the_connection_goes_on(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    for body, param in ((b"{", None), (b'{"model":"m"}', "messages"), (b'{"messages":[1]}', "model")):
        response = await client.ask(body)
        assert (response.status, response.error["param"]) == (400, param)
    client.post()
    peer = await engine.accept()
    await peer.request()
    peer.answer()
    assert (await client.response()).status == 200
    assert [outcome["outcome"] for outcome in await lab.settled()] == ["completed"]


async def test_empty_lines_before_a_request_are_ignored(lab: Lab) -> None:
    client = await lab.client()
    for _ in range(2):
        client.send(b"\r\nGET /health HTTP/1.1\r\nhost: g\r\n\r\n")
        assert (await client.response()).status == 200


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="HTTP/2"),
        pytest.param(b"\x16\x03\x01\x00\xa5\x01\r\n\r\n", id="TLS"),
        pytest.param(b"GET /health HTTP/1.1\r\n\r\n", id="no Host"),
        pytest.param(b"GET /health HTTP/1.1\nhost: g\n\nx\r\n\r\n", id="bare LF"),
        pytest.param(
            b"POST /health HTTP/1.1\r\nhost: g\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0",
            id="two framings",
        ),
        pytest.param(
            b"POST /health HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n", id="bad chunk"
        ),
    ],
)
async def test_what_is_no_request_is_answered_and_nothing_after_it_is_read(lab: Lab, sent: bytes) -> None:
    client = await lab.client()
    client.send(sent + b"GET /v1/models HTTP/1.1\r\nhost: g\r\n\r\n" * 3)
    response = await refused(client)
    assert (response.status, response.error["code"]) == (400, "bad_framing")
    assert lab.metric("penstock_ingress_refused_total", "bad_framing") == 1


async def test_a_request_smuggled_behind_a_length_is_part_of_the_body(lab: Lab, engine: Engine) -> None:
    smuggled = b'{"model":"m","messages":[1]}' + b"GET /v1/models HTTP/1.1\r\nhost: g\r\n\r\n"
    client = await lab.client()
    assert (await client.ask(smuggled)).status == 400
    client.send(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
    assert (await client.response()).body == b'{"status":"ok"}'


@pytest.mark.parametrize("whole", [True, False])
async def test_headers_over_the_limit_are_a_431(lab_of: LabOf, whole: bool) -> None:
    lab = await lab_of(max_header_bytes=1024)
    client = await lab.client()
    client.send(b"GET /health HTTP/1.1\r\nhost: g\r\nx: " + b"y" * 2000 + (b"\r\n\r\n" if whole else b""))
    response = await refused(client)
    assert (response.status, response.error["code"]) == (431, "headers_too_large")


async def test_headers_just_under_the_limit_are_taken(lab_of: LabOf) -> None:
    lab = await lab_of(max_header_bytes=1024)
    start = b"GET /health HTTP/1.1\r\nhost: g\r\nx: "
    client = await lab.client()
    client.send(start + b"y" * (1024 - len(start)) + b"\r\n\r\n")
    assert (await client.response()).status == 200


@pytest.mark.parametrize("expect", ["", "expect: 100-continue\r\n"])
async def test_a_body_over_the_limit_is_a_413_before_it_is_sent(lab_of: LabOf, expect: str) -> None:
    lab = await lab_of(buffer_limit=1024)
    client = await lab.client()
    client.send(f"POST {CHAT} HTTP/1.1\r\nhost: g\r\n{expect}content-length: 1025\r\n\r\n".encode())
    response = await refused(client)
    assert (response.status, response.error["code"]) == (413, "request_too_large")


async def test_a_chunked_body_over_the_limit_is_a_413(lab_of: LabOf) -> None:
    lab = await lab_of(buffer_limit=1024)
    client = await lab.client()
    client.send(f"POST {CHAT} HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n".encode())
    client.send(b"200\r\n" + b"x" * 512 + b"\r\n")
    client.send(b"201\r\n" + b"x" * 513)
    assert (await refused(client)).status == 413


async def test_a_client_that_sends_on_after_a_refusal_still_gets_the_answer(lab_of: LabOf) -> None:
    lab = await lab_of(buffer_limit=1024)
    client = await lab.client()
    client.post(b"x" * 20_000_000)
    assert (await client.response()).status == 413
    client.reset()


async def test_a_body_at_the_limit_is_taken(lab_of: LabOf) -> None:
    lab = await lab_of(buffer_limit=1024)
    engine = await lab.engine()
    body = BODY + b" " * (1024 - len(BODY))
    client = await lab.client()
    client.post(body)
    peer = await engine.accept()
    assert (await peer.request())[2] == body
    peer.answer()
    assert (await client.response()).status == 200


# -- 100-continue --------------------------------------------------------------------------------------


async def test_a_client_that_asks_first_is_told_to_go_on(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: g\r\nExpect: 100-Continue\r\ncontent-length: {len(BODY)}\r\n\r\n"
    client.send(head.encode())
    assert (await client.response()).status == 100
    client.send(BODY)
    peer = await engine.accept()
    _, headers, body = await peer.request()
    assert body == BODY
    assert "expect" not in headers
    peer.answer()
    assert (await client.response()).status == 200


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_does_not_wait_is_not_told_to_go_on(
    lab: Lab, engine: Engine, version: str
) -> None:
    client = await lab.client()
    fields = f"host: g\r\nexpect: 100-continue\r\ncontent-length: {len(BODY)}\r\n\r\n"
    head = f"POST {CHAT} HTTP/{version}\r\n{fields}".encode()
    if version == "1.1":
        client.send(head + BODY)
    else:
        # HTTP/1.0 knows no interim response, however it asks.
        client.send(head)
        await eventually(lambda: [c for c in lab.server.connections if not c.idle])
        client.send(BODY)
    peer = await engine.accept()
    await peer.request()
    peer.answer()
    assert (await client.response()).status == 200


# -- waiting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"GET /health HTTP/1.1\r\nhost", id="half a head"),
        pytest.param(b"POST /health HTTP/1.1\r\nhost: g\r\ncontent-length: 9\r\n\r\nha", id="half a body"),
        pytest.param(
            f"POST {CHAT} HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab".encode(),
            id="half a chunk",
        ),
    ],
)
async def test_a_request_that_does_not_arrive_in_time_is_a_408(lab_of: LabOf, sent: bytes) -> None:
    lab = await lab_of(header_timeout=0.2)
    client = await lab.client()
    client.send(sent)
    response = await refused(client)
    assert (response.status, response.error["code"]) == (408, "request_timeout")


async def test_a_body_that_comes_in_time_piece_by_piece_is_too_slow_as_a_whole(lab_of: LabOf) -> None:
    lab = await lab_of(body_timeout=0.5)
    client = await lab.client()
    client.send(f"POST {CHAT} HTTP/1.1\r\nhost: g\r\ncontent-length: 100000\r\n\r\n".encode())
    response = asyncio.ensure_future(refused(client))

    def answered() -> bool:
        client.send(b"x")
        return response.done()

    await eventually(answered)
    assert ((await response).status, (await response).error["code"]) == (408, "request_timeout")


async def test_the_time_of_a_body_ends_with_it(lab_of: LabOf) -> None:
    lab = await lab_of(body_timeout=0.2)
    client, peer = await lab.exchange(await lab.engine())
    slow = await lab.client()
    slow.send(b"POST /health HTTP/1.1\r\nhost: g\r\ncontent-length: 9\r\n\r\nha")
    # By then the first one's time would be over too.
    assert (await refused(slow)).status == 408
    peer.answer(b"late")
    assert (await client.response()).body == b"late"


async def test_clients_beyond_the_limit_are_closed_without_an_answer_until_one_leaves(lab_of: LabOf) -> None:
    lab = await lab_of(connection_limit=2)
    clients = [await lab.client() for _ in range(2)]
    for client in clients:
        client.send(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
        assert (await client.response()).status == 200
    assert await (await lab.client()).rest() == b""
    assert lab.metric("penstock_ingress_connections_refused_total") == 1
    clients.pop().close()
    await eventually(lambda: lab.metric("penstock_ingress_connections") == 1)
    assert (await ask(lab, "GET", "/health")).status == 200


def test_the_connections_of_all_workers_count_against_the_limit() -> None:
    with counts_file(3) as file:
        parent, *workers = (SharedCounts(file.fileno(), 3, index) for index in (0, 0, 1, 2))
        for worker in workers:
            worker.own(2)
        metrics = Metrics()
        last = ConnectionLimit(workers[2], 6, metrics, lambda: 0.0)
        assert not last.allows_one_more()
        last.holds(1)
        assert last.allows_one_more()
        last.holds(2)
        parent.clear(0)
        assert last.allows_one_more()
        assert parent.total() == 4


async def test_a_client_that_says_nothing_is_closed_without_an_answer(lab_of: LabOf) -> None:
    lab = await lab_of(header_timeout=0.2)
    assert await (await lab.client()).rest() == b""


async def test_a_connection_that_stands_idle_is_closed(lab_of: LabOf) -> None:
    lab = await lab_of(idle_timeout=0.2)
    client = await lab.client()
    client.send(b"GET /health HTTP/1.1\r\nhost: g\r\n\r\n")
    await client.response()
    assert await client.rest() == b""


async def test_the_idle_timeout_does_not_end_a_request_under_way(lab_of: LabOf) -> None:
    lab = await lab_of(idle_timeout=0.1, header_timeout=0.1)
    client, peer = await lab.exchange(await lab.engine())
    assert await (await lab.client()).rest() == b""
    peer.answer(b"late")
    assert (await client.response()).body == b"late"
