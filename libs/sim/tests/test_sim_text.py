"""Pseudo-tokens and answers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sim import text
from penstock.sim.text import answer, expected_text, tokenize, tokenize_chat

HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(("prompt", "tokens"), [("", 0), ("a", 1), ("abcd", 1), ("abcde", 2), ("ééé", 2)])
def test_a_token_is_four_bytes_of_text(prompt: str, tokens: int) -> None:
    assert text.count(tokenize(prompt)) == tokens


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_tokens_give_the_text_back_by_way_of_their_ids(prompt: str) -> None:
    assert text.detokenize(text.from_ids(text.token_ids(tokenize(prompt)))) == prompt


@pytest.mark.parametrize("ids", [[-1], [2**32], ["a"], [1.5]])
def test_ids_outside_the_range_are_an_error(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="from 0 to 4294967295"):
        text.from_ids(ids)


def test_the_same_question_has_the_same_answer() -> None:
    assert expected_text("hello", 20) == expected_text("hello", 20)
    # Fixed for good: recorded answers stay valid.
    assert expected_text("hi", 8) == "62d2bcf735b25dde net cat hay pen"


def test_model_seed_and_prompt_change_the_answer_from_its_first_token() -> None:
    answers = [
        expected_text("hello", 8),
        expected_text("hello!", 8),
        expected_text("hello", 8, model="other"),
        expected_text("hello", 8, seed=1),
        expected_text("hello", 8, seed=-1),
        expected_text(HELLO, 8),
    ]
    assert len({answer[:16] for answer in answers}) == len(answers)


@pytest.mark.parametrize("length", [1, 3, 4, 5, 100, 1000])
def test_an_answer_has_as_many_tokens_as_it_says(length: int) -> None:
    given_answer = answer(tokenize("hello"), length, model="m")
    assert text.count(tokenize(given_answer.text)) == given_answer.tokens == length
    assert given_answer.finish_reason == "length"
    assert given_answer.text.isascii()


def test_a_shorter_answer_is_the_beginning_of_a_longer_one() -> None:
    assert expected_text("hello", 300).startswith(expected_text("hello", 40))


def test_an_unlimited_answer_ends_by_itself_after_16_to_64_tokens() -> None:
    answers = [answer(tokenize(f"prompt {i}"), None, model="m") for i in range(200)]
    assert {a.finish_reason for a in answers} == {"stop"}
    lengths = {a.tokens for a in answers}
    assert min(lengths) >= 16
    assert max(lengths) <= 64
    assert len(lengths) > 20


def test_an_unlimited_answer_is_cut_where_the_model_length_ends() -> None:
    assert answer(tokenize("hello"), None, model="m", room=5)[1:] == (5, "length")
    assert answer(tokenize("hello"), None, model="m", room=64).finish_reason == "stop"


def test_an_answer_is_the_same_tokens_in_the_next_turn() -> None:
    reply = expected_text(HELLO, 10)
    next_turn = [*HELLO, {"role": "assistant", "content": reply}, {"role": "user", "content": "go on"}]
    assert tokenize_chat(next_turn).startswith(tokenize_chat(HELLO) + tokenize(reply))


def test_every_part_of_a_message_counts() -> None:
    variants: list[list[dict[str, Any]]] = [
        HELLO,
        [{"role": "system", "content": "hello"}],
        [{"role": "user", "content": "hello", "name": "ann"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        [*HELLO, *HELLO],
    ]
    assert len({tokenize_chat(messages) for messages in variants}) == len(variants)
    assert tokenize_chat(HELLO, tools=[{"type": "function"}]) != tokenize_chat(HELLO)


def test_text_parts_count_as_their_text() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    assert tokenize_chat(parts) == tokenize_chat(HELLO)


@pytest.mark.parametrize(
    "message",
    [{}, {"role": 1}, {"role": "user", "content": 5}, {"role": "user", "content": [5]}],
)
def test_what_is_no_message_is_an_error(message: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        tokenize_chat([message])
