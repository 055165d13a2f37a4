"""Chat answers that are no plain text: calls of tools, JSON, with logprobs, and ended by a stop."""

import json
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError

from penstock.sim.text import expected_text

Client = Any

HELLO: Any = [{"role": "user", "content": "hello"}]
TOOLS: Any = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("look_up", "note")
]
NOTE: Any = {"type": "function", "function": {"name": "note"}}


@pytest.fixture
async def openai(client: Client) -> Any:
    async with AsyncOpenAI(base_url=f"{client.url}/v1", api_key="none", max_retries=0) as official:
        yield official


@pytest.mark.parametrize(("choice", "called"), [("required", "look_up"), (NOTE, "note")])
async def test_a_tool_is_called_alike_in_one_piece_and_streamed(
    openai: AsyncOpenAI, choice: Any, called: str
) -> None:
    asked: Any = {"model": "sim-model", "messages": HELLO, "tools": TOOLS, "tool_choice": choice}
    whole = await openai.chat.completions.create(**asked)
    message = whole.choices[0].message
    assert message.content is None
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert (call.type, whole.choices[0].finish_reason) == ("function", "tool_calls")
    assert call.function.name == called
    assert json.loads(call.function.arguments)["text"]
    async with openai.chat.completions.stream(**asked) as stream:
        streamed = (await stream.get_final_completion()).choices[0]
    assert streamed.finish_reason == "tool_calls"
    assert streamed.message.tool_calls is not None
    (again,) = streamed.message.tool_calls
    assert (again.id, again.function.name) == (call.id, called)
    assert again.function.arguments == call.function.arguments


async def test_without_an_order_to_call_the_answer_is_text(openai: AsyncOpenAI) -> None:
    for choice in ("auto", "none"):
        asked: Any = {"model": "sim-model", "messages": HELLO, "tools": TOOLS, "tool_choice": choice}
        (one,) = (await openai.chat.completions.create(**asked)).choices
        assert (one.finish_reason, one.message.tool_calls) == ("stop", [])


async def test_a_call_that_is_cut_off_says_so(openai: AsyncOpenAI) -> None:
    asked: Any = {"model": "sim-model", "messages": HELLO, "tools": TOOLS, "tool_choice": "required"}
    (one,) = (await openai.chat.completions.create(**asked, max_tokens=4)).choices
    assert one.finish_reason == "length"
    assert one.message.tool_calls is not None
    assert one.message.tool_calls[0].function.arguments.startswith('{"text":"')


@pytest.mark.parametrize(
    ("tools", "choice"), [(None, "required"), (TOOLS, {"function": {"name": "x"}}), ([3], NOTE)]
)
async def test_tools_that_there_are_not_are_refused(openai: AsyncOpenAI, tools: Any, choice: Any) -> None:
    asked: Any = {"model": "sim-model", "messages": HELLO, "tools": tools, "tool_choice": choice}
    with pytest.raises(BadRequestError):
        await openai.chat.completions.create(**asked)


async def test_json_logprobs_and_stops(openai: AsyncOpenAI) -> None:
    text = expected_text(HELLO)
    asked: Any = {"model": "sim-model", "messages": HELLO}
    (one,) = (await openai.chat.completions.create(**asked, response_format={"type": "json_object"})).choices
    assert json.loads(one.message.content or "") == {"text": text}
    (one,) = (await openai.chat.completions.create(**asked, logprobs=True)).choices
    assert one.logprobs is not None
    assert "".join(token.token for token in one.logprobs.content or []) == text
    stop = text[40:44]
    (one,) = (await openai.chat.completions.create(**asked, stop=[stop, "never"])).choices
    assert one.finish_reason == "stop"
    assert one.message.content == text[: text.find(stop) // 4 * 4]
