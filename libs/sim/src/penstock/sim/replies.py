"""Answers of the OpenAI-compatible API, as bytes: whole, or as the events of a stream.

Streams are byte for byte the same however tokens are timed: one event a token, role events before the first.
"""

import base64
import hashlib
import struct
from typing import Any, NamedTuple

import msgspec

from penstock.sim import text
from penstock.sim.chat_form import AFTER, BEFORE, form_of, logprobs_of
from penstock.sim.wire import Call, EmbeddingBody, RerankBody

_DONE = b"data: [DONE]\n\n"
_DEFAULT_DIMENSIONS = 64


class Usage(NamedTuple):
    """Tokens of one request, over all its sequences."""

    prompt: int
    completion: int
    cached: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens": self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Reply:
    """How one request is answered; `request_id` is the client's or a made one, `created` in Unix seconds."""

    id_prefix = ""
    whole_object = ""
    chunk_object = ""

    def __init__(self, call: Call, request_id: str, created: int) -> None:
        self.call = call
        self.answers = [sequence.answer for sequence in call.sequences]
        self._id = self.id_prefix + request_id
        self._created = created

    def whole(self, usage: Usage) -> bytes:
        """The body of an answer that is not streamed."""
        raise NotImplementedError

    def opening(self, usage: Usage) -> bytes:
        """Events before the first token of all."""
        raise NotImplementedError

    def token(self, choice: int, piece: str, finish_reason: str | None) -> bytes:
        """The event of one token: ASCII without need of escapes in JSON; the last one carries a reason."""
        raise NotImplementedError

    def closing(self, usage: Usage) -> bytes:
        """Events after the last token of all."""
        raise NotImplementedError

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self.call.model}


class _ChoicesReply(Reply):
    """Chat and text completions: a list of choices, and `[DONE]` at the end."""

    def __init__(self, call: Call, request_id: str, created: int) -> None:
        super().__init__(call, request_id, created)
        envelope = msgspec.json.encode(self._envelope(self.chunk_object))
        self._chunk = b"data: " + envelope[:-1] + b',"choices":[{"index":'

    def whole(self, usage: Usage) -> bytes:
        choices = [self._choice(i) for i in range(len(self.answers))]
        return msgspec.json.encode(
            {**self._envelope(self.whole_object), "choices": choices, "usage": usage.as_dict()}
        )

    def closing(self, usage: Usage) -> bytes:
        if not self.call.include_usage:
            return _DONE
        last = {**self._envelope(self.chunk_object), "choices": [], "usage": usage.as_dict()}
        return b"data: " + msgspec.json.encode(last) + b"\n\n" + _DONE

    def _choice(self, index: int) -> dict[str, Any]:
        raise NotImplementedError


def _reason(finish_reason: str | None) -> bytes:
    return b'"%b"' % finish_reason.encode() if finish_reason else b"null"


