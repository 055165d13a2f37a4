"""Request bodies of the OpenAI-compatible API: from bytes to sequences to compute, or a typed error."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec

from penstock.sim import text
from penstock.sim.text import Answer

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
# A prompt is a string or token ids; a list of prompts is allowed too.
Prompts = str | list[str | int | list[int]]

_MOST_SEQUENCES = 256


class ApiError(Exception):
    """An error answer in vLLM's shape, with an integer code."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param

    def body(self) -> bytes:
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}
        return msgspec.json.encode({"error": error})


def bad_request(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, "BadRequestError", message, param)


@dataclass(frozen=True)
class Catalogue:
    """What is served: names, the default first, to the LoRA adapter behind each (empty: the base model)."""

    adapters: Mapping[str, str]
    max_model_len: int

    def resolve(self, model: str | None) -> str:
        """Raises ApiError 404 for a name that is not served."""
        if model is None:
            return next(iter(self.adapters))
        if model not in self.adapters:
            raise ApiError(404, "NotFoundError", f"The model `{model}` does not exist.", "model")
        return model


class Sequence(NamedTuple):
    """One sequence to compute: prompt tokens, and what comes out of it."""

    prompt: bytes
    answer: Answer


class Call(NamedTuple):
    """A request body, understood: `choices` sequences in a row for each prompt.

    `cache_root` separates prefix caches.
    """

    model: str
    sequences: tuple[Sequence, ...]
    cache_root: str
    choices: int = 1
    stream: bool = False
    include_usage: bool = False
    body: Any = None


class StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Body(msgspec.Struct):
    model: str | None = None
    cache_salt: str | None = None


class _Generation(_Body):
    max_tokens: PositiveInt | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=128)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatBody(_Generation, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: PositiveInt | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None


class CompletionBody(_Generation, kw_only=True):
    prompt: Prompts


class ResponsesBody(_Body, kw_only=True):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: PositiveInt | None = None
    stream: bool | None = None
    tools: list[Any] | None = None


class MessagesBody(_Body, kw_only=True):
    messages: list[dict[str, Any]]
    max_tokens: PositiveInt
    system: str | list[Any] | None = None
    stream: bool | None = None
    tools: list[Any] | None = None


class EmbeddingBody(_Body, kw_only=True):
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, msgspec.Meta(ge=1, le=4096)] | None = None


class RerankBody(_Body, kw_only=True):
    query: str
    documents: list[str]
    top_n: Annotated[int, msgspec.Meta(ge=0)] | None = None


class AbortBody(_Body, kw_only=True):
    rid: str


class TokenizeBody(_Body):
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[Any] | None = None


class KvEventsBody(_Body):
    """What goes wrong with KV-cache events: `lose` the next batches, `for_good` if no replay shall bring them
    back; `restart` empties the cache without a word and counts from 0, as a process started anew does."""

    lose: Annotated[int, msgspec.Meta(ge=0, le=10_000)] = 0
    for_good: bool = False
    restart: bool = False


class DetokenizeBody(_Body, kw_only=True):
    tokens: list[int]


B = TypeVar("B", bound=_Body)


