"""The official client against the whole stack."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import openai
import pytest

from integration.stack import MODEL, Stack, messages, running_stack
from penstock.scheduler.policies.table import STRATEGIES
from penstock.sim.text import expected_text

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with running_stack() as stack:
        stack.start_sims(2, "--lora-adapters", "sim-lora")
        stack.start_discovery()
        stack.start_scheduler()
        stack.start_ingress()
        asyncio.run(stack.ready())
        yield stack


async def test_the_openai_client_gets_plain_and_streamed_answers_placed_by_a_scheduler(stack: Stack) -> None:
    expected = expected_text(messages("hello"), model=MODEL, max_tokens=12)
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=12
        )
        assert raw.headers["routing-strategy"] == "cache-aware"
        assert raw.headers["target-pod"] in stack.engines
        assert raw.headers["x-request-id"]
        plain = raw.parse()
        assert plain.choices[0].message.content == expected
        assert plain.usage is not None
        assert plain.usage.completion_tokens == 12

        stream = await client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == expected
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 12


async def test_the_openai_client_uses_completions_embeddings_and_models(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0) as client:
        completion = await client.completions.create(model=MODEL, prompt="once upon a time", max_tokens=5)
        assert completion.choices[0].text
        embedding = await client.embeddings.create(model=MODEL, input=["a", "b"], encoding_format="float")
        assert len(embedding.data) == 2
        assert embedding.data[0].embedding != embedding.data[1].embedding
        models = [model.id async for model in client.models.list()]
        assert models == ["sim-lora", MODEL]
        lora = await client.completions.create(model="sim-lora", prompt="once upon a time", max_tokens=5)
        assert lora.model == "sim-lora"


async def test_errors_reach_the_openai_client_as_its_own_types(stack: Stack) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="no-such", messages=[{"role": "user", "content": "x"}])
        assert missing.value.code == "model_not_found"
        assert missing.value.param == "model"
        with pytest.raises(openai.BadRequestError) as empty:
            await client.chat.completions.create(model=MODEL, messages=[])
        assert empty.value.param == "messages"
        with pytest.raises(openai.BadRequestError) as strategy:
            await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": "x"}],
                extra_headers={"routing-strategy": "best-guess"},
            )
        assert strategy.value.param == "routing-strategy"
        assert "least-request" in strategy.value.message


@pytest.mark.parametrize("strategy", [*STRATEGIES, "prefix-cache:6,least-request:1"])
async def test_a_request_chooses_its_strategy_by_header(stack: Stack, strategy: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{stack.url}/v1", api_key="any", max_retries=0) as client:
        raw = await client.chat.completions.with_raw_response.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=2,
            extra_headers={"routing-strategy": strategy},
        )
    assert raw.headers["routing-strategy"] == strategy