class ChatReply(_ChoicesReply):
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, call: Call, request_id: str, created: int) -> None:
        super().__init__(call, request_id, created)
        self._form = form_of(call.body)

    def opening(self, usage: Usage) -> bytes:
        choices = range(len(self.answers))
        events = [self._event(i, {"role": "assistant", "content": ""}, None, None) for i in choices]
        if self._form.json:
            events += [self._event(i, self._begin(i), None, None) for i in choices]
        return b"".join(events)

    def _begin(self, choice: int) -> dict[str, Any]:
        return {"tool_calls": [self._call(choice, BEFORE)]} if self._form.tool else {"content": BEFORE}

    def token(self, choice: int, piece: str, finish_reason: str | None) -> bytes:
        form = self._form
        if not form.json and not form.logprobs:
            # Nearly all; by hand, since there are so many.
            return b'%b%d,"delta":{"content":"%b"},"logprobs":null,"finish_reason":%b}]}\n\n' % (
                self._chunk,
                choice,
                piece.encode(),
                _reason(finish_reason),
            )
        said = piece + AFTER if form.json and finish_reason == "stop" else piece
        delta = (
            {"tool_calls": [{"index": 0, "function": {"arguments": said}}]}
            if form.tool
            else {"content": said}
        )
        return self._event(choice, delta, piece, self._finish_reason(finish_reason))

    def _event(self, choice: int, delta: dict[str, Any], piece: str | None, reason: str | None) -> bytes:
        logprobs = logprobs_of([piece]) if self._form.logprobs and piece is not None else None
        return b'%b%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]}\n\n' % (
            self._chunk,
            choice,
            msgspec.json.encode(delta),
            msgspec.json.encode(logprobs),
            _reason(reason),
        )

    def _call(self, choice: int, arguments: str) -> dict[str, Any]:
        prompt, model = self.call.sequences[choice].prompt, self.call.model
        name = f"chatcmpl-tool-{text.digest(prompt, model=model, seed=choice)}"
        function = {"name": self._form.tool, "arguments": arguments}
        return {"index": 0, "id": name, "type": "function", "function": function}

    def _finish_reason(self, reason: str | None) -> str | None:
        return "tool_calls" if self._form.tool and reason == "stop" else reason

    def _choice(self, index: int) -> dict[str, Any]:
        answer, form = self.answers[index], self._form
        said = (
            BEFORE + answer.text + (AFTER if answer.finish_reason == "stop" else "")
            if form.json
            else answer.text
        )
        called = self._call(index, said) if form.tool else {}
        called.pop("index", None)
        size = text.TOKEN_BYTES
        pieces = [answer.text[i : i + size] for i in range(0, len(answer.text), size)]
        return {
            "index": index,
            "message": {
                "role": "assistant",
                "content": None if called else said,
                "refusal": None,
                "tool_calls": [called] if called else [],
            },
            "logprobs": logprobs_of(pieces) if form.logprobs else None,
            "finish_reason": self._finish_reason(answer.finish_reason),
            "stop_reason": None,
        }


class CompletionReply(_ChoicesReply):
    id_prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def opening(self, usage: Usage) -> bytes:
        return b""

    def token(self, choice: int, piece: str, finish_reason: str | None) -> bytes:
        return b'%b%d,"text":"%b","logprobs":null,"finish_reason":%b,"stop_reason":null}]}\n\n' % (
            self._chunk,
            choice,
            piece.encode(),
            _reason(finish_reason),
        )

    def _choice(self, index: int) -> dict[str, Any]:
        answer = self.answers[index]
        return {
            "index": index,
            "text": answer.text,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": None,
        }


class EmbeddingReply(Reply):
    id_prefix = "embd-"

    def whole(self, usage: Usage) -> bytes:
        body: EmbeddingBody = self.call.body
        data = []
        for index, answer in enumerate(self.answers):
            vector = embed(answer.text, body.dimensions or _DEFAULT_DIMENSIONS)
            # The floats of both encodings are float32, as an engine computes them.
            packed = struct.pack(f"<{len(vector)}f", *vector)
            as_list = list(struct.unpack(f"<{len(vector)}f", packed))
            value = base64.b64encode(packed).decode() if body.encoding_format == "base64" else as_list
            data.append({"index": index, "object": "embedding", "embedding": value})
        figures = {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt, "completion_tokens": 0}
        return msgspec.json.encode({**self._envelope("list"), "data": data, "usage": figures})


class RerankReply(Reply):
    """Scores are drawn from the digest of query and document; results are in order of falling score."""

    id_prefix = "rerank-"

    def whole(self, usage: Usage) -> bytes:
        body: RerankBody = self.call.body
        results: list[dict[str, Any]] = [
            {"index": i, "document": {"text": body.documents[i]}, "relevance_score": score(answer.text)}
            for i, answer in enumerate(self.answers)
        ]
        results.sort(key=lambda result: -score(self.answers[result["index"]].text))
        return msgspec.json.encode(
            {
                "id": self._id,
                "model": self.call.model,
                "usage": {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt},
                "results": results[: body.top_n or None],
            }
        )


def embed(digest: str, dimensions: int) -> list[float]:
    """A vector of length 1 that depends on every bit of the digest."""
    raw = hashlib.shake_128(digest.encode()).digest(4 * dimensions)
    values = [value / 2**31 for value in struct.unpack(f"<{dimensions}i", raw)]
    norm = sum(value * value for value in values) ** 0.5
    return [value / norm for value in values]


def score(digest: str) -> float:
    """0..1."""
    return int(digest[:8], 16) / (16**8 - 1)
