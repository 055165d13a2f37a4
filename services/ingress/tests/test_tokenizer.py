"""Prompts hashed by the tokens that engines make of them, and by their bytes where nobody can tell those."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.block_hash import pack_hashes, pack_tokens, root_seed, salted, token_chain
from penstock.common.settings import SettingsError, load
from penstock.ingress.adapters.tokenizer import TokenizerError, Tokenizers
from penstock.ingress.block_hash import chain, condense
from penstock.ingress.large_bodies import Facts, Setup, Task, read
from penstock.ingress.openai import parse
from penstock.ingress.settings import IngressSettings
from penstock.ingress.token_prompts import ChatPrompt, TextPrompt, TokenPrompt, prompt_of
from penstock.ingress.tokenizer_paths import tokenizer_folders

CHAT, COMPLETIONS = b"/v1/chat/completions", b"/v1/completions"
WORDS = ["?", "<s>", "<user>", "<assistant>", "<tools>", "hi", "there", "a", "b"]
TEMPLATE = (
    "{{ bos_token }} {% if tools %}<tools> {% endif %}"
    "{% for m in messages %}{% if m['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder: a word is a token, texts of their own begin with <s>."""
    made = tmp_path_factory.mktemp("model")
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<s>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "model": {"type": "WordLevel", "vocab": {w: n for n, w in enumerate(WORDS)}, "unk_token": "?"},
    }
    (made / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"bos_token": {"content": "<s>"}, "chat_template": TEMPLATE}
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


def tokens(folder: Path, path: bytes, most: int = 1000, **body: Any) -> list[int] | None:
    return Tokenizers({"": folder}, most).tokens("m", path, json.dumps({"model": "m", **body}).encode())


def chat(*contents: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for content in contents]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"messages": chat("hi")}, "<s> <user> hi <assistant>"),
        ({"messages": chat("hi"), "add_generation_prompt": False}, "<s> <user> hi"),
        ({"messages": chat("hi"), "tools": [{}]}, "<s> <tools> <user> hi <assistant>"),
        ({"messages": chat("hi"), "tools": [{}], "tool_choice": "none"}, "<s> <user> hi <assistant>"),
        (
            {"messages": chat([{"type": "text", "text": "hi"}, {"type": "text", "text": "a"}])},
            "<s> <user> hi a <assistant>",
        ),
        ({"messages": chat(None)}, "<s> <user> <assistant>"),
    ],
)
def test_a_chat_is_rendered_by_its_template(folder: Path, body: dict[str, Any], expected: str) -> None:
    assert tokens(folder, CHAT, **body) == ids(expected)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("hi there", ids("<s> hi there")), ([5, 6], [5, 6]), (["hi"], ids("<s> hi")), ([[5, 6]], [5, 6])],
)
def test_a_text_is_encoded_and_token_ids_are_taken_as_they_are(
    folder: Path, prompt: object, expected: list[int]
) -> None:
    assert tokens(folder, COMPLETIONS, prompt=prompt) == expected


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": chat([{"type": "image_url", "image_url": {"url": "data:"}}])}),
        (CHAT, {"messages": chat("hi"), "chat_template": "x"}),
        (CHAT, {"messages": chat("hi"), "continue_final_message": True}),
        (CHAT, {"messages": chat("hi", role="bad")}),
        (CHAT, {"messages": ["hi"]}),
        (CHAT, {"messages": chat("\ud800")}),
        (CHAT, {"messages": [{"content": "hi"}], "chat_template_kwargs": {"bos_token": {}}, "tools": 5}),
        (COMPLETIONS, {"prompt": ["hi", "there"]}),
        (COMPLETIONS, {"prompt": [-1]}),
        (COMPLETIONS, {"prompt": [2**32]}),
        (COMPLETIONS, {"prompt": 5}),
        (b"/v1/responses", {"input": "hi"}),
    ],
)
def test_what_engines_may_read_otherwise_has_no_tokens(
    folder: Path, path: bytes, body: dict[str, Any]
) -> None:
    assert tokens(folder, path, **body) is None


def test_arguments_of_tool_calls_are_objects_to_the_template() -> None:
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}}
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [call, "odd", {"function": {"arguments": "{"}}],
    }
    prompt = prompt_of(CHAT, json.dumps({"messages": [message]}).encode())
    assert isinstance(prompt, ChatPrompt)
    calls = prompt.messages[0]["tool_calls"]
    assert calls[0]["function"]["arguments"] == {"x": 1}
    assert calls[1:] == ["odd", {"function": {"arguments": "{"}}]


def test_of_a_long_prompt_the_first_tokens_count(folder: Path) -> None:
    assert tokens(folder, COMPLETIONS, 4, prompt="a " * 100_000) == ids("<s> a a a")
    assert tokens(folder, COMPLETIONS, 4, prompt=[5] * 100) == [5] * 4


@given(st.binary(max_size=300))
def test_no_body_does_harm(noise: bytes) -> None:
    for path in (CHAT, COMPLETIONS):
        prompt = prompt_of(path, noise)
        assert prompt is None or isinstance(prompt, ChatPrompt | TextPrompt | TokenPrompt)


def test_a_template_cannot_be_made_to_reach_out_of_its_sandbox(folder: Path) -> None:
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    assert tokens(folder, CHAT, messages=chat(hostile)) is not None
    (folder / "evil").mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "evil" / name).write_text((folder / name).read_text())
    (folder / "evil" / "chat_template.jinja").write_text(hostile)
    assert tokens(folder / "evil", CHAT, messages=chat("hi")) is None


def test_a_body_becomes_blocks_of_tokens_and_its_length_is_exact(folder: Path) -> None:
    setup = Setup("s", 256, str(folder), 2)
    body = json.dumps({"model": "m", "messages": chat("hi there a b"), "cache_salt": "x"}).encode()
    facts = read(Task(CHAT, "", len(body)), body, setup, Tokenizers({"": folder}, 4096))
    assert isinstance(facts, Facts)
    packed = pack_tokens(ids("<s> <user> hi there a b <assistant>"))
    assert facts.block_hashes == pack_hashes(token_chain(packed, root_seed("s", "m", "x"), 2, 2048))
    assert (facts.prompt_tokens, len(facts.block_hashes)) == (7, 3 * 8)


def test_models_without_a_tokenizer_and_prompts_without_tokens_go_by_their_bytes(folder: Path) -> None:
    setup = Setup("s", 16)
    body = json.dumps({"model": "other", "messages": chat("hi " * 20)}).encode()
    facts = read(Task(CHAT, "", len(body)), body, setup, Tokenizers({"m": folder}, 4096))
    assert isinstance(facts, Facts)
    expected = chain(condense(parse(CHAT, "", body).prompt), root_seed("s", "other"), 16)
    assert facts.block_hashes == expected


def test_a_folder_without_a_usable_tokenizer_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder with a tokenizer\.json"):
        tokenizer_folders(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match=str(tmp_path)):
        Tokenizers({"": tmp_path}, 10)
    assert tokenizer_folders(f"m={folder}, {folder}") == {"m": folder, "": folder}
    with pytest.raises(SettingsError, match="--tokenizer-path"):
        load(IngressSettings, ["--tokenizer-path", "/nowhere"], prog="x", environ={})


def test_hashes_of_different_tenants_differ_and_those_of_one_agree() -> None:
    hashes = pack_hashes([1, 2, 3])
    assert salted(salted(hashes, 7), 7) == hashes
    assert salted(hashes, 7)[:8] == salted(pack_hashes([1, 9]), 7)[:8]
    assert salted(hashes, 7) != salted(hashes, 8)
    assert salted(b"", 7) == b""
