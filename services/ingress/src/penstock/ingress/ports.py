"""What one exchange needs from the two sides it joins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from penstock.common.model import Instance
from penstock.ingress.failures import GatewayError
from penstock.ingress.http_wire import ResponseHead
from penstock.ingress.large_bodies import Facts
from penstock.ingress.limits import Correction, Parts, Verdict
from penstock.ingress.routes import External


class Downstream(Protocol):
    """The client's connection, for the length of one exchange."""

    @property
    def peer(self) -> str:
        """Whom the connection comes from, for fairness among clients."""

    def write(self, data: bytes) -> None:
        """Send; while the client reads slowly `UpstreamExchange.pause` is called."""

    def exchange_done(self, keep_alive: bool) -> None:
        """The response was written; without `keep_alive` the connection ends after it."""

    def abort(self) -> None:
        """End the connection at once, so that the client sees a broken response."""


class Upstream(Protocol):
    """A connection to an instance, for the length of one exchange."""

    reused: bool

    def send(self, head: bytes, body: bytes | bytearray) -> None:
        """Send the request."""

    def pause(self) -> None:
        """Stop reading: the client is slow."""

    def resume(self) -> None:
        """Read again."""

    def release(self) -> None:
        """The response is complete: the connection may serve another exchange if it still can."""

    def abort(self) -> None:
        """Cancel the request: the instance sees its client go."""


class ResponseListener(Protocol):
    """What hears of a response's body."""

    def upstream_flush(self) -> None:
        """Nothing more is at hand: what was held back to be written in one go has to go out."""

    def upstream_data(self, data: bytes, boundary: bool) -> None:
        """A piece of the body, framing and last chunk included; `boundary` if it ends with a whole chunk."""

    def upstream_done(self) -> None:
        """The body is complete."""

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        """The connection ended, or sent what is not HTTP; `answered` if any byte of a response had come."""


class UpstreamListener(Protocol):
    """What hears of an instance's connection until there is a response; the attempt."""

    # Whether another attempt failed before.
    retry: bool

    def upstream_waits(self, place: Upstream) -> None:
        """It waits until a connection is free, unless it aborts `place`."""

    def upstream_connected(self, upstream: Upstream) -> None:
        """A connection is there."""

    def upstream_refused(self, cause: str, *, overflow: bool = False) -> None:
        """No connection could be had; `overflow`: because of a bound of ours."""

    def upstream_head(self, head: ResponseHead) -> ResponseListener | None:
        """The response's head came: who hears of its body, whose `upstream_flush` follows once what came with
        the head has been told. None: the connection was let go of."""

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        """As of `ResponseListener`, before a head came."""


class Upstreams(Protocol):
    """Connections to all instances."""

    def acquire(self, instance: Instance, listener: UpstreamListener) -> None:
        """Call `upstream_connected` or `upstream_refused`, at once or later; never twice. Where it is later
        because all connections are in use, `upstream_waits` comes before."""


class Externals(Protocol):
    """Connections to external endpoints."""

    def acquire(self, external: External, listener: UpstreamListener) -> None:
        """As of `Upstreams`."""


class BodyListener(Protocol):
    """Who waits for a large body to be read; the exchange."""

    @property
    def waiting(self) -> bool:
        """Whether it still does."""

    def start(self, facts: Facts) -> None:
        """This is what stands in it."""

    def body_refused(self, error: GatewayError) -> None:
        """It is not valid, or could not be read."""


class LargeBodies(Protocol):
    """Reads bodies of more than LARGE_BODY_BYTES away from the event loop."""

    def read(
        self,
        listener: BodyListener,
        client: str,
        path: bytes,
        content_type: str,
        body: bytes | bytearray,
        *,
        divide: bool = False,
    ) -> None:
        """Call `start` later, or `body_refused` at once or later, unless it stops waiting.

        `body` must not change meanwhile; `client` says whose turn it takes; `divide`: its members are to be
        told apart."""

    def forget(self, listener: BodyListener) -> None:
        """The listener has left: give up what waits for it."""


class StoreLost(Exception):
    """The store of rate limits did not answer; the text says why, and holds no secret."""


# Told a verdict for each claim, or why there are none.
Settled = Callable[[list[Verdict] | StoreLost], None]


class LimitStore(Protocol):
    """Counts that all ingress processes share."""

    def settle(self, claims: Sequence[Parts], corrections: Sequence[Correction], settled: Settled) -> None:
        """Apply the corrections, then each claim in order. `settled` is called once, later or at once: with a
        verdict for each claim, or with StoreLost. Without any of them it says whether the store is there. One
        call at a time; one that `close` ends is not told."""

    async def close(self) -> None:
        """Give connections back."""
