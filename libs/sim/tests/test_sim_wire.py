"""Bodies: what is understood, what is refused and how."""

from typing import Any

import msgspec
import pytest

from penstock.sim import text, wire
from penstock.sim.wire import ApiError, Catalogue

CATALOGUE = Catalogue({"base": "", "lora": "lora"}, max_model_len=100)
HELLO = [{"role": "user", "content": "hello"}]


def encode(body: object) -> bytes:
    return msgspec.json.encode(body)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("abcd", [b"abcd"]),
        (["abcd", "efgh"], [b"abcd", b"efgh"]),
        ([0x64636261], [b"abcd"]),
        ([[0x64636261], [1, 2]], [b"abcd", b"\1\0\0\0\2\0\0\0"]),
    ],
)
def test_completion_prompts_are_strings_tokens_or_lists_of_them(prompt: Any, expected: list[bytes]) -> None:
    call = wire.completion(encode({"prompt": prompt}), CATALOGUE)
    assert [sequence.prompt for sequence in call.sequences] == expected


def test_each_choice_has_its_own_seed() -> None:
    call = wire.chat(encode({"messages": HELLO, "n": 3, "seed": 5, "max_tokens": 8}), CATALOGUE)
    texts = [sequence.answer.text for sequence in call.sequences]
    assert texts == [text.expected_text(HELLO, 8, model="base", seed=seed) for seed in (5, 6, 7)]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_is_honoured_under_both_names(field: str) -> None:
    call = wire.chat(encode({"messages": HELLO, field: 7}), CATALOGUE)
    assert call.sequences[0].answer.tokens == 7


def test_salt_and_lora_adapter_separate_prefix_caches() -> None:
    bodies = [
        {},
        {"model": "lora"},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"model": "lora", "cache_salt": "a"},
    ]
    roots = [wire.chat(encode({"messages": HELLO, **body}), CATALOGUE).cache_root for body in bodies]
    assert roots[0] == ""
    assert len(set(roots)) == len(roots)


def test_unknown_fields_are_ignored() -> None:
    wire.chat(encode({"messages": HELLO, "temperature": 0.5, "kv_transfer_params": {"a": 1}}), CATALOGUE)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"messages": "\xff"}',
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": ' + b"[" * 100_000,
        b'{"messages": []}',
        b'{"messages": [{"content": "no role"}]}',
        b'{"messages": [{"role": "user", "content": 1}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 0}',
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": "many"}',
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 1e400}',
        b'{"messages": [{"role": "user", "content": "a"}], "n": 1000}',
        b'{"messages": [{"role": "user", "content": "a"}], "stream": 1}',
        b'{"model": "base"}',
    ],
)
def test_a_body_that_is_no_chat_request_is_a_400(data: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        wire.chat(data, CATALOGUE)
    assert caught.value.status == 400
    assert msgspec.json.decode(caught.value.body())["error"]["type"] == "BadRequestError"


@pytest.mark.parametrize("prompt", [[], "", [""], ["a", 1], [1, "a"], [[-1]], [[]], [None], {}, 5])
def test_a_body_without_usable_prompt_is_a_400(prompt: object) -> None:
    with pytest.raises(ApiError) as caught:
        wire.completion(encode({"prompt": prompt}), CATALOGUE)
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "abcd" * 100}, "input_tokens"),
        ({"prompt": "abcd" * 99, "max_tokens": 2}, "max_tokens"),
        ({"prompt": ["a"] * 257}, None),
        ({"prompt": ["a"] * 3, "n": 128}, None),
    ],
)
def test_what_exceeds_a_limit_is_a_400_that_names_it(body: dict[str, Any], param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        wire.completion(encode(body), CATALOGUE)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_the_longest_prompt_leaves_room_for_one_token() -> None:
    call = wire.completion(encode({"prompt": "abcd" * 99}), CATALOGUE)
    assert call.sequences[0].answer[1:] == (1, "length")


def test_an_unknown_model_is_a_404_with_an_integer_code() -> None:
    with pytest.raises(ApiError) as caught:
        wire.chat(encode({"model": "other", "messages": HELLO}), CATALOGUE)
    error = msgspec.json.decode(caught.value.body())["error"]
    assert error["message"] == "The model `other` does not exist."
    assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", 404)


def test_without_a_model_the_first_one_answers() -> None:
    assert wire.chat(encode({"messages": HELLO}), CATALOGUE).model == "base"
