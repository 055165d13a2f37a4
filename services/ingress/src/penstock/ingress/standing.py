"""What an exchange holds, and where it stands between its first byte and its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from penstock.common.messages import Placement, Rejection, ScheduleRequest
from penstock.common.model import Instance
from penstock.ingress.askers import Asker
from penstock.ingress.attempt import Attempt
from penstock.ingress.capture import Copied
from penstock.ingress.detours import Detours
from penstock.ingress.disaggregation.protocols import PD
from penstock.ingress.divided import Divided
from penstock.ingress.gateway import Gateway
from penstock.ingress.http_wire import RequestHead
from penstock.ingress.limits import Held
from penstock.ingress.ports import Downstream
from penstock.ingress.relay import Relay
from penstock.ingress.states import State
from penstock.ingress.waiting import Ticket

if TYPE_CHECKING:
    from penstock.ingress.exchange import Exchange
    from penstock.ingress.traced import Trace

# An enum's member costs 0.1 us where it is read from its class.
_PLACING: Final = State.PLACING


class Standing(Asker):
    """The part of an exchange that others read, and that does nothing by itself."""

    # Each has all of them from the beginning: to read one that stands in the class costs 30 ns, to set one 4.
    __slots__ = (
        *("_downstream", "_gateway", "_keep_alive", "_paused", "attempt", "body", "copied", "deadline"),
        *("decisions", "detours", "divided", "error", "head", "local_body", "placed_at", "policy", "profile"),
        *("received_at", "rejected_id", "relay", "request", "request_id", "reservation", "state", "status"),
        *("stream", "ticket", "trace", "waited_ms"),
    )

    request: ScheduleRequest

    def __init__(
        self, gateway: Gateway, downstream: Downstream, head: RequestHead, body: bytes | bytearray
    ) -> None:
        self._gateway, self._downstream, self.head, self.body = gateway, downstream, head, body
        self.request_id = gateway.request_id(head.given_id)
        self.received_at = now = gateway.clock()
        self.deadline = now + gateway.request_timeout
        self.state = _PLACING
        self.decisions: list[str] = []
        self.attempt: Attempt | None = None
        self.relay: Relay | None = None
        self.detours: Detours | None = None
        self.divided: Divided | None = None
        self.policy = self.profile = self.error = self.rejected_id = ""
        self.placed_at = 0.0
        self.stream = False
        self.copied: Copied | None = None
        self.reservation: Held | None = None
        self.status = 0
        # What instances get instead of `body`, if their route says so.
        self.local_body: bytes | bytearray = b""
        # Its place in a line, while it waits for capacity, and how long it did.
        self.ticket: Ticket[Exchange] | None = None
        self.waited_ms = 0.0
        # What it tells of itself, if it is sampled.
        self.trace: Trace | None = None
        self._keep_alive, self._paused = head.keep_alive, False

    @property
    def waiting(self) -> bool:
        """Whether a placement is still wanted."""
        return self.state is _PLACING

    def wait_to_retry(self) -> None:
        """Between two attempts."""
        self.state = State.PAUSING

    @property
    def retrying(self) -> bool:
        """Whether it is between two attempts."""
        return self.state is State.PAUSING

    def wait_in_queue(self, until: float) -> None:
        """In the 429 queue, at most until a moment of the clock."""
        self.state, self.deadline = State.QUEUED, until

    @property
    def queued(self) -> bool:
        """Whether it is in the 429 queue."""
        return self.state is State.QUEUED

    @property
    def goes_straight(self) -> bool:
        """Whether nothing but its placement is next: no choice of routes, no copy for the mirror, no
        division, nobody to wait for."""
        gateway, wishes = self._gateway, self.head.wishes
        if gateway.splitting.routes is not None or gateway.capture is not None or gateway.waiting.busy:
            return False
        return not gateway.divides and wishes is not None and wishes.strategy != PD

    def found(self, found: Placement | Rejection, instance: Instance | None) -> None:
        """What its decision came to, which it does not follow yet; an instance is held for it meanwhile."""
        self.rejected_id = found.decision_id
        if isinstance(found, Placement) and instance is not None:
            self._gateway.account.start(
                found.decision_id, instance.id, self.request.prompt_tokens, found.matched_tokens
            )

    def withdraw(self) -> None:
        """Give back what is held for its decision."""
        self._gateway.account.finish(self.request.decision_id)

    def copy(self, model: str) -> None:
        """Copy the request for the mirror, if it is its turn."""
        capture = self._gateway.capture
        if capture is not None:
            self.copied = capture.copy(self.head, self.body, model, self.request_id)

    def routing_lines(self, attempt: Attempt) -> bytes:
        """The header lines that tell a client who answered."""
        lines = b""
        if attempt.instance is not None:
            lines = self._gateway.routing_headers(self.policy, self.profile, attempt.instance)
        if self.divided is not None:
            lines += self._gateway.prefill_headers(self.divided.prefill_instance)
        if self.detours is not None and self.detours.route:
            lines += b"x-penstock-route: %b\r\n" % self.detours.route.encode()
        return lines

    def judge(self, well: bool) -> None:
        """What the attempt in hand says of its target."""
        if self.attempt is not None:
            breakers, now = self._gateway.breakers, self._gateway.clock()
            (breakers.succeeded if well else breakers.failed)(self.attempt.target, now)

    @property
    def sender(self) -> str:
        """Whose answer it is, in words."""
        return "the instance" if self.attempt is None or self.attempt.instance else "the endpoint"
