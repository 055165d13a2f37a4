"""Tokenizers as models bring them: `tokenizer.json` through Hugging Face's tokenizers, the chat template
through a Jinja sandbox. The only importer of either; both come with `penstock-ingress[tokenizer]`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from penstock.ingress.token_prompts import ChatPrompt, Prompt, TextPrompt, TokenPrompt, prompt_of

TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
# Text beyond so many characters for each token that counts is not encoded; what the cut may have changed
# before it is dropped.
CHARACTERS_PER_TOKEN, CUT_TOKENS = 16, 64
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class TokenizerError(ValueError):
    """A folder holds no tokenizer that can be used; the text says why."""


class Tokenizers:
    """Fulfils `large_bodies.Tokenizer`: one for all models, or one for each."""

    def __init__(self, folders: Mapping[str, Path], most_tokens: int) -> None:
        """`folders` by the model's name, "" for all others; of a prompt, `most_tokens` count.

        Raises:
            TokenizerError: naming the folder.
        """
        self._by_model = {model: _Folder(folder, most_tokens) for model, folder in folders.items()}

    def tokens(self, model: str, path: bytes, body: bytes | bytearray) -> list[int] | None:
        """See `large_bodies.Tokenizer`."""
        folder = self._by_model.get(model) or self._by_model.get("")
        prompt = prompt_of(path, body) if folder is not None else None
        return folder.encode(prompt) if folder is not None and prompt is not None else None


class _Folder:
    def __init__(self, folder: Path, most_tokens: int) -> None:
        self._most = most_tokens
        try:
            self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
            config = _read_config(folder)
            self._template = _template(folder, config)
        except Exception as exc:  # the tokenizers package raises plain Exception
            raise TokenizerError(f"{folder}: {exc}") from exc
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = {name: _content_of(config.get(name)) for name in _SPECIAL_TOKENS if config.get(name)}

    def encode(self, prompt: Prompt) -> list[int] | None:
        """The prompt's ids, None if its template refuses it."""
        if isinstance(prompt, TokenPrompt):
            return prompt.ids[: self._most]
        if isinstance(prompt, TextPrompt):
            return self._ids(prompt.text, special=True)
        text = self._render(prompt)
        return None if text is None else self._ids(text, special=False)

    def _render(self, prompt: ChatPrompt) -> str | None:
        if self._template is None:
            return None
        try:
            return self._template.render(
                {**self._special, **prompt.options, "messages": prompt.messages, "tools": prompt.tools}
            )
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError, RecursionError):
            # Whatever a client's messages make of the template: the engine will say so to the client.
            return None
        except (AttributeError, MemoryError):
            return None

    def _ids(self, text: str, *, special: bool) -> list[int] | None:
        most = (self._most + CUT_TOKENS) * CHARACTERS_PER_TOKEN
        try:
            ids: list[int] = self._tokenizer.encode(text[:most], add_special_tokens=special).ids
        except (UnicodeError, TypeError, ValueError):
            # Lone surrogates are no text.
            return None
        if len(text) > most:
            del ids[-CUT_TOKENS:]
        return ids[: self._most]


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.exists():
        return {}
    config = json.loads(file.read_text("utf-8"))
    if not isinstance(config, dict):
        raise TypeError(f"{CONFIG_FILE} is no JSON object")
    return config


def _template(folder: Path, config: dict[str, Any]) -> Template | None:
    """The chat template, compiled as transformers does it; None if the model has none."""
    file = folder / TEMPLATE_FILE
    source = file.read_text("utf-8") if file.exists() else config.get("chat_template")
    if isinstance(source, list):
        named = {one["name"]: one["template"] for one in source}
        source = named.get("default")
    if not isinstance(source, str):
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def _content_of(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
