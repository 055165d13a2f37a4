"""An error response that is read whole, to be the client's answer if nothing better comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from penstock.ingress.chunked_body import ChunkedBody
from penstock.ingress.http_wire import CHUNKED, ResponseHead

# Larger bodies are not kept: the client gets the status and an error of ours.
MAX_BYTES = 64 * 1024


class Kept(NamedTuple):
    """A response; `routing` are the header lines that say who answered, `whole` that `body` is what came."""

    head: ResponseHead
    body: bytes
    routing: bytes
    whole: bool


class Keeper:
    """Hears of the body (`penstock.ingress.ports.ResponseListener`); `done` gets the response once, in
    time or through `give_up`."""

    def __init__(self, head: ResponseHead, routing: bytes, source: str, done: Callable[[Kept], None]) -> None:
        """`source`: who answered, for the error in place of a body that is too large or broke off."""
        self._head, self._routing, self._source, self._done = head, routing, source, done
        self._body = bytearray()
        self._chunked = ChunkedBody(collect=True) if head.length == CHUNKED else None
        self._open = True

    def upstream_flush(self) -> None:
        """Nothing is held back."""

    def upstream_data(self, data: bytes, boundary: bool) -> None:
        """A piece."""
        if self._chunked is not None:
            self._chunked.feed(data)
            data = bytes(self._chunked.data)
            self._chunked.data.clear()
        self._body += data
        if len(self._body) > MAX_BYTES:
            self.give_up()

    def upstream_done(self) -> None:
        """It is whole."""
        self._finish(Kept(self._head.with_length(len(self._body)), bytes(self._body), self._routing, True))

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        """It broke off."""
        self.give_up()

    def give_up(self) -> None:
        """Go on without the rest."""
        status = self._head.status
        text = f"{self._source} answered {status}; its answer is too large, or did not come whole"
        error = {"message": text, "type": "api_error", "code": "upstream_error", "param": None}
        body = msgspec.json.encode({"error": error})
        head = ResponseHead(status, self._head.reason, 1)
        head.block, head.length = b"content-type: application/json\r\n", len(body)
        self._finish(Kept(head, body, self._routing, False))

    def _finish(self, kept: Kept) -> None:
        if self._open:
            self._open = False
            self._done(kept)
