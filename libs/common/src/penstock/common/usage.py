"""The usage object of an engine's response, as nearly all write it."""

from __future__ import annotations

from typing import Annotated

import msgspec

Tokens = Annotated[int, msgspec.Meta(ge=0, lt=10**12)]


class Details(msgspec.Struct, gc=False):
    """What an engine says of a prompt's tokens; None where not said."""

    cached_tokens: Tokens | None = None


class Usage(msgspec.Struct, gc=False):
    """Tokens of the prompt and of the completion, under the names of either API; None where not said."""

    prompt_tokens: Tokens | None = None
    completion_tokens: Tokens | None = None
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    cached_tokens: Tokens | None = None
    prompt_tokens_details: Details | None = None
    input_tokens_details: Details | None = None


class Answer(msgspec.Struct, gc=False):
    """An answer's usage."""

    usage: Usage | None = None
