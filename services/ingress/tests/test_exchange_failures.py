"""Instances that refuse, die, stall or answer nonsense: the request moves, or ends in one clear way."""

import json
import socket
from typing import Any

import pytest

from .conftest import LabOf
from .ingress_lab import BODY, CHAT, HOST, Engine, Lab, Peer

SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def dead_port() -> int:
    """A port that refuses connections."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def event_error(data: bytes) -> dict[str, Any]:
    """The error object of a last event."""
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    error: dict[str, Any] = json.loads(data[6:])["error"]
    return error


# -- no connection -------------------------------------------------------------------------------------


async def test_a_refused_connection_moves_the_request_to_another_instance_at_once(lab: Lab) -> None:
    lab.instance("a", dead_port())
    engine = await lab.engine("b")
    client, peer = await lab.exchange(engine)
    peer.answer(b"moved")
    response = await client.response()
    assert (response.body, response.headers["target-pod"]) == (b"moved", "b")
    assert [request.excluded for request in lab.scheduler.requests] == [(), ("a",)]
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["attempts"], len(outcome["decisions"])) == ("completed", 2, 2)
    assert lab.metric("penstock_ingress_moves_total", "connection") == 1


async def test_a_request_moves_at_most_twice_because_of_refused_connections(lab: Lab) -> None:
    for name in "abcd":
        lab.instance(name, dead_port())
    client = await lab.client()
    response = await client.ask()
    assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
    assert "instance c: Connection refused" in response.error["message"]
    assert [request.excluded for request in lab.scheduler.requests] == [(), ("a",), ("a", "b")]
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["status"], outcome["attempts"]) == ("failed", 502, 3)


async def test_retries_come_on_top_of_the_two_moves(lab_of: LabOf) -> None:
    lab = await lab_of(retry_max_count=1)
    for name in "abcde":
        lab.instance(name, dead_port())
    assert (await (await lab.client()).ask()).status == 502
    assert (await lab.outcome())["attempts"] == 4


async def test_a_failed_connection_is_the_answer_when_there_is_no_other_instance(lab: Lab) -> None:
    lab.instance("a", dead_port())
    response = await (await lab.client()).ask()
    assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
    assert "instance a: Connection refused" in response.error["message"]
    assert (await lab.outcome())["outcome"] == "failed"


@pytest.mark.parametrize("host", ["", "a\r\nx: y", "a" * 300, "\xe4..b"])
async def test_an_endpoint_that_cannot_be_an_address_is_a_refused_connection(lab: Lab, host: str) -> None:
    lab.instance("a", 80, host=host)
    client, peer = await lab.exchange(await lab.engine("b"))
    peer.answer(b"moved")
    assert (await client.response()).body == b"moved"


async def test_a_connection_that_is_not_made_in_time_moves_the_request(lab_of: LabOf, deaf_port: int) -> None:
    lab = await lab_of(connect_timeout=0.2)
    lab.instance("a", deaf_port)
    client, peer = await lab.exchange(await lab.engine("b"))
    peer.answer(b"moved")
    assert (await client.response()).body == b"moved"


async def test_more_connections_than_the_bound_are_a_503(lab_of: LabOf) -> None:
    lab = await lab_of(backend_max_connections=1, backend_max_pending_requests=0)
    first, peer = await lab.exchange(await lab.engine())
    response = await (await lab.client()).ask()
    assert (response.status, response.error["code"]) == (503, "overloaded")
    assert response.headers["retry-after"] == "1"
    peer.answer()
    assert (await first.response()).status == 200
    outcomes = await lab.settled()
    assert sorted(outcome["outcome"] for outcome in outcomes) == ["completed", "rejected"]


# -- pooled connections --------------------------------------------------------------------------------


async def pooled(lab: Lab, engine: Engine) -> tuple[Peer, Peer]:
    """A client that was answered once, and the engine's end of the connection that was kept."""
    client, peer = await lab.exchange(engine)
    peer.answer()
    await client.response()
    return client, peer


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_a_pooled_connection_found_dead_moves_the_request_to_another_instance(
    lab: Lab, end: str
) -> None:
    first, second = await lab.engine("a"), await lab.engine("b")
    client, peer = await pooled(lab, first)
    client.post()
    await peer.request()
    getattr(peer, end)()
    other = await second.accept()
    assert (await other.request())[2] == BODY
    other.answer(b"moved")
    assert (await client.response()).body == b"moved"
    assert lab.scheduler.requests[-1].excluded == ("a",)
    assert (await lab.settled())[-1]["attempts"] == 2


