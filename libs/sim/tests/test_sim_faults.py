"""Faults: how they are asked for, and what a client sees of each."""

import asyncio
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
import pytest

from penstock.sim.faults import Fault, FaultBook, FaultError, parse_body, parse_header
from penstock.sim.spec import EngineSpec
from penstock.sim.text import expected_text

# `Client` and `Start` of conftest.py, which tests cannot import.
Client = Any
Start = Any

CHAT = "/v1/chat/completions"
INSTANT = EngineSpec(prefill_tokens_per_s=1e15, decode_step_s=0.0, decode_step_per_seq_s=0.0)


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ("500", Fault("500")),
        ("drop-mid-stream;tokens=3", Fault("drop-mid-stream", tokens=3)),
        (" slow-start ; ms = 20 ", Fault("slow-start", ms=20)),
        ("drop-mid-stream;reset=true;tokens=0", Fault("drop-mid-stream", reset=True, tokens=0)),
    ],
)
def test_a_header_names_a_fault_and_its_parameters(header: str, fault: Fault) -> None:
    assert parse_header(header) == fault


@pytest.mark.parametrize(
    "header", ["", "explode", "500;what=1", "slow-start;ms=soon", "slow-start;ms=-1", ";;"]
)
def test_a_header_that_is_not_understood_is_an_error(header: str) -> None:
    with pytest.raises(FaultError):
        parse_header(header)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"kind": "explode"}',
        b'{"kind": "500", "count": 0}',
        b'{"kind": "500", "a": 1}',
        b"\xff",
    ],
)
def test_a_body_that_is_not_understood_is_an_error(body: bytes) -> None:
    with pytest.raises(FaultError):
        parse_body(body)


def test_faults_strike_in_order_as_often_as_they_say() -> None:
    book = FaultBook()
    book.arm(Fault("429", count=2))
    book.arm(Fault("500"))
    struck = [book.take("/v1/completions", generates=True) for _ in range(4)]
    assert [fault and fault.kind for fault in struck] == ["429", "429", "500", "500"]
    book.clear()
    assert book.take("/v1/completions", generates=True) is None


def test_a_fault_strikes_its_path_only_and_without_one_generation_only() -> None:
    book = FaultBook()
    book.arm(Fault("500", path="/health"))
    book.arm(Fault("429"))
    kinds = [
        fault and fault.kind
        for fault in (
            book.take("/health", generates=False),
            book.take("/v1/models", generates=False),
            book.take("/v1/completions", generates=True),
        )
    ]
    assert kinds == ["500", None, "429"]


def test_a_fault_in_mid_stream_does_not_strike_what_is_no_stream() -> None:
    book = FaultBook()
    book.arm(Fault("drop-mid-stream", path="/health"))
    assert book.take("/health", generates=False) is None


def test_armed_faults_are_bounded() -> None:
    book = FaultBook()
    for _ in range(64):
        book.arm(Fault("500"))
    with pytest.raises(FaultError, match="64 faults"):
        book.arm(Fault("500"))


def raw_chat(body: dict[str, Any], fault: str) -> bytes:
    data = msgspec.json.encode(body)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: a\r\nx-sim-fault: {fault}\r\nContent-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


@pytest.mark.parametrize(("fault", "status"), [("429", 429), ("500", 500)])
async def test_error_answers(client: Client, chat_body: Any, fault: str, status: int) -> None:
    async with client.stream(CHAT, chat_body, x_sim_fault=fault) as response:
        assert response.status == status
        assert (await response.json())["error"]["code"] == status
        assert ("Retry-After" in response.headers) == (status == 429)


async def test_an_armed_fault_strikes_its_count_of_requests(client: Client, chat_body: Any) -> None:
    status, armed = await client.post("/sim/fault", {"kind": "500", "count": 2})
    assert (status, armed["kind"], armed["count"]) == (200, "500", 2)
    assert [(await client.post(CHAT, chat_body))[0] for _ in range(3)] == [500, 500, 200]


