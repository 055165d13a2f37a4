"""Bodies too large to be read on the event loop: what a helper process is told and answers, and whose turn
it is. The parser holds the interpreter's lock for as long as it runs, so a thread would not do.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

import msgspec

from penstock.common.block_hash import pack_hashes, pack_tokens, root_seed, token_chain
from penstock.common.messages import MAX_BLOCKS
from penstock.ingress.block_hash import chain, condense
from penstock.ingress.disaggregation.bodies import DIVIDED_PATHS, places
from penstock.ingress.failures import GatewayError
from penstock.ingress.openai import parse

# At this size the worst body known takes 1.3 ms to read, and copying it to another process 0.1 ms.
LARGE_BODY_BYTES = 256 * 1024
# With a tokenizer: 2 KiB of text take it about half a millisecond.
TOKENIZED_BODY_BYTES = 2 * 1024

T = TypeVar("T")


class Setup(msgspec.Struct, frozen=True):
    """What a helper is told first; the secret travels no other way."""

    secret: str
    block_bytes: int
    tokenizer_path: str = ""
    token_block_size: int = 16


class Task(msgspec.Struct, frozen=True):
    """What a helper is to read; `size` bytes of body follow it. `divide`: tell its members apart."""

    path: bytes
    content_type: str
    size: int
    divide: bool = False


class Facts(msgspec.Struct, frozen=True, tag="facts"):
    """What the gateway has to know of a request: `InferenceRequest` with its prompt hashed already, and where
    the members of its body are (`disaggregation.bodies.places`)."""

    model: str
    stream: bool
    prompt_tokens: int
    max_tokens: int
    block_hashes: bytes
    owner: str = ""
    body: bytes = b""
    members: tuple[tuple[str, int, int], ...] = ()


class Refusal(msgspec.Struct, frozen=True, tag="refusal"):
    """A GatewayError on its way back."""

    code: str
    message: str
    param: str | None

    def error(self) -> GatewayError:
        """The error it stands for."""
        return GatewayError(self.code, self.message, param=self.param)


class Tokenizer(Protocol):
    """Knows the tokens that engines make of prompts."""

    def tokens(self, model: str, path: bytes, body: bytes | bytearray) -> list[int] | None:
        """The ids of the prompt in a valid body, the first ones of a long prompt; None if it is not text
        alone, or there is no tokenizer for the model. Raises nothing, whatever the body."""


def read(
    task: Task, body: bytes | bytearray, setup: Setup, tokenizer: Tokenizer | None = None
) -> Facts | Refusal:
    """The helper's whole work: 4 MiB take 3 to 25 ms, and with a tokenizer as long as the first 2,048 blocks
    of the prompt take it. What it cannot read is hashed by its bytes."""
    try:
        inference = parse(task.path, task.content_type, body)
    except GatewayError as exc:
        return Refusal(exc.code, exc.message, exc.param)
    seed = root_seed(setup.secret, inference.model, inference.cache_salt)
    ids = tokenizer.tokens(inference.model, task.path, body) if tokenizer is not None else None
    if ids is None:
        hashes = chain(condense(inference.prompt), seed, setup.block_bytes)
        prompt_tokens = inference.prompt_tokens
    else:
        hashes = pack_hashes(token_chain(pack_tokens(ids), seed, setup.token_block_size, MAX_BLOCKS))
        # Of a prompt longer than these, bytes tell more than the tokens that were counted.
        whole = len(ids) < MAX_BLOCKS * setup.token_block_size
        prompt_tokens = len(ids) if whole else max(len(ids), inference.prompt_tokens)
    divide = task.divide and task.path in DIVIDED_PATHS
    return Facts(
        inference.model,
        inference.stream,
        prompt_tokens,
        inference.max_tokens,
        hashes,
        inference.owner,
        inference.body,
        places(inference.body or body) if divide else (),
    )


class SizedBody:
    """Puts a large body of known length together as it comes, in the manner of `ChunkedBody`: to join the
    pieces of 4 MiB in the end would hold the loop for 3 ms."""

    __slots__ = ("_length", "data", "done", "more", "rest", "size")

    def __init__(self, length: int) -> None:
        self._length = length
        self.data = bytearray()
        self.size = 0
        self.done = self.more = False
        self.rest = b""

    def feed_some(self, piece: bytes, most_chunks: int = 1) -> None:
        """Take the next piece, whole; what follows the body is `rest`."""
        missing = self._length - self.size
        self.data += piece if len(piece) <= missing else piece[:missing]
        self.rest = piece[missing:]
        self.size = len(self.data)
        self.done = self.size == self._length


class FairQueue(Generic[T]):
    """Items of many clients: clients take turns, and each client's items keep their order.

    Where it is full, whoever holds most of it pays: his last item makes room for another client's, and a
    further one of his own is not taken in.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # Clients in the order of their turns; none without an item.
        self._clients: dict[str, deque[T]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        return itertools.chain.from_iterable(self._clients.values())

    def push(self, client: str, item: T) -> T | None:
        """Put `item` in; what had to leave for it, which may be `item` itself."""
        dropped: T | None = None
        if self._count >= self._most:
            held = len(self._clients.get(client, ()))
            greediest = max(self._clients, key=lambda name: len(self._clients[name]), default=client)
            if len(self._clients.get(greediest, ())) <= held + 1:
                return item
            dropped = self._clients[greediest].pop()
            self._count -= 1
        self._clients.setdefault(client, deque()).append(item)
        self._count += 1
        return dropped

    def pop(self) -> T | None:
        """The next item, None if there is none."""
        for client, items in self._clients.items():
            del self._clients[client]
            self._count -= 1
            item = items.popleft()
            if items:
                # Behind everybody else.
                self._clients[client] = items
            return item
        return None

    def remove(self, client: str, item: T) -> None:
        """Take `item` out, if it is still there."""
        items = self._clients.get(client)
        if items is None or item not in items:
            return
        items.remove(item)
        self._count -= 1
        if not items:
            del self._clients[client]