async def test_a_lone_instance_whose_pooled_connection_died_is_asked_on_a_fresh_one(lab: Lab) -> None:
    engine = await lab.engine("a")
    client, peer = await pooled(lab, engine)
    client.post()
    await peer.request()
    peer.close()
    fresh = await engine.accept()
    await fresh.request()
    fresh.answer(b"again")
    assert (await client.response()).body == b"again"


async def test_a_lone_instance_with_many_dead_pooled_connections_is_asked_on_a_fresh_one(lab: Lab) -> None:
    engine = await lab.engine("a")
    pairs = [await lab.exchange(engine) for _ in range(5)]
    for client, peer in pairs:
        peer.answer()
        await client.response()
    client = pairs[0][0]
    client.post()
    # The one used last is taken; the others would have died the same way.
    await pairs[-1][1].request()
    pairs[-1][1].close()
    fresh = await engine.accept()
    await fresh.request()
    fresh.answer(b"again")
    assert (await client.response()).body == b"again"
    assert engine.connections == 6
    for _, peer in pairs:
        await peer.gone()


async def test_a_pooled_connection_that_dies_after_a_first_byte_is_no_free_move(lab: Lab) -> None:
    engine = await lab.engine("a")
    await lab.engine("b")
    client, peer = await pooled(lab, engine)
    client.post()
    await peer.request()
    peer.send(b"HTTP/1.1 2")
    peer.close()
    assert (await client.response()).status == 502


# -- before the head -----------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_an_instance_that_dies_before_its_answer_is_a_502(lab: Lab, end: str) -> None:
    engine, spare = await lab.engine("a"), await lab.engine("b")
    client, peer = await lab.exchange(engine)
    getattr(peer, end)()
    response = await client.response()
    assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
    assert (response.error["type"], response.error["param"]) == ("api_error", None)
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["attempts"], spare.connections) == ("failed", 1, 0)
    # The client's connection is not to blame.
    client.post()
    second = await engine.accept()
    await second.request()
    second.answer()
    assert (await client.response()).status == 200


async def test_with_a_retry_another_instance_is_asked_and_the_failed_one_excluded(lab_of: LabOf) -> None:
    lab = await lab_of(retry_max_count=1)
    first, second = await lab.engine("a"), await lab.engine("b")
    client, peer = await lab.exchange(first)
    peer.close()
    other = await second.accept()
    assert (await other.request())[2] == BODY
    other.answer(b"retried")
    assert (await client.response()).body == b"retried"
    assert [request.excluded for request in lab.scheduler.requests] == [(), ("a",)]
    assert len({request.decision_id for request in lab.scheduler.requests}) == 2
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["attempts"], outcome["instance"]) == ("completed", 2, "b")
    assert lab.metric("penstock_ingress_moves_total", "retry") == 1


async def test_the_last_failure_is_the_answer_when_retries_are_used_up(lab_of: LabOf) -> None:
    lab = await lab_of(retry_max_count=1)
    engines = [await lab.engine(name) for name in "abc"]
    client, peer = await lab.exchange(engines[0])
    peer.close()
    other = await engines[1].accept()
    await other.request()
    other.send(b"garbage\r\n\r\n")
    response = await client.response()
    assert response.status == 502
    assert "instance b: it broke HTTP" in response.error["message"]
    assert engines[2].connections == 0


async def test_an_error_of_the_instance_is_relayed_as_it_came(lab: Lab, engine: Engine) -> None:
    await lab.engine("spare")
    client, peer = await lab.exchange(engine)
    peer.answer(b"<traceback>", "500 Oh No", "retry-after: 7")
    response = await client.response()
    assert (response.status, response.body, response.headers["retry-after"]) == (500, b"<traceback>", "7")
    assert (await lab.outcome())["status"] == 500


