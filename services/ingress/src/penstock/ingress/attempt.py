"""One attempt at one target: a connection, the request sent, the response's head or a failure."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Protocol

from penstock.common.model import Instance
from penstock.ingress.gateway import Gateway
from penstock.ingress.http_wire import ResponseHead
from penstock.ingress.in_flight import Work
from penstock.ingress.ports import ResponseListener, Upstream, UpstreamListener

if TYPE_CHECKING:
    from penstock.ingress.exchange import Exchange


class Failure(Enum):
    """Why an attempt came to nothing."""

    # A bound of ours: nothing was tried.
    OVERFLOW = "overflow"
    # No connection.
    REFUSED = "refused"
    # A pooled connection that was dead already: nothing of the request can have been worked on.
    STALE = "stale"
    # The connection ended, or spoke no HTTP, before a head came.
    LOST = "lost"
    # An answer with an error status.
    ANSWERED = "answered"
    # No head within the request timeout.
    SILENT = "silent"


class AttemptOwner(Protocol):
    """Who makes attempts; the exchange."""

    def answered(self, attempt: Attempt, head: ResponseHead) -> ResponseListener | None:
        """The response's head: who hears of its body; None ends the attempt here."""

    def failed(self, attempt: Attempt, failure: Failure, cause: str) -> None:
        """No response."""


class Attempt(UpstreamListener):
    """Takes the connection, and lets go of it and of what is accounted for in `close`.

    It hears of its target until the head has come (`penstock.ingress.ports.UpstreamListener`)."""

    retry = False
    __slots__ = (
        *("_body", "_gateway", "_head", "_open", "_owner", "_upstream"),
        *("instance", "sent_at", "target", "work"),
    )

    def __init__(
        self,
        gateway: Gateway,
        owner: Exchange | AttemptOwner,
        instance: Instance | None,
        target: str,
        work: Work,
        head: bytes,
        body: bytes | bytearray,
    ) -> None:
        """`head` and `body` are what the target gets. `instance` is None for an external endpoint. `target`
        is its name among the circuit breakers. `work` with a decision id is in the account until `close`."""
        self._gateway, self._owner, self.instance, self.target = gateway, owner, instance, target
        self.work, self._head, self._body = work, head, body
        self.sent_at = 0.0
        self._upstream: Upstream | None = None
        self._open = True

    def upstream_waits(self, place: Upstream) -> None:
        """All connections to the target are in use."""
        self._upstream = place

    def upstream_connected(self, upstream: Upstream) -> None:
        """Send the request."""
        if not self._open:
            upstream.release()
            return
        self._upstream = upstream
        self.sent_at = self._gateway.clock()
        upstream.send(self._head, self._body)
        self._body = b""

    def upstream_refused(self, cause: str, *, overflow: bool = False) -> None:
        """No connection."""
        if self._open:
            self._owner.failed(self, Failure.OVERFLOW if overflow else Failure.REFUSED, cause)

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        """The target went away before it answered, or answered nonsense."""
        upstream, self._upstream = self._upstream, None
        stale = upstream is not None and upstream.reused and not answered
        self._owner.failed(self, Failure.STALE if stale else Failure.LOST, cause)

    def upstream_head(self, head: ResponseHead) -> ResponseListener | None:
        """The owner says what becomes of it."""
        listener = self._owner.answered(self, head)
        if listener is None:
            self._drop()
        return listener

    def pause(self) -> None:
        """The client reads slowly: its own upstream waits, and nobody else's."""
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        """The client caught up."""
        if self._upstream is not None:
            self._upstream.resume()

    def done(self) -> None:
        """The response is complete: the connection may serve another exchange."""
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.release()

    def close(self) -> None:
        """Let go of everything; a connection still held is cancelled. More than once is once."""
        if self._open:
            self._open = False
            if self._upstream is not None:
                self._drop()
            if self.work.decision_id:
                self._gateway.account.finish(self.work.decision_id)

    def _drop(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()


class Retry(Attempt):
    """One after another attempt failed."""

    retry = True
    __slots__ = ()
