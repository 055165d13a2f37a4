"""What the end of an engine's response says: usage, and why it ended."""

from __future__ import annotations

import re
from typing import Final

import msgspec

from penstock.common.usage import Answer, Usage

# Enough for a usage object with every detail field.
TAIL_BYTES: Final = 2048
_USAGE: Final = re.compile(rb'"(?:(prompt|input)|(completion|output)|cached)_tokens"\s*:\s*(\d{1,12})')
_decode: Final = msgspec.json.Decoder(Usage).decode
_decode_answer: Final = msgspec.json.Decoder(Answer).decode
_KEY: Final = b'"usage":'
_CLOSING_BRACE: Final = 125
_FINISH: Final = re.compile(rb'"(?:finish_reason|stop_reason)"\s*:\s*"([a-z_]{1,32})"')


def usage_in(tail: bytes) -> tuple[int, int, int]:
    """(prompt, completion, cached) tokens of the usage object near the end of a response; 0 if absent."""
    _, key, rest = tail.rpartition(_KEY)
    if key and rest and rest[-1] == _CLOSING_BRACE:
        # The end of an answer in one piece, as most engines write it: each further look at it costs 0.1 us.
        try:
            usage = _decode_answer(b'{"usage":' + rest).usage
        except msgspec.MsgspecError:
            pass
        else:
            return _told(usage) if usage is not None else (0, 0, 0)
    start = tail.rfind(b'"usage"')
    if start < 0:
        return 0, 0, 0
    begin, end = tail.find(b"{", start), tail.find(b"}", start) + 1
    if tail[start + 7 : begin].strip() == b":" and tail.find(b"{", begin + 1, end) < 0:
        # Without objects in it, as most are: the expression costs 2 us more.
        try:
            plain = _decode(tail[begin:end])
        except msgspec.MsgspecError:
            return _sought(tail, start)
        return _told(plain)
    return _sought(tail, start)


def _told(usage: Usage) -> tuple[int, int, int]:
    details = usage.prompt_tokens_details or usage.input_tokens_details
    cached = usage.cached_tokens or (details.cached_tokens if details is not None else 0)
    prompt, completion = usage.prompt_tokens or usage.input_tokens, usage.completion_tokens
    return prompt or 0, completion or usage.output_tokens or 0, cached or 0


def _sought(tail: bytes, start: int) -> tuple[int, int, int]:
    prompt = completion = cached = 0
    for of_prompt, of_completion, digits in _USAGE.findall(tail, start):
        if of_prompt:
            prompt = prompt or int(digits)
        elif of_completion:
            completion = completion or int(digits)
        else:
            cached = cached or int(digits)
    return prompt, completion, cached


def finish_reason_in(tail: bytes) -> str:
    """The last reason that is named near the end of a response; "" if none is."""
    reasons = _FINISH.findall(tail)
    return reasons[-1].decode() if reasons else ""
