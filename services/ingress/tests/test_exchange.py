"""Requests are relayed to instances and responses back, byte for byte, as they come."""

import json
import tracemalloc

import pytest
from integration.servers import eventually

from .conftest import LabOf
from .ingress_lab import BODY, CHAT, MODEL, STREAM_BODY, Engine, Lab

JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


async def test_a_plain_request_and_its_response_are_relayed_byte_for_byte(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.post(BODY, CHAT + "?x=1", Authorization="Bearer k", X_Custom=" \xe4  b ")
    peer = await engine.accept()
    first, headers, raw = await peer.head()
    assert first == f"POST {CHAT}?x=1 HTTP/1.1"
    assert b"\r\nX-Custom:  \xe4  b \r\n" in raw
    assert headers["host"] == f"127.0.0.1:{engine.port}"
    assert headers["authorization"] == "Bearer k"
    assert await peer.exactly(int(headers["content-length"])) == BODY
    body = bytes(range(256)) * 10
    peer.answer(body, "201 Made Up", "X-Engine: \xe4", "connection: x-private", "x-private: 1")
    response = await client.response()
    assert response.wire.startswith(b"HTTP/1.1 201 Made Up\r\n")
    assert (response.body, response.headers["x-engine"]) == (body, "\xc3\xa4")
    assert "x-private" not in response.headers
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["status"], outcome["model"]) == ("completed", 201, MODEL)
    assert (outcome["instance"], outcome["attempts"], outcome["bytes_out"]) == ("e1", 1, 2560)


async def test_a_stream_is_relayed_event_by_event_with_its_framing(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.post(STREAM_BODY)
    peer = await engine.accept()
    await peer.request()
    peer.begin_stream()
    _, headers, _ = await client.head()
    assert (headers["content-type"], headers["transfer-encoding"]) == ("text/event-stream", "chunked")
    for number in range(5):
        # The next event is sent only after this one has come through.
        wire = peer.event(f"token {number}")
        assert await client.exactly(len(wire)) == wire
    peer.send(b"0\r\nx-trailer: 1\r\n\r\n")
    assert await client.exactly(5) == b"0\r\n\r\n"
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["stream"], outcome["chunks"]) == ("completed", True, 5)


