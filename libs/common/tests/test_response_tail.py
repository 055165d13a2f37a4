"""The end of a response: usage, and why it ended."""

from __future__ import annotations

import pytest

from penstock.common.response_tail import finish_reason_in, usage_in


@pytest.mark.parametrize(
    ("tail", "usage"),
    [
        (b"", (0, 0, 0)),
        (b'data: {"usage":null}\n\ndata: [DONE]\n\n', (0, 0, 0)),
        (b'{"usage":{"prompt_tokens":5,"total_tokens":12,"completion_tokens":7}}', (5, 7, 0)),
        (b'{"usage": {"prompt_tokens": 5, "completion_tokens" : 0}}', (5, 0, 0)),
        (
            b'"usage":{"prompt_tokens":50,"prompt_tokens_details":{"cached_tokens":48},"completion_tokens":7}',
            (50, 7, 48),
        ),
        (
            b'"usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":1},"output_tokens":2}',
            (9, 2, 1),
        ),
        (b'data: {"usage":{"prompt_tokens":1}}\n\ndata: {"usage":{"prompt_tokens":3}}\n\n', (3, 0, 0)),
        (b'{"prompt_tokens":5,"completion_tokens":7}', (0, 0, 0)),
        (b'"content":"my \\"usage\\": {\\"prompt_tokens\\":5}"', (0, 0, 0)),
        (b'_tokens":5,"completion_tokens":7},"usage', (0, 0, 0)),
        (b'"usage":{"prompt_tokens":-5,"completion_tokens":"7"}', (0, 0, 0)),
        (b'"usage":{"prompt_tokens":' + b"9" * 1000, (999_999_999_999, 0, 0)),
    ],
)
def test_usage_is_read_from_the_end_of_a_response(tail: bytes, usage: tuple[int, int, int]) -> None:
    assert usage_in(tail) == usage


@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (b"", ""),
        (b'{"choices":[{"finish_reason":"stop"}],"usage":{}}', "stop"),
        (b'data: {"finish_reason": "length"}\n\ndata: {"finish_reason":null}\n\n', "length"),
        (b'"finish_reason":"stop"}]}\n\ndata: {"finish_reason":"tool_calls"}', "tool_calls"),
        (b'{"stop_reason":"end_turn"}', "end_turn"),
        (b'"content":"\\"finish_reason\\":\\"stop\\""', ""),
        (b'"finish_reason":"<script>"', ""),
        (b'"finish_reason":"' + b"a" * 1000 + b'"', ""),
    ],
)
def test_the_last_reason_that_is_named_counts(tail: bytes, reason: str) -> None:
    assert finish_reason_in(tail) == reason
