"""What load generator and responder agree on: an order at the prompt's end, and the bytes that answer it.

The prompt ends with `plan=NONCE/CHUNKS/PACE`, so that the order survives a gateway that writes the JSON
around it anew. No chunks ask for a JSON answer, else that many come as a stream, PACE ms apart (0: as
fast as they can be written). Everything but nonce, number and stamp is constant, lengths included.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import count

PATH = "/v1/chat/completions"
MODEL = "bench-model"
NO_NONCE = b"0" * 16
# Conversations, each with a beginning of its own; what prefix-aware placement can tell apart.
SESSIONS = 64
# Where in the prompt the session's own text ends and each request differs from all others.
SHARED_RATIO = 0.6
_FILLER = "water runs down the penstock and drives the wheel; "
_REQUEST_HEAD = (
    "POST {path} HTTP/1.1\r\nhost: bench.internal\r\naccept: application/json\r\n"
    "user-agent: penstock-bench\r\nauthorization: Bearer bench\r\ncontent-type: application/json\r\n"
    "{more}content-length: {length}\r\n\r\n"
)
_PLAN = b"plan="

_ANSWER = (
    b'{"id":"chatcmpl-%b","object":"chat.completion","created":1700000000,"model":"bench-model",'
    b'"choices":[{"index":0,"message":{"role":"assistant","content":"The wheel turns."},'
    b'"logprobs":null,"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":256,"completion_tokens":16,"total_tokens":272}}'
)
_EVENT = (
    b'data: {"id":"chatcmpl-%b","object":"chat.completion.chunk","created":1700000000,"model":"bench-model",'
    b'"system_fingerprint":"%b","choices":[{"index":0,"delta":{"content":"token %06d"},'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)
DONE = b"data: [DONE]\n\n"


def answer_body(nonce: bytes) -> bytes:
    """The JSON answer to the request with this nonce."""
    return _ANSWER % nonce


def event(nonce: bytes, number: int, stamp: bytes) -> bytes:
    """A stream's event; `stamp` is when it was written, 16 hexadecimal digits of monotonic ns."""
    return _EVENT % (nonce, stamp, number)


EVENT_BYTES = len(event(NO_NONCE, 0, NO_NONCE))
_STAMP_AT = event(NO_NONCE, 0, b"S" * 16).index(b"S" * 16)
STAMP = slice(_STAMP_AT, _STAMP_AT + 16)

# The fields that the engines' HTTP server sends.
_HEAD_BEGIN = b"HTTP/1.1 200 OK\r\ndate: Sat, 01 Jan 2000 00:00:00 GMT\r\nserver: uvicorn\r\n"
_ANSWER_HEAD = _HEAD_BEGIN + (
    b"content-length: %d\r\ncontent-type: application/json\r\n\r\n" % len(answer_body(NO_NONCE))
)
STREAM_HEAD = (
    _HEAD_BEGIN + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_CHUNK_HEAD = b"%x\r\n" % EVENT_BYTES
STREAM_END = b"%x\r\n%b\r\n0\r\n\r\n" % (len(DONE), DONE)


def answer(nonce: bytes) -> bytes:
    """`answer_body` with its head."""
    return _ANSWER_HEAD + _ANSWER % nonce


def chunk(nonce: bytes, number: int, stamp: bytes) -> bytes:
    """`event` as a chunk of a chunked body."""
    return _CHUNK_HEAD + _EVENT % (nonce, stamp, number) + b"\r\n"


def plan_in(body: bytes) -> tuple[bytes, int, int]:
    """(nonce, chunks, pace in ms) that a body asks for; a body without a plan gets a JSON answer."""
    # From the end: a body that nobody rewrote ends with it, whatever its size.
    at = body.rfind(_PLAN) + len(_PLAN)
    if at < len(_PLAN):
        return NO_NONCE, 0, 0
    nonce = body[at : at + 16]
    if body[at + 17 : at + 22] == b"00000":
        return nonce, 0, 0
    return nonce, int(body[at + 17 : at + 22]), int(body[at + 23 : at + 26])


def head(length: int, headers: str = "") -> bytes:
    """The head of a request; `headers` are further lines, each with its CRLF."""
    return _REQUEST_HEAD.format(path=PATH, more=headers, length=length).encode()


class Requests:
    """Chats of exactly `body_bytes`, no two with the same nonce, `SESSIONS` of them with each beginning."""

    def __init__(
        self, rng: random.Random, body_bytes: int, headers: str = "", *, chunks: int = 0, pace_ms: int = 0
    ) -> None:
        self._nonces = count(rng.getrandbits(60))
        self._tail = b'/%05d/%03d"}]}' % (chunks, pace_ms)
        stream = '"stream":true,' if chunks else ""
        begin = f'{{"model":"{MODEL}",{stream}"max_tokens":16,"messages":[{{"role":"user","content":"'
        free = body_bytes - len(begin) - 2 * len(NO_NONCE) - len(b"  " + _PLAN + self._tail)
        self._head = head(body_bytes, headers) + begin.encode()
        self._texts = [_halves(session, free) for session in range(SESSIONS)]

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        """(request, nonce), without an end."""
        head, texts, tail = self._head, self._texts, self._tail
        for number in self._nonces:
            nonce = b"%016x" % number
            shared, own = texts[number % SESSIONS]
            yield b"%b%b %b %b%b%b%b" % (head, shared, nonce, own, _PLAN, nonce, tail), nonce


def _halves(session: int, size: int) -> tuple[bytes, bytes]:
    """A session's text of `size` bytes, cut where its requests begin to differ."""
    text = (f"conversation {session:04d}: " + _FILLER * (size // len(_FILLER) + 1))[:size].encode()
    cut = int(size * SHARED_RATIO)
    return text[:cut], text[cut:]