async def test_with_a_retry_a_500_is_asked_elsewhere_and_the_second_one_relayed(lab_of: LabOf) -> None:
    lab = await lab_of(retry_max_count=1)
    first, second = await lab.engine("a"), await lab.engine("b")
    client, peer = await lab.exchange(first)
    peer.answer(b"first", "500 Oh No")
    other = await second.accept()
    await other.request()
    other.answer(b"second", "503 Busy")
    response = await client.response()
    assert (response.status, response.body) == (503, b"second")
    assert (await lab.outcome())["attempts"] == 2


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "429 Too Many Requests"])
async def test_a_4xx_is_no_reason_to_retry(lab_of: LabOf, status: str) -> None:
    lab = await lab_of(retry_max_count=3)
    client, peer = await lab.exchange(await lab.engine("a"))
    peer.answer(b"your fault", status)
    assert (await client.response()).body == b"your fault"
    assert (await lab.outcome())["attempts"] == 1


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"\x00\x01\x02\r\n\r\n", id="bytes"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n\r\n", id="another protocol"),
        pytest.param(b"HTTP/1.1 200 OK\ncontent-length: 2\n\nok\r\n\r\n", id="bare LF"),
        pytest.param(b"HTTP/1.1 200 OK\r\nset-cookie: a\r\n b\r\n\r\n", id="folded"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n", id="two lengths"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok", id="two framings"
        ),
        pytest.param(b"HTTP/1.1 101 Switching\r\nupgrade: x\r\n\r\n", id="101"),
        pytest.param(b"HTTP/1.1 102 Processing\r\n\r\n" * 9, id="interim responses without end"),
        pytest.param(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000 + b"\r\n\r\n", id="huge head"),
        pytest.param(b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000, id="head without end"),
    ],
)
async def test_an_instance_that_does_not_speak_http_is_a_502(
    lab: Lab, engine: Engine, garbage: bytes
) -> None:
    client, peer = await lab.exchange(engine)
    peer.send(garbage)
    response = await client.response()
    assert (response.status, response.error["code"]) == (502, "upstream_unreachable")
    await peer.gone()
    assert (await lab.outcome())["outcome"] == "failed"
    assert lab.metric("penstock_ingress_upstream_bad_framing_total") == 1


async def test_an_instance_that_does_not_answer_in_time_is_a_504(lab_of: LabOf) -> None:
    lab = await lab_of(request_timeout=0.2, retry_max_count=3)
    client, peer = await lab.exchange(await lab.engine("a"))
    peer.send(b"HTTP/1.1 200 OK\r\n")
    response = await client.response()
    assert (response.status, response.error["code"]) == (504, "upstream_timeout")
    assert "0.2 s" in response.error["message"]
    await peer.gone()
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["status"]) == ("timed_out", 504)


# -- after the head ------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "reset"])
async def test_a_stream_whose_instance_dies_ends_with_an_error_event(
    lab: Lab, engine: Engine, end: str
) -> None:
    client, peer = await lab.exchange(engine)
    peer.begin_stream()
    await client.until(peer.event("one"))
    getattr(peer, end)()
    size = int(await client.until(b"\r\n"), 16)
    error = event_error(await client.exactly(size))
    assert (error["code"], error["type"]) == ("upstream_unreachable", "api_error")
    assert await client.exactly(7) == b"\r\n0\r\n\r\n"
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["status"], outcome["chunks"]) == ("failed", 200, 1)


async def test_a_stream_whose_instance_dies_before_the_first_event_ends_with_an_error_event(
    lab: Lab, engine: Engine
) -> None:
    client, peer = await lab.exchange(engine)
    peer.begin_stream()
    await client.head()
    peer.close()
    size = int(await client.until(b"\r\n"), 16)
    assert event_error(await client.exactly(size))["code"] == "upstream_unreachable"


async def test_a_fault_of_the_gateway_in_the_middle_of_a_response_adds_nothing_to_it(
    lab: Lab, engine: Engine
) -> None:
    client, peer = await lab.exchange(engine)
    peer.begin_stream()
    await client.until(peer.event("one"))
    (exchange,) = lab.gateway.exchanges
    exchange.broken()
    with pytest.raises(ConnectionError):
        await client.reader.read()
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["status"]) == ("failed", 200)


