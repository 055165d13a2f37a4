"""The form of a chat answer: text, a JSON object that holds it, or a call of a tool with that as arguments.

A tool is called where `tool_choice` is `required` or names it; with `auto` the answer is text, as it may be.
"""

from typing import Any, NamedTuple

from penstock.sim.wire import ChatBody, bad_request

# Around the text of an answer that is JSON.
BEFORE, AFTER = '{"text":"', '"}'
_JSON_FORMATS = ("json_object", "json_schema")


class ChatForm(NamedTuple):
    """`tool` is the name of the function to call, empty for none; `json`: the text stands in an object."""

    json: bool = False
    tool: str = ""
    logprobs: bool = False


def form_of(body: ChatBody) -> ChatForm:
    """Raises ApiError for a tool that there is not."""
    tool = _called(body)
    formatted = body.response_format is not None and body.response_format.get("type") in _JSON_FORMATS
    return ChatForm(bool(tool) or formatted, tool, bool(body.logprobs))


def _called(body: ChatBody) -> str:
    names = [_function(tool) for tool in body.tools or ()]
    choice = body.tool_choice
    if isinstance(choice, dict):
        if _function(choice) not in names:
            raise bad_request("tool_choice names a tool that is not among tools", "tool_choice")
        return _function(choice)
    if choice != "required":
        return ""
    if not names:
        raise bad_request("tool_choice is required, and there are no tools", "tool_choice")
    return names[0]


def _function(tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name:
        raise bad_request("a tool is a function with a name", "tools")
    return name


def logprobs_of(pieces: list[str]) -> dict[str, Any]:
    """Of the tokens of a choice, or of a chunk."""
    tokens = [
        {
            "token": piece,
            "logprob": -0.25 * (len(piece) % 4),
            "bytes": list(piece.encode()),
            "top_logprobs": [],
        }
        for piece in pieces
    ]
    return {"content": tokens, "refusal": None}