async def test_a_fault_without_count_lasts_until_it_is_cleared(client: Client, chat_body: Any) -> None:
    await client.post("/sim/fault", {"kind": "429"})
    assert [(await client.post(CHAT, chat_body))[0] for _ in range(3)] == [429, 429, 429]
    async with client.session.delete(client.url + "/sim/fault") as response:
        assert response.status == 204
    assert (await client.post(CHAT, chat_body))[0] == 200


async def test_a_fault_can_strike_the_health_check(client: Client, chat_body: Any) -> None:
    await client.post("/sim/fault", {"kind": "500", "path": "/health", "count": 1})
    assert (await client.post(CHAT, chat_body))[0] == 200
    async with client.session.get(client.url + "/health") as response:
        assert response.status == 500
    assert await client.text("/health") == ""


async def test_a_slow_start_answers_in_the_end(client: Client, chat_body: Any) -> None:
    status, answer = await client.post(CHAT, chat_body, x_sim_fault="slow-start;ms=20")
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == expected_text(chat_body["messages"], 8)


@pytest.mark.parametrize("fault", ["refuse", "drop-before-headers", "drop-before-headers;reset=true"])
async def test_a_connection_can_close_before_any_byte(client: Client, chat_body: Any, fault: str) -> None:
    try:
        answer = await client.raw(raw_chat(chat_body, fault))
    except ConnectionResetError:
        assert "reset" in fault
    else:
        assert answer == b""
    state = await client.eventually(open=0, running=0)
    assert (state["requests_total"], state["aborted"]) == (1, 0)