async def test_a_stream_with_crlf_lines_ends_with_an_error_event_too(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    peer.begin_stream()
    peer.send(b"b\r\ndata: 1\r\n\r\n\r\n")
    await client.until(b"1\r\n\r\n\r\n")
    peer.close()
    size = int(await client.until(b"\r\n"), 16)
    assert event_error(await client.exactly(size))["code"] == "upstream_unreachable"


async def test_a_stream_without_chunks_ends_with_an_error_event(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    peer.send(SSE_HEAD + b"\r\ndata: 1\n\n")
    await client.until(b"data: 1\n\n")
    peer.reset()
    assert event_error(await client.rest())["code"] == "upstream_unreachable"


async def test_a_stream_to_an_http_1_0_client_ends_with_an_error_event(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.send(f"POST {CHAT} HTTP/1.0\r\ncontent-length: {len(BODY)}\r\n\r\n".encode() + BODY)
    peer = await engine.accept()
    await peer.request()
    peer.begin_stream()
    peer.event("one")
    await client.until(b"data: one\n\n")
    peer.close()
    assert event_error(await client.rest())["code"] == "upstream_unreachable"


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(b"20\r\ndata: ha", id="in a chunk"),
        pytest.param(b"9\r\ndata: one\r\n", id="in an event, between chunks"),
        pytest.param(b"a\r\ndata: one\n\r\n", id="between the lines of an event"),
        pytest.param(b"b\r\ndata: one\n\n\r", id="in the end of a chunk"),
        pytest.param(b"9\r\ndata: one\r\n1", id="in a size, in an event"),
    ],
)
async def test_a_stream_cut_inside_an_event_is_broken_off(lab: Lab, engine: Engine, sent: bytes) -> None:
    client, peer = await lab.exchange(engine)
    peer.begin_stream()
    await client.head()
    peer.send(sent)
    await client.until(b"data: ")
    peer.close()
    try:
        assert b"error" not in await client.rest()
    except ConnectionResetError:
        pass
    assert (await lab.outcome())["outcome"] == "failed"


@pytest.mark.parametrize(
    "head",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n", id="plain"),
        pytest.param(SSE_HEAD + b"content-length: 50\r\n\r\n", id="events with a length"),
        pytest.param(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n", id="until close"),
    ],
)
async def test_a_plain_response_whose_instance_dies_is_broken_off(
    lab: Lab, engine: Engine, head: bytes
) -> None:
    client, peer = await lab.exchange(engine)
    peer.send(head + b"half\n\n")
    await client.until(b"half\n\n")
    peer.reset()
    with pytest.raises(ConnectionResetError):
        await client.rest()
    assert (await lab.outcome())["outcome"] == "failed"


async def test_an_http_1_0_client_sees_that_a_chunked_response_was_cut(lab: Lab, engine: Engine) -> None:
    client = await lab.client()
    client.send(f"POST {CHAT} HTTP/1.0\r\ncontent-length: {len(BODY)}\r\n\r\n".encode() + BODY)
    peer = await engine.accept()
    await peer.request()
    peer.send(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n")
    await client.until(b"hello")
    peer.close()
    with pytest.raises(ConnectionResetError):
        await client.rest()


async def test_nothing_of_a_broken_chunk_reaches_the_client(lab: Lab, engine: Engine) -> None:
    client, peer = await lab.exchange(engine)
    peer.begin_stream()
    await client.until(peer.event("one"))
    peer.send(b"5\r\nhelloEVIL\r\n")
    await peer.gone()
    size = int(await client.until(b"\r\n"), 16)
    assert event_error(await client.exactly(size))["code"] == "upstream_unreachable"
    assert await client.exactly(7) == b"\r\n0\r\n\r\n"


async def test_a_stream_that_falls_silent_ends_with_an_error_event(lab_of: LabOf) -> None:
    lab = await lab_of(stream_idle_timeout=0.2)
    client, peer = await lab.exchange(await lab.engine())
    peer.begin_stream()
    await client.until(peer.event("one"))
    size = int(await client.until(b"\r\n"), 16)
    error = event_error(await client.exactly(size))
    assert (error["code"], error["message"]) == ("upstream_timeout", "the instance sent nothing for 0.2 s")
    assert await client.exactly(7) == b"\r\n0\r\n\r\n"
    await peer.gone()
    outcome = await lab.outcome()
    assert (outcome["outcome"], outcome["status"]) == ("timed_out", 200)


async def test_a_plain_response_that_falls_silent_is_broken_off(lab_of: LabOf) -> None:
    lab = await lab_of(stream_idle_timeout=0.2)
    client, peer = await lab.exchange(await lab.engine())
    peer.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
    await client.until(b"half")
    with pytest.raises(ConnectionResetError):
        await client.rest()
    assert (await lab.outcome())["outcome"] == "timed_out"


async def test_the_request_timeout_ends_with_the_head_of_the_response(lab_of: LabOf) -> None:
    lab = await lab_of(request_timeout=0.2)
    engine = await lab.engine()
    client, peer = await lab.exchange(engine)
    peer.begin_stream()
    await client.head()
    # Another request, begun later, runs into its timeout.
    late, _ = await lab.exchange(engine)
    assert (await late.response()).status == 504
    await client.until(peer.event("still here"))
    peer.send(b"0\r\n\r\n")
    assert await client.exactly(5) == b"0\r\n\r\n"
