"""Responses that the gateway reads itself instead of passing them on: gathered up to a bound, or drained."""

from __future__ import annotations

from collections.abc import Callable

from penstock.ingress.chunked_body import ChunkedBody
from penstock.ingress.http_wire import CHUNKED, ResponseHead
from penstock.ingress.ports import ResponseListener


class Collector:
    """Hears of one response's body (`penstock.ingress.ports.ResponseListener`).

    `done` gets it whole, `lost` why it does not; one of them is called, once. Whoever is told `lost` ends the
    connection."""

    def __init__(
        self, head: ResponseHead, most_bytes: int, done: Callable[[bytes], None], lost: Callable[[str], None]
    ) -> None:
        self._most_bytes, self._done, self._lost = most_bytes, done, lost
        self._chunked = ChunkedBody(collect=True) if head.length == CHUNKED else None
        self._data = bytearray()
        self._over = False

    def upstream_flush(self) -> None:
        """Nothing is held back."""

    def upstream_data(self, data: bytes, boundary: bool) -> None:
        """Keep a piece."""
        if self._over:
            return
        if self._chunked is not None:
            self._chunked.feed(data)
            self._data = self._chunked.data
        else:
            self._data += data
        if len(self._data) > self._most_bytes:
            self._over = True
            self._data = bytearray()
            self._lost(f"it answered with more than {self._most_bytes} bytes")

    def upstream_done(self) -> None:
        """All of it is here."""
        if not self._over:
            self._over = True
            self._done(bytes(self._data))

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        """It broke off."""
        if not self._over:
            self._over = True
            self._lost(cause)


class Drain:
    """Hears of a response's body that nobody reads; `over` is called at its end, whole or not."""

    def __init__(self, over: Callable[[], None]) -> None:
        self._over = over

    def upstream_flush(self) -> None:
        """Nothing is held back."""

    def upstream_data(self, data: bytes, boundary: bool) -> None:
        """Let it go."""

    def upstream_done(self) -> None:
        """The end."""
        self._over()

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        """The end too."""
        self._over()


class Held:
    """Hears of a response that must not be passed on yet: what came by `hold` is kept, the rest of it waits
    at its connection, which has to be paused."""

    def __init__(self) -> None:
        self._pieces: list[tuple[bytes, bool]] = []
        self._ended = ""
        self._done = False
        self._to: ResponseListener | None = None

    def pass_on(self, listener: ResponseListener) -> None:
        """From here on `listener` hears of it, of what was kept at once."""
        self._to = listener
        pieces, self._pieces = self._pieces, []
        for data, boundary in pieces:
            listener.upstream_data(data, boundary)
        if self._done:
            listener.upstream_done()
        elif self._ended:
            listener.upstream_lost(self._ended, answered=True)
        else:
            listener.upstream_flush()

    def upstream_flush(self) -> None:
        """Pass on, or keep."""
        if self._to is not None:
            self._to.upstream_flush()

    def upstream_data(self, data: bytes, boundary: bool) -> None:
        """Pass on, or keep: no more than one read of a paused connection holds."""
        if self._to is not None:
            self._to.upstream_data(data, boundary)
        else:
            self._pieces.append((data, boundary))

    def upstream_done(self) -> None:
        """Pass on, or keep."""
        if self._to is not None:
            self._to.upstream_done()
        self._done = True

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        """Pass on, or keep."""
        if self._to is not None:
            self._to.upstream_lost(cause, answered=answered)
        self._ended = cause