async def test_garbage_is_no_http(client: Client, chat_body: Any) -> None:
    answer = await client.raw(raw_chat(chat_body, "garbage"))
    assert answer
    assert not answer.startswith(b"HTTP/")
    with pytest.raises(aiohttp.ClientError):
        await client.post(CHAT, chat_body, x_sim_fault="garbage")
    await client.eventually(open=0, running=0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_hang_before_headers_holds_the_engine_until_the_client_leaves(
    client: Client, chat_body: Any, stream: bool
) -> None:
    body = chat_body | {"stream": stream}
    asking = asyncio.create_task(client.post(CHAT, body, x_sim_fault="hang-before-headers"))
    await client.eventually(running=1, open=1)
    # Others are served meanwhile.
    assert (await client.post(CHAT, chat_body))[0] == 200
    assert not asking.done()
    asking.cancel()
    await client.eventually(running=0, open=0, aborted=1, kv_blocks_used=0)


async def test_those_behind_a_hung_request_go_on_when_its_client_leaves(start: Start, chat_body: Any) -> None:
    client = await start(replace(INSTANT, max_batch=1))
    hung = asyncio.create_task(client.post(CHAT, chat_body, x_sim_fault="hang-before-headers"))
    await client.eventually(running=1)
    behind = asyncio.create_task(client.post(CHAT, chat_body))
    await client.eventually(waiting=1)
    hung.cancel()
    async with asyncio.timeout(10):
        assert (await behind)[0] == 200


@pytest.mark.parametrize("tokens", [0, 1, 3])
async def test_a_hang_in_mid_stream_comes_after_its_tokens(
    client: Client, chat_body: Any, tokens: int
) -> None:
    fault = f"hang-mid-stream;tokens={tokens}"
    async with client.stream(CHAT, chat_body | {"stream": True}, x_sim_fault=fault) as response:
        assert response.status == 200
        text = b""
        while text.count(b'"delta":{"content"') < tokens:
            text += await response.content.readuntil(b"\n\n")
        await client.eventually(running=1, open=1)
        # Nothing more came in the meantime.
        assert response.content.total_bytes == len(text)
    await client.eventually(running=0, open=0, aborted=1, kv_blocks_used=0)


async def test_a_hang_after_half_of_a_whole_answer(client: Client, chat_body: Any) -> None:
    async with client.stream(CHAT, chat_body, x_sim_fault="hang-mid-stream") as response:
        half = response.content_length // 2
        assert len(await response.content.readexactly(half)) == half
        await client.eventually(open=1)
        assert response.content.total_bytes == half
    await client.eventually(running=0, open=0, aborted=1)


async def test_a_drop_in_mid_stream_comes_after_its_tokens(client: Client, chat_body: Any) -> None:
    body = chat_body | {"stream": True}
    answer = await client.raw(raw_chat(body, "drop-mid-stream;tokens=3"))
    assert answer.count(b'"delta":{"content"') == 3
    assert b"[DONE]" not in answer
    # The chunk that would end the body is missing.
    assert not answer.endswith(b"0\r\n\r\n")
    await client.eventually(running=0, open=0, aborted=0)


async def test_a_drop_in_mid_stream_can_be_a_reset(client: Client, chat_body: Any) -> None:
    body = chat_body | {"stream": True}
    with pytest.raises(ConnectionResetError):
        await client.raw(raw_chat(body, "drop-mid-stream;tokens=3;reset=true"))
    await client.eventually(running=0, open=0)


async def test_a_drop_in_the_middle_of_a_whole_answer(client: Client, chat_body: Any) -> None:
    with pytest.raises(aiohttp.ClientPayloadError):
        await client.post(CHAT, chat_body, x_sim_fault="drop-mid-stream")
    await client.eventually(running=0, open=0)


@pytest.mark.parametrize("stream", [False, True])
async def test_garbage_in_mid_stream_breaks_the_chunks(client: Client, chat_body: Any, stream: bool) -> None:
    answer = await client.raw(raw_chat(chat_body | {"stream": stream}, "garbage-mid-stream"))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"Transfer-Encoding: chunked" in answer
    assert b'{"id":"chatcmpl-' in answer
    # Where the size of the next chunk belongs.
    assert answer.endswith(b"\r\nno chunk size\r\n\xff\xfe\r\n")
    await client.eventually(running=0, open=0)


async def test_a_fault_that_needs_more_tokens_than_there_are_strikes_at_the_end(
    client: Client, chat_body: Any
) -> None:
    answer = await client.raw(raw_chat(chat_body | {"stream": True}, "drop-mid-stream;tokens=99"))
    assert answer.count(b'"delta":{"content"') == 8
    assert b"[DONE]" not in answer


async def test_refusing_closes_the_socket_for_a_while(client: Client, chat_body: Any) -> None:
    # An idle connection is closed with it, as when a process dies.
    idle_reader, idle_writer = await asyncio.open_connection(client.instance.host, client.instance.port)
    status, _ = await client.post("/sim/fault", {"kind": "refuse", "ms": 700})
    assert status == 200
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(client.instance.host, client.instance.port)
    async with asyncio.timeout(10):
        assert await idle_reader.read() == b""
    idle_writer.close()
    async with asyncio.timeout(10):
        while True:
            try:
                status, _ = await client.post(CHAT, chat_body)
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.01)
            else:
                break
    assert status == 200


async def test_a_stream_goes_on_while_others_are_refused(slow: Client, chat_body: Any) -> None:
    async with slow.stream(CHAT, chat_body | {"stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        await slow.post("/sim/fault", {"kind": "refuse", "ms": 200})
        assert not response.content.at_eof()
        assert slow.instance.engine.running == 1


async def test_an_instance_stops_while_it_refuses(start: Start) -> None:
    client = await start()
    await client.post("/sim/fault", {"kind": "refuse", "ms": 3_600_000})
    await client.instance.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection(client.instance.host, client.instance.port)


async def test_an_unknown_fault_is_a_400(client: Client, chat_body: Any) -> None:
    assert (await client.post("/sim/fault", {"kind": "explode"}))[0] == 400
    assert (await client.post(CHAT, chat_body, x_sim_fault="explode"))[0] == 400
    await client.eventually(open=0)
