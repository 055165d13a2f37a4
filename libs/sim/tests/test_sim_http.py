"""The HTTP interface, over real connections and with the official client."""

import asyncio
import socket
from typing import Any

import pytest
from openai import AsyncOpenAI, NotFoundError

from penstock.sim.spec import EngineSpec
from penstock.sim.text import expected_text

# `Client` and `Start` of conftest.py, which tests cannot import.
Client = Any
Start = Any

HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
async def openai(client: Client) -> Any:
    async with AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0) as official:
        yield official


async def test_the_openai_client_gets_the_expected_answer_and_usage(openai: AsyncOpenAI) -> None:
    answer = await openai.chat.completions.create(model="sim-model", messages=HELLO, max_tokens=9)
    assert answer.choices[0].message.content == expected_text(HELLO, 9)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 9
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 9


async def test_the_openai_client_gets_the_same_answer_as_a_stream(openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(model="sim-model", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert (chunks[0].choices[0].delta.role, chunks[0].choices[0].delta.content) == ("assistant", "")
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == expected_text(HELLO)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


async def test_usage_is_the_last_chunk_of_a_stream_that_asks_for_it(openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(
        model="sim-model",
        messages=HELLO,
        max_tokens=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_choices_of_a_stream_are_told_apart_by_their_index(openai: AsyncOpenAI) -> None:
    stream = await openai.chat.completions.create(
        model="sim-model", messages=HELLO, max_tokens=6, n=2, stream=True
    )
    texts, roles = ["", ""], []
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        if chunk.choices[0].delta.role:
            roles.append(chunk.choices[0].index)
    assert roles == [0, 1]
    assert texts == [expected_text(HELLO, 6, seed=seed) for seed in (0, 1)]


async def test_usage_counts_a_prompt_once_for_all_its_choices(openai: AsyncOpenAI) -> None:
    usages = [
        (await openai.completions.create(model="sim-model", prompt=["one", "two"], max_tokens=8, n=n)).usage
        for n in (1, 3)
    ]
    assert [usage and usage.prompt_tokens for usage in usages] == [2, 2]
    assert [usage and usage.completion_tokens for usage in usages] == [16, 48]


async def test_completions_answer_each_prompt_of_a_list(openai: AsyncOpenAI) -> None:
    answer = await openai.completions.create(model="sim-model", prompt=["one", "two"], max_tokens=8)
    assert [choice.text for choice in answer.choices] == [expected_text(p, 8) for p in ("one", "two")]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


async def test_completions_stream_too(openai: AsyncOpenAI) -> None:
    stream = await openai.completions.create(model="sim-model", prompt="one", max_tokens=8, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == expected_text("one", 8)


async def test_embeddings_are_the_same_floats_in_both_encodings(openai: AsyncOpenAI) -> None:
    as_floats = await openai.embeddings.create(
        model="sim-model", input=["one", "two"], encoding_format="float"
    )
    # Without an encoding the client asks for base64.
    as_base64 = await openai.embeddings.create(model="sim-model", input=["one", "two"])
    vectors = [item.embedding for item in as_floats.data]
    assert vectors == [pytest.approx(item.embedding) for item in as_base64.data]
    assert vectors[0] != vectors[1]
    assert sum(value * value for value in vectors[0]) == pytest.approx(1.0)
    short = await openai.embeddings.create(model="sim-model", input="one", dimensions=5)
    assert len(short.data[0].embedding) == 5


async def test_the_responses_api_answers_whole_and_as_a_stream(openai: AsyncOpenAI) -> None:
    whole = await openai.responses.create(model="sim-model", input="hello", instructions="be brief")
    stream = await openai.responses.create(
        model="sim-model", input="hello", instructions="be brief", stream=True
    )
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    last = events[-1]
    assert last.type == "response.completed"
    assert "".join(deltas) == whole.output_text == last.response.output_text
    prompt = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    assert whole.output_text == expected_text(prompt)
    assert whole.usage is not None
    assert whole.usage.output_tokens == len(deltas)


async def test_the_messages_api_answers_whole_and_as_a_stream(client: Client) -> None:
    body = {"model": "sim-model", "max_tokens": 6, "messages": HELLO}
    status, whole = await client.post("/v1/messages", body)
    assert (status, whole["stop_reason"]) == (200, "max_tokens")
    assert whole["content"] == [{"type": "text", "text": expected_text(HELLO, 6)}]
    async with client.stream("/v1/messages", body | {"stream": True}) as response:
        names = [line[7:].strip() async for line in response.content if line.startswith(b"event: ")]
    deltas = [b"content_block_delta"] * 6
    ending = [b"content_block_stop", b"message_delta", b"message_stop"]
    assert names == [b"message_start", b"content_block_start", *deltas, *ending]


async def test_rerank_orders_documents_and_keeps_the_best(client: Client) -> None:
    body = {"query": "q", "documents": ["a", "b", "c"], "top_n": 2}
    status, answer = await client.post("/v1/rerank", body)
    assert status == 200
    scores = [result["relevance_score"] for result in answer["results"]]
    assert len(scores) == 2
    assert scores == sorted(scores, reverse=True)
    _, every = await client.post("/v1/rerank", body | {"top_n": 0})
    assert sorted(result["index"] for result in every["results"]) == [0, 1, 2]


async def test_a_stream_is_the_same_bytes_whatever_its_pace(start: Start, chat_body: Any) -> None:
    streams = []
    for spec in (EngineSpec(prefill_tokens_per_s=1e9, decode_step_s=0.0), EngineSpec(decode_step_s=0.002)):
        client = await start(spec)
        async with client.stream(
            "/v1/chat/completions", chat_body | {"stream": True}, x_request_id="same"
        ) as response:
            data = await response.read()
            streams.append([line for line in data.split(b"\n") if line])
    created = [line.split(b'"created":')[1][:10] for lines in streams for line in lines[:1]]
    assert streams[0] == [line.replace(created[1], created[0]) for line in streams[1]]
    assert streams[0][-1] == b"data: [DONE]"


async def test_the_request_id_is_part_of_the_response_id(client: Client, chat_body: Any) -> None:
    _, answer = await client.post("/v1/chat/completions", chat_body, x_request_id="abc")
    assert answer["id"] == "chatcmpl-abc"
    _, answer = await client.post("/v1/completions", {"prompt": "a"}, x_request_id="abc")
    assert answer["id"] == "cmpl-abc"


async def test_header_bytes_that_are_no_utf8_do_no_harm(client: Client) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nX-Request-Id: \xff\r\n"
    answer = await client.raw(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert (await client.state())["requests"][0]["id"] == "?"


async def test_a_client_that_expects_to_be_asked_for_its_body_is_asked(client: Client) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nExpect: 100-continue\r\n"
    reader, writer = await asyncio.open_connection(client.instance.host, client.instance.port)
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body))
    async with asyncio.timeout(10):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(body)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
    writer.close()


@pytest.mark.parametrize(
    "data",
    [
        b"NO HTTP\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nno size\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\na",
    ],
)
async def test_what_is_no_request_is_a_400_and_the_engine_lives(start: Start, data: bytes) -> None:
    client = await start(keep_alive_s=0.05)
    answer = await client.raw(data)
    assert answer.split(b" ")[1] == b"400"
    await client.eventually(open=0)


async def test_cached_tokens_grow_with_the_prefix_seen_before(client: Client) -> None:
    first = [{"role": "user", "content": "tell me a long story " * 20}]
    _, answer = await client.post("/v1/chat/completions", {"messages": first})
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    reply = {"role": "assistant", "content": answer["choices"][0]["message"]["content"]}
    second = [*first, reply, {"role": "user", "content": "and then?"}]
    _, next_answer = await client.post("/v1/chat/completions", {"messages": second})
    cached = next_answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    # The answer's own blocks are cached too, as far as they were filled.
    assert cached > answer["usage"]["prompt_tokens"]
    _, salted = await client.post("/v1/chat/completions", {"messages": second, "cache_salt": "other"})
    assert salted["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_tokenize_counts_what_usage_counts(client: Client, chat_body: Any) -> None:
    _, answer = await client.post("/v1/chat/completions", chat_body)
    _, tokens = await client.post("/tokenize", {"messages": chat_body["messages"]})
    assert tokens["count"] == len(tokens["tokens"]) == answer["usage"]["prompt_tokens"]
    _, tokens = await client.post("/tokenize", {"prompt": "hello world"})
    _, back = await client.post("/detokenize", {"tokens": tokens["tokens"]})
    assert back == {"prompt": "hello world"}


async def test_models_lists_base_names_and_lora_adapters(start: Start) -> None:
    client = await start(models=("base", "alias"), lora_adapters=("tuned",), owned_by="team-a")
    cards = (await client.get("/v1/models"))["data"]
    assert [(c["id"], c["parent"], c["owned_by"]) for c in cards] == [
        ("base", None, "team-a"),
        ("alias", None, "team-a"),
        ("tuned", "base", "team-a"),
    ]
    _, answer = await client.post("/v1/completions", {"model": "tuned", "prompt": "a", "max_tokens": 8})
    assert answer["choices"][0]["text"] == expected_text("a", 8, model="tuned")


async def test_health_is_empty_and_version_names_one(client: Client) -> None:
    assert await client.text("/health") == ""
    assert (await client.get("/version"))["version"]


async def test_an_unknown_model_is_not_found_for_the_openai_client(openai: AsyncOpenAI) -> None:
    with pytest.raises(NotFoundError) as caught:
        await openai.chat.completions.create(model="other", messages=HELLO)
    assert (caught.value.status_code, caught.value.param) == (404, "model")


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/v1/nothing", 404, "NotFoundError"),
        ("GET", "/v1/chat/completions", 405, "MethodNotAllowedError"),
        ("POST", "/health", 405, "MethodNotAllowedError"),
        ("POST", "/v1/chat/completions", 400, "BadRequestError"),
        ("POST", "/tokenize", 400, "BadRequestError"),
        ("POST", "/sim/fault", 400, "BadRequestError"),
    ],
)
async def test_errors_have_one_shape(client: Client, method: str, path: str, status: int, kind: str) -> None:
    async with client.session.request(method, client.url + path) as response:
        error = (await response.json())["error"]
    assert (response.status, error["code"], error["type"]) == (status, status, kind)


async def test_a_body_above_the_limit_is_a_413(start: Start) -> None:
    client = await start(max_body_bytes=1000)
    status, answer = await client.post("/v1/completions", {"prompt": "a" * 1001})
    assert (status, answer["error"]["code"]) == (413, 413)


async def test_a_request_that_finds_the_queue_full_is_a_503(start: Start, chat_body: Any) -> None:
    client = await start(EngineSpec(max_batch=1, max_waiting=1, decode_step_s=3600.0))
    running = asyncio.create_task(client.post("/v1/chat/completions", chat_body))
    await client.eventually(running=1)
    waiting = asyncio.create_task(client.post("/v1/chat/completions", chat_body))
    await client.eventually(waiting=1)
    status, answer = await client.post("/v1/chat/completions", chat_body)
    assert (status, answer["error"]["type"]) == (503, "ServiceUnavailableError")
    for task in (running, waiting):
        task.cancel()
    await client.eventually(running=0, waiting=0, open=0)


async def test_the_headers_of_a_stream_do_not_wait_for_its_first_token(start: Start, chat_body: Any) -> None:
    client = await start(EngineSpec(prefill_tokens_per_s=0.001))
    async with client.stream("/v1/chat/completions", chat_body | {"stream": True}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        await client.eventually(running=1)
    await client.eventually(running=0)


async def test_a_client_that_leaves_a_stream_ends_the_request_at_once(slow: Client, chat_body: Any) -> None:
    async with slow.stream("/v1/chat/completions", chat_body | {"stream": True}) as response:
        # The role and the first token; the second one would take an hour.
        await response.content.readuntil(b"\n\n")
        await slow.eventually(running=1, open=1)
    await slow.eventually(running=0, open=0, aborted=1, kv_blocks_used=0)


async def test_a_client_that_leaves_before_the_answer_ends_the_request_at_once(
    slow: Client, chat_body: Any
) -> None:
    asking = asyncio.create_task(slow.post("/v1/chat/completions", chat_body))
    await slow.eventually(running=1, open=1)
    asking.cancel()
    await slow.eventually(running=0, open=0, aborted=1, kv_blocks_used=0)


async def test_a_client_that_leaves_the_queue_ends_the_request_at_once(start: Start, chat_body: Any) -> None:
    client = await start(EngineSpec(max_batch=1, decode_step_s=3600.0))
    first = asyncio.create_task(client.post("/v1/chat/completions", chat_body))
    await client.eventually(running=1)
    second = asyncio.create_task(client.post("/v1/chat/completions", chat_body))
    await client.eventually(waiting=1)
    second.cancel()
    await client.eventually(waiting=0, running=1, aborted=1)
    first.cancel()
    await client.eventually(running=0, aborted=2)


async def test_a_slow_reader_gets_the_whole_stream(client: Client) -> None:
    # More than the kernel holds for both ends: 4 MiB to send, what SO_RCVBUF says to receive.
    tokens = 32_000
    body = b'{"prompt": "a", "max_tokens": %d, "stream": true}' % tokens
    sock = socket.create_connection((client.instance.host, client.instance.port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 256 * 1024)
    reader, writer = await asyncio.open_connection(sock=sock)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    # The engine is done long before the reader; the rest waits for the reader, not in the engine.
    await client.eventually(running=0, open=1)
    data = await reader.read()
    writer.close()
    assert data.count(b'"text":"') == tokens
    assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    await client.eventually(open=0, aborted=0)


async def test_many_requests_at_once_get_their_own_answers(client: Client) -> None:
    prompts = [f"nonce {number}" for number in range(200)]
    answers = await asyncio.gather(
        *(client.post("/v1/completions", {"prompt": prompt, "max_tokens": 12}) for prompt in prompts)
    )
    assert [answer["choices"][0]["text"] for _, answer in answers] == [expected_text(p, 12) for p in prompts]
    await client.eventually(running=0, open=0, requests_total=200)


async def test_requests_are_remembered_with_id_headers_and_body(client: Client) -> None:
    await client.post("/v1/completions", {"prompt": "remember"}, x_request_id="r1", X_Other="kept")
    (seen,) = (await client.state())["requests"]
    assert (seen["id"], seen["path"], seen["headers"]["x-other"]) == ("r1", "/v1/completions", "kept")
    assert "remember" in seen["body"]
    assert seen["body_bytes"] == len(seen["body"])


async def test_only_the_last_requests_and_the_beginning_of_a_long_body_are_shown(client: Client) -> None:
    for name in ("first", "last"):
        await client.post("/v1/completions", {"prompt": "a" * 100_000}, x_request_id=name)
    state = await client.get("/sim/state?requests=1")
    (seen,) = state["requests"]
    assert (seen["id"], len(seen["body"]), state["requests_total"]) == ("last", 65_536, 2)
    assert seen["body_bytes"] > 100_000
    assert (await client.get("/sim/state?requests=0"))["requests"] == []
    for wrong in ("all", "-1", "1" * 5000):
        async with client.session.get(f"{client.url}/sim/state?requests={wrong}") as response:
            assert response.status == 400


async def test_idle_connections_are_closed_like_vllms(start: Start) -> None:
    client = await start(keep_alive_s=0.05)
    answer = await client.raw(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
