"""Decode's part of one pair: its request, and its answer, which may have to wait for prefill's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from penstock.common.model import Instance
from penstock.ingress.attempt import Attempt, Failure, Retry
from penstock.ingress.collecting import Held
from penstock.ingress.disaggregation.bodies import Edit, Members, edited
from penstock.ingress.http_wire import RequestHead, ResponseHead
from penstock.ingress.in_flight import Work
from penstock.ingress.ports import ResponseListener

if TYPE_CHECKING:
    from penstock.ingress.gateway import Gateway


class DecodeOwner(Protocol):
    """Who hears what became of decode: of one of them, once."""

    def decode_answered(self, attempt: Attempt, head: ResponseHead) -> ResponseListener | None:
        """Its answer counts; as `AttemptOwner.answered`."""

    def decode_failed(self, attempt: Attempt, failure: Failure, cause: str) -> None:
        """It did not answer."""


class Decoding:
    """Owns the attempt at the decode instance (`penstock.ingress.attempt.AttemptOwner`)."""

    def __init__(self, gateway: Gateway, owner: DecodeOwner, *, waits: bool) -> None:
        """`waits`: an answer of 200 is held back until `agree`."""
        self._gateway, self._owner, self._waits = gateway, owner, waits
        self._held: tuple[Attempt, ResponseHead, Held] | None = None
        self.attempt: Attempt

    def prepare(
        self,
        instance: Instance,
        client_head: RequestHead,
        request_id: str,
        parts: Members,
        edit: Edit,
        work: Work,
        *,
        retry: bool,
    ) -> None:
        """Make the request, which `go` sends. `work` is in the account until this is closed; `retry`: of
        another pair."""
        body = edited(parts, edit)
        wire = self._gateway.upstream_head(client_head, instance, request_id, len(body))
        make = Retry if retry else Attempt
        self.attempt = make(self._gateway, self, instance, instance.id, work, wire, body)

    def go(self) -> None:
        """Take a connection."""
        gateway, instance = self._gateway, self.attempt.instance
        assert instance is not None
        if gateway.tripped:
            gateway.breakers.sent(instance.id, gateway.clock())
        gateway.upstreams.acquire(instance, self.attempt)

    def agree(self) -> None:
        """Prefill has said yes too: the answer counts, also one that is here already."""
        self._waits = False
        if self._held is None:
            return
        (attempt, head, held), self._held = self._held, None
        listener = self._owner.decode_answered(attempt, head)
        if listener is not None:
            held.pass_on(listener)
            attempt.resume()

    def answered(self, attempt: Attempt, head: ResponseHead) -> ResponseListener | None:
        """A head has come."""
        if self._waits and head.status == 200:
            held = Held()
            attempt.pause()
            self._held = attempt, head, held
            return held
        return self._owner.decode_answered(attempt, head)

    def failed(self, attempt: Attempt, failure: Failure, cause: str) -> None:
        """No response."""
        self._owner.decode_failed(attempt, failure, cause)

    def close(self) -> None:
        """Let go of everything. More than once is once."""
        self._held = None
        self.attempt.close()