async def test_a_part_of_a_chunk_is_relayed_before_the_rest_is_there(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    peer.begin_stream()
    await client.head()
    for part in (b"a;ext=1\r\nhe", b"llo", b" wor", b"l\r\n"):
        peer.send(part)
        assert await client.exactly(len(part)) == part
    peer.send(b"0\r\n\r\n")
    assert await client.exactly(5) == b"0\r\n\r\n"


@pytest.mark.parametrize("size", [0, 1, 40_000, 3_000_000])
async def test_requests_of_any_size_arrive_whole(lab: Lab, engine: Engine, size: int) -> None:
    body = json.dumps({"model": MODEL, "messages": ["x" * size]}).encode()
    client = await lab.client()
    client.post(body)
    peer = await engine.accept()
    assert (await peer.request())[2] == body
    peer.answer()
    assert (await client.response()).status == 200


async def test_a_chunked_request_reaches_the_instance_with_a_length(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.send(f"POST {CHAT} HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n".encode())
    for part in (BODY[:10], BODY[10:]):
        client.send(b"%x;x\r\n%b\r\n" % (len(part), part))
    client.send(b"0\r\nx-trailer: 1\r\n\r\n")
    peer = await engine.accept()
    _, headers, body = await peer.request()
    assert body == BODY
    assert "transfer-encoding" not in headers
    peer.answer()
    assert (await client.response()).status == 200


async def test_a_response_without_length_is_relayed_until_the_instance_closes(
    lab: Lab, engine: Engine
) -> None:
    client, peer = await lab.exchange(engine)
    peer.send(JSON_HEAD + b"\r\nfirst ")
    _, headers, _ = await client.head()
    assert headers["connection"] == "close"
    assert await client.exactly(6) == b"first "
    peer.send(b"second")
    peer.close()
    assert await client.rest() == b"second"
    assert (await lab.outcome())["outcome"] == "completed"


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_a_response_that_has_no_body_ends_with_its_head(lab: Lab, engine: Engine, status: str) -> None:
    client, peer = await lab.exchange(engine)
    peer.send(f"HTTP/1.1 {status}\r\nx: 1\r\n\r\n".encode())
    assert (await client.response()).body == b""
    client.post()
    await peer.request()
    peer.answer(b"next")
    assert (await client.response()).body == b"next"


async def test_interim_responses_are_not_taken_for_the_response(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    peer.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n")
    peer.answer(b"body")
    response = await client.response()
    assert (response.status, response.body) == (200, b"body")


async def test_a_response_that_comes_byte_by_byte_is_the_same(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    for byte in JSON_HEAD + b"content-length: 5\r\n\r\nhello":
        peer.send(bytes([byte]))
        await peer.writer.drain()
    assert (await client.response()).body == b"hello"


async def test_connections_to_an_instance_are_used_again(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    for number in range(3):
        peer.answer(b"%d" % number)
        assert (await client.response()).body == b"%d" % number
        client.post()
        await peer.request()
    peer.answer()
    assert (await client.response()).status == 200
    assert engine.connections == 1
    assert lab.metric("penstock_ingress_upstream_connections", "idle") == 1


@pytest.mark.parametrize(
    "response",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok", id="says close"),
        pytest.param(b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok", id="HTTP/1.0"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\n\r\n", id="more bytes"
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 200",
            id="more bytes after the last chunk",
        ),
        pytest.param(b"HTTP/1.1 204 x\r\ncontent-length: 7\r\n\r\n", id="204 that announces a body"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\nX", id="body after none"),
    ],
)
async def test_a_connection_that_may_not_be_clean_is_not_used_again(
    lab: Lab, engine: Engine, response: bytes
) -> None:
    client, peer = await lab.exchange(engine)
    peer.send(response)
    assert (await client.response()).body in (b"ok", b"")
    await peer.gone()
    client.post()
    second = await engine.accept()
    await second.request()
    second.answer(b"second")
    assert (await client.response()).body == b"second"


async def test_an_idle_connection_that_speaks_is_closed_and_its_words_are_nobodys(
    lab: Lab, engine: Engine
) -> None:
    client, peer = await lab.exchange(engine)
    peer.answer()
    await client.response()
    peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil")
    await peer.gone()
    client.post()
    second = await engine.accept()
    await second.request()
    second.answer(b"good")
    assert (await client.response()).body == b"good"


async def test_an_instance_that_answers_before_it_has_read_the_request_loses_its_connection(
    lab_of: LabOf,
) -> None:
    lab = await lab_of(buffer_limit=32 * 2**20)
    engine, client = await lab.engine(), await lab.client()
    # More than the kernel takes for a reader that does not read.
    client.post(json.dumps({"model": MODEL, "messages": ["x" * 24_000_000]}).encode())
    peer = await engine.accept()
    await peer.head()
    peer.answer(b"no", "400 Bad Request")
    assert (await client.response()).body == b"no"
    await peer.gone()


async def test_idle_connections_to_instances_are_closed_in_time(lab_of: LabOf) -> None:
    lab = await lab_of(upstream_idle_timeout=0.2)
    engine = await lab.engine()
    client, peer = await lab.exchange(engine)
    peer.answer()
    await client.response()
    assert await peer.rest() == b""


async def test_http_1_0_clients_get_a_chunked_response_without_its_framing(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.send(f"POST {CHAT} HTTP/1.0\r\ncontent-length: {len(BODY)}\r\n\r\n".encode() + BODY)
    peer = await engine.accept()
    assert (await peer.request())[0].endswith("HTTP/1.1")
    peer.begin_stream()
    _, headers, _ = await client.head()
    assert headers["connection"] == "close"
    assert "transfer-encoding" not in headers
    for part in (b"5\r\n", b"hel", b"lo\r", b"\n1;x\r\n", b" \r\n5\r\nworld\r\n"):
        peer.send(part)
        await peer.writer.drain()
    peer.send(b"0\r\n\r\n")
    assert await client.rest() == b"hello world"
    assert (await lab.outcome())["outcome"] == "completed"


async def test_a_client_is_told_where_its_request_went(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    peer.answer(b"", "200 OK", "target-pod: forged", "routing-strategy: forged", "x-request-id: forged")
    response = await client.response()
    assert response.wire.count(b"forged") == 0
    assert response.headers["target-pod"] == "e1"
    assert response.headers["target-pod-ip"] == f"127.0.0.1:{engine.port}"
    assert response.headers["routing-strategy"] == "first"


async def test_routing_headers_can_be_hidden(lab_of: LabOf) -> None:
    lab = await lab_of(expose_routing_headers=False)
    client, peer = await lab.exchange(await lab.engine())
    peer.answer(b"", "200 OK", "target-pod: forged")
    response = await client.response()
    assert not {"target-pod", "target-pod-ip", "routing-strategy"} & set(response.headers)
    assert response.headers["x-request-id"]


async def test_a_name_from_the_bus_cannot_end_a_header_line(lab: Lab) -> None:
    engine = await lab.engine("evil\r\nset-cookie: a=b\xe4")
    client, peer = await lab.exchange(engine)
    peer.answer()
    response = await client.response()
    assert response.headers["target-pod"] == "evil??set-cookie:?a=b?"
    assert "set-cookie" not in response.headers


@pytest.mark.parametrize("given", ["a", "req-1.2:3_4", "x" * 128])
async def test_a_sane_request_id_is_kept(lab: Lab, engine: Engine, given: str) -> None:
    client = await lab.client()
    client.post(x_request_id=given)
    peer = await engine.accept()
    assert (await peer.request())[1]["x-request-id"] == given
    peer.answer()
    assert (await client.response()).headers["x-request-id"] == given
    assert (await lab.outcome())["request_id"] == given


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a/../b", "id;drop", "\xe4", "{}"])
async def test_another_request_id_is_replaced_by_one_of_ours(lab: Lab, engine: Engine, given: str) -> None:
    client = await lab.client()
    client.post(x_request_id=given)
    peer = await engine.accept()
    made = (await peer.request())[1]["x-request-id"]
    peer.answer()
    assert (await client.response()).headers["x-request-id"] == made == "lab-1-1"


async def test_usage_is_read_into_the_outcome(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.post(STREAM_BODY)
    peer = await engine.accept()
    await peer.request()
    peer.begin_stream()
    peer.event('{"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7}}')
    peer.event("[DONE]")
    peer.send(b"0\r\n\r\n")
    await client.response()
    outcome = await lab.outcome()
    assert (outcome["prompt_tokens"], outcome["completion_tokens"]) == (11, 7)
    assert 0 < outcome["scheduling_ms"] <= outcome["ttft_ms"] <= outcome["e2e_ms"]


async def test_the_access_log_has_one_line_per_request(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    peer.answer(b"12345")
    response = await client.response()
    await eventually(lambda: lab.access_lines)
    (line,) = b"".join(lab.access_lines).splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["status"], entry["bytes_out"]) == ("info", 200, 5)
    assert (entry["request_id"], entry["path"]) == (response.headers["x-request-id"], CHAT)


async def test_a_stream_does_not_hold_its_prompt(lab: Lab, engine: Engine) -> None:
    body = json.dumps({"model": MODEL, "stream": True, "messages": ["x" * 3_000_000]}).encode()
    tracemalloc.start()
    try:
        client = await lab.client()
        before = tracemalloc.get_traced_memory()[0]
        client.post(body)
        peer = await engine.accept()
        await peer.request()
        peer.begin_stream()
        await client.head()
        assert tracemalloc.get_traced_memory()[0] - before < 1_000_000
    finally:
        tracemalloc.stop()
