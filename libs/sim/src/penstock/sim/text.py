"""Pseudo-tokenizer and deterministic answers: whoever knows the prompt can compute what the engine will say.

A token is four bytes of UTF-8 text (the last one of a text padded with NUL), so a sequence of n tokens is a
`bytes` of length 4n, and token ids are these bytes read as little-endian u32. Answers are ASCII and a whole
number of tokens; they begin with 16 hex digits, a digest of model, seed and prompt.
"""

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import xxhash

from penstock.sim.spec import FinishReason

TOKEN_BYTES = 4
DEFAULT_MODEL = "sim-model"

# 0xFF never occurs in UTF-8, so no text can imitate the marks around a message.
_MESSAGE_START = b"\xff<m\xff"
_MESSAGE_END = b"\xff>m\xff"

# One token a word.
_WORDS = (
    " ant arm bay bee box bud cap cat cod cot cow cup dam day dew dog dot eel egg elk elm fan fig fin fir fog"
    " fox gem gum hat hay hen ice inn ivy jar jay jet key kid kit lab log map mud net nut oak oar owl pan paw"
    " pea pen pie pot ram ray rib rye sea"
)
_WORD_COUNT = len(_WORDS) // TOKEN_BYTES
# The stride is coprime to the number of words (61), so every word occurs once a round.
_ROUND = "".join(_WORDS[i * 23 % _WORD_COUNT * TOKEN_BYTES :][:TOKEN_BYTES] for i in range(_WORD_COUNT))

_SHORTEST_ANSWER = 16
_LONGEST_ANSWER = 64


class Answer(NamedTuple):
    """`text` is `tokens` tokens long."""

    text: str
    tokens: int
    finish_reason: FinishReason


def tokenize(text: str) -> bytes:
    data = text.encode("utf-8", "surrogatepass")
    return data + b"\0" * (-len(data) % TOKEN_BYTES)


def detokenize(tokens: bytes) -> str:
    """Inverse of `tokenize` for text without NUL; bytes that are no UTF-8 become U+FFFD."""
    return tokens.replace(b"\0", b"").decode("utf-8", "replace")


def count(tokens: bytes) -> int:
    return len(tokens) // TOKEN_BYTES


def token_ids(tokens: bytes) -> list[int]:
    return list(struct.unpack(f"<{count(tokens)}I", tokens))


def from_ids(ids: Sequence[int]) -> bytes:
    """Raises ValueError for an id outside 0..2^32-1."""
    try:
        return struct.pack(f"<{len(ids)}I", *ids)
    except struct.error as exc:
        raise ValueError("token ids are integers from 0 to 4294967295") from exc


def tokenize_chat(messages: Iterable[Mapping[str, Any]], tools: object = None) -> bytes:
    """Tokens of a conversation, message by message and with the mark that asks the assistant to go on.

    An earlier answer becomes the same tokens as when it was generated, so that the next turn finds them in
    the prefix cache. Raises ValueError for a message that is none.
    """
    parts = [] if tools is None else [_MESSAGE_START, tokenize("tools"), tokenize(_json(tools)), _MESSAGE_END]
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str):
            raise ValueError("every message has a role")
        parts += (_MESSAGE_START, tokenize(role), tokenize(_content(message.get("content"))))
        rest = {key: value for key, value in message.items() if key not in ("role", "content")}
        if rest:
            parts.append(tokenize(_json(rest)))
        parts.append(_MESSAGE_END)
    parts += (_MESSAGE_START, tokenize("assistant"))
    return b"".join(parts)


def digest(tokens: bytes, *, model: str, seed: int = 0) -> str:
    """16 hex digits that depend on every bit of the input."""
    state = xxhash.xxh3_64(model.encode("utf-8", "surrogatepass"), seed=seed % 2**64)
    state.update(b"\0" + tokens)
    return state.hexdigest()


def answer(
    tokens: bytes, max_tokens: int | None, *, model: str, seed: int = 0, room: int | None = None
) -> Answer:
    """The answer to a prompt: `max_tokens` long, else 16 to 64 as the prompt has it, at most `room`."""
    mark = digest(tokens, model=model, seed=seed)
    number = int(mark, 16)
    length = max_tokens
    if length is None:
        length = _SHORTEST_ANSWER + number % (_LONGEST_ANSWER - _SHORTEST_ANSWER + 1)
    reason: FinishReason = "stop" if max_tokens is None else "length"
    if room is not None and length > room:
        length, reason = room, "length"
    rounds = _ROUND * (length // _WORD_COUNT + 2)
    start = number % _WORD_COUNT * TOKEN_BYTES
    return Answer((mark + rounds[start:])[: length * TOKEN_BYTES], length, reason)


def stopped(answer: Answer, stops: Sequence[str]) -> Answer:
    """The same up to the first of `stops`: its whole tokens before that, one at least."""
    found = [place for place in map(answer.text.find, filter(None, stops)) if place >= 0]
    if not found:
        return answer
    tokens = max(1, min(found) // TOKEN_BYTES)
    return Answer(answer.text[: tokens * TOKEN_BYTES], tokens, "stop")


def expected_text(
    prompt: str | Sequence[Mapping[str, Any]],
    max_tokens: int | None = None,
    *,
    model: str = DEFAULT_MODEL,
    seed: int = 0,
) -> str:
    """What an engine answers to a completion prompt (string) or a conversation (list of messages)."""
    tokens = tokenize(prompt) if isinstance(prompt, str) else tokenize_chat(prompt)
    return answer(tokens, max_tokens, model=model, seed=seed).text


def _content(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(_part(part) for part in content)
    raise ValueError("message content is a string or a list of parts")


def _part(part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        text = part.get("text")
        return text if isinstance(text, str) else _json(part)
    raise ValueError("a content part is an object")


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