def decode(data: bytes, kind: type[B]) -> B:
    """Raises ApiError 400 for anything but a JSON object of that kind."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise bad_request(str(exc)) from exc


def chat(data: bytes, catalogue: Catalogue) -> Call:
    body = decode(data, ChatBody)
    prompt = _chat_tokens(body.messages, body.tools)
    return _choices(body, [prompt], body.max_completion_tokens or body.max_tokens, catalogue)


def completion(data: bytes, catalogue: Catalogue) -> Call:
    body = decode(data, CompletionBody)
    # OpenAI's and vLLM's default of 16 tokens does not apply: an unlimited answer ends by itself.
    return _choices(body, _prompts(body.prompt, "prompt"), body.max_tokens, catalogue)


def responses(data: bytes, catalogue: Catalogue) -> Call:
    body = decode(data, ResponsesBody)
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    # Items that are no messages (tool calls and their results) count under their type.
    messages = [{"role": item.get("type"), **item} for item in items]
    if body.instructions is not None:
        messages.insert(0, {"role": "system", "content": body.instructions})
    prompt = _chat_tokens(messages, body.tools)
    return _generation(body, [prompt], body.max_output_tokens, catalogue, stream=bool(body.stream))


def messages(data: bytes, catalogue: Catalogue) -> Call:
    body = decode(data, MessagesBody)
    system = [] if body.system is None else [{"role": "system", "content": body.system}]
    prompt = _chat_tokens([*system, *body.messages], body.tools)
    return _generation(body, [prompt], body.max_tokens, catalogue, stream=bool(body.stream))


def embedding(data: bytes, catalogue: Catalogue) -> Call:
    body = decode(data, EmbeddingBody)
    return _pooling(body, _prompts(body.input, "input"), catalogue)


def rerank(data: bytes, catalogue: Catalogue) -> Call:
    body = decode(data, RerankBody)
    query = text.tokenize(body.query)
    return _pooling(body, [query + text.tokenize(document) for document in body.documents], catalogue)


def tokens_of(body: TokenizeBody) -> bytes:
    """The tokens that a completion or chat request with the same prompt has."""
    if body.messages is not None:
        return _chat_tokens(body.messages, body.tools)
    if body.prompt is None:
        raise bad_request("prompt or messages is required", "prompt")
    return text.tokenize(body.prompt)


def _chat_tokens(messages: list[dict[str, Any]], tools: object) -> bytes:
    if not messages:
        raise bad_request("messages is empty", "messages")
    try:
        return text.tokenize_chat(messages, tools)
    except (ValueError, RecursionError) as exc:
        raise bad_request(str(exc), "messages") from exc


def _prompts(prompts: Prompts, param: str) -> list[bytes]:
    if isinstance(prompts, str):
        return [text.tokenize(prompts)]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [tokens(prompts, param)]
    return [text.tokenize(item) if isinstance(item, str) else tokens(item, param) for item in prompts]


def tokens(ids: Any, param: str) -> bytes:
    """Raises ApiError 400 for anything but a list of token ids."""
    if not isinstance(ids, list):
        raise bad_request("token ids and strings cannot be mixed", param)
    try:
        return text.from_ids(ids)
    except ValueError as exc:
        raise bad_request(str(exc), param) from exc


def _choices(body: _Generation, prompts: list[bytes], limit: int | None, catalogue: Catalogue) -> Call:
    """A call of the APIs that may answer in several choices."""
    options = body.stream_options
    return _generation(
        body,
        prompts,
        limit,
        catalogue,
        choices=body.n or 1,
        seed=body.seed or 0,
        stops=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
        stream=bool(body.stream),
        include_usage=options is not None and options.include_usage,
    )


def _generation(
    body: _Body,
    prompts: list[bytes],
    limit: int | None,
    catalogue: Catalogue,
    *,
    choices: int = 1,
    seed: int = 0,
    stops: tuple[str, ...] = (),
    stream: bool = False,
    include_usage: bool = False,
) -> Call:
    model = catalogue.resolve(body.model)
    _check(prompts, catalogue.max_model_len - 1, choices)
    sequences = []
    for prompt in prompts:
        room = catalogue.max_model_len - text.count(prompt)
        if limit is not None and limit > room:
            raise bad_request(f"max_tokens is {limit}, the prompt leaves room for {room}", "max_tokens")
        for choice in range(choices):
            answer = text.answer(prompt, limit, model=model, seed=seed + choice, room=room)
            sequences.append(Sequence(prompt, text.stopped(answer, stops)))
    cache_root = _cache_root(body, model, catalogue)
    return Call(model, tuple(sequences), cache_root, choices, stream, include_usage, body)


def _pooling(body: _Body, prompts: list[bytes], catalogue: Catalogue) -> Call:
    """A call whose sequences have no output; the answer's text is the digest the figures are made from."""
    model = catalogue.resolve(body.model)
    _check(prompts, catalogue.max_model_len, 1)
    sequences = tuple(Sequence(p, Answer(text.digest(p, model=model), 0, "stop")) for p in prompts)
    return Call(model=model, sequences=sequences, cache_root=_cache_root(body, model, catalogue), body=body)


def _check(prompts: list[bytes], longest: int, choices: int) -> None:
    if not 1 <= len(prompts) * choices <= _MOST_SEQUENCES:
        raise bad_request(f"a request has 1 to {_MOST_SEQUENCES} prompts times choices")
    for prompt in prompts:
        if not prompt:
            raise bad_request("the prompt is empty", "prompt")
        if text.count(prompt) > longest:
            raise bad_request(
                f"the prompt has {text.count(prompt)} tokens, the model takes {longest}", "input_tokens"
            )


def _cache_root(body: _Body, model: str, catalogue: Catalogue) -> str:
    adapter = catalogue.adapters[model]
    return f"{adapter}\n{body.cache_salt or ''}" if adapter or body.cache_salt else ""
