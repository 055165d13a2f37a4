"""Request bodies -> what a tokenizer makes the prompt of. Engines make it the same way, or blocks differ.

What is not text alone (images, audio), and what an engine may render in ways of its own, is no such prompt:
it is hashed by its bytes.
"""

from __future__ import annotations

from typing import Any

import msgspec

_TEXT_PARTS = frozenset({"text", "input_text", "output_text"})


class ChatPrompt(msgspec.Struct, frozen=True):
    """Messages for the chat template; `options` are the request's own names for it."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    options: dict[str, Any]


class TextPrompt(msgspec.Struct, frozen=True):
    """Text that is encoded as it is, with the tokenizer's special tokens."""

    text: str


class TokenPrompt(msgspec.Struct, frozen=True):
    """Token ids already."""

    ids: list[int]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


class _Chat(msgspec.Struct):
    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    tool_choice: Any = None
    chat_template: Any = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    documents: Any = None
    reasoning_effort: Any = None


class _Text(msgspec.Struct):
    prompt: str | list[Any] | None = None
    input: str | list[Any] | None = None


_decode_chat = msgspec.json.Decoder(_Chat).decode
_decode_text = msgspec.json.Decoder(_Text).decode


def prompt_of(path: bytes, body: bytes | bytearray) -> Prompt | None:
    """The prompt of a request body that was found valid; None if it is not made of text alone."""
    try:
        if path == b"/v1/chat/completions":
            return _chat(_decode_chat(body))
        if path in (b"/v1/completions", b"/v1/embeddings"):
            parsed = _decode_text(body)
            return _text(parsed.prompt if path == b"/v1/completions" else parsed.input)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return None


def _chat(parsed: _Chat) -> Prompt | None:
    if parsed.chat_template is not None or parsed.continue_final_message or parsed.documents is not None:
        return None
    messages = []
    for message in parsed.messages:
        content = _content(message.get("content"))
        if content is None:
            return None
        messages.append({**message, "content": content, **_tool_calls(message)})
    options = dict(parsed.chat_template_kwargs or {})
    options["add_generation_prompt"] = parsed.add_generation_prompt
    if parsed.reasoning_effort is not None:
        options["reasoning_effort"] = parsed.reasoning_effort
    tools = None if parsed.tool_choice == "none" else parsed.tools
    return ChatPrompt(messages, tools or None, options)


def _content(content: object) -> str | None:
    """Text, or text parts joined with line breaks as vLLM joins them for templates that take strings."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            return None
    return "\n".join(texts)


def _tool_calls(message: dict[str, Any]) -> dict[str, Any]:
    """Templates take the arguments of tool calls as objects, clients send them as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return {}
    return {"tool_calls": [_tool_call(call) for call in calls]}


def _tool_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"])
    except (msgspec.MsgspecError, RecursionError, UnicodeError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}


def _text(prompt: object) -> Prompt | None:
    if isinstance(prompt, str):
        return TextPrompt(prompt)
    if not isinstance(prompt, list) or not prompt:
        return None
    if all(type(item) is int and 0 <= item < 2**32 for item in prompt):
        return TokenPrompt(prompt)
    # Of several prompts an engine makes several sequences.
    return _text(prompt[0]) if len(prompt) == 1 else None
