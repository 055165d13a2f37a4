"""What the end of an engine's response says: usage, and why it ended."""

from __future__ import annotations

import re

# Enough for a usage object with every detail field.
TAIL_BYTES = 2048
_USAGE = re.compile(rb'"(?:(prompt|input)|(completion|output)|cached)_tokens"\s*:\s*(\d{1,12})')
# As nearly all engines write it; the other expression, which looks at every byte, costs 1 us more.
_PLAIN_USAGE = re.compile(
    rb'"usage": ?\{"prompt_tokens": ?(\d{1,12}),(?: ?"total_tokens": ?\d{1,12},)? ?"completion_tokens": ?'
    rb'(\d{1,12})(?:, ?"total_tokens": ?\d{1,12})?(?:, ?"prompt_tokens_details": ?null)?\}'
)
_FINISH = re.compile(rb'"(?:finish_reason|stop_reason)"\s*:\s*"([a-z_]{1,32})"')


def usage_in(tail: bytes) -> tuple[int, int, int]:
    """(prompt, completion, cached) tokens of the usage object near the end of a response; 0 if absent."""
    start = tail.rfind(b'"usage"')
    if start < 0:
        return 0, 0, 0
    plain = _PLAIN_USAGE.match(tail, start)
    if plain is not None:
        return int(plain[1]), int(plain[2]), 0
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
