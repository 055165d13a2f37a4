"""One request's life: placed, attempted, relayed, finished. Every path ends in `finish`."""

from __future__ import annotations

from enum import Enum

from penstock.common.messages import Placement, Rejection, ScheduleRequest
from penstock.common.model import Instance
from penstock.ingress.attempt import Attempt, Failure
from penstock.ingress.capture import Copied
from penstock.ingress.failures import REJECTIONS, GatewayError
from penstock.ingress.gateway import Gateway
from penstock.ingress.http_wire import CHUNKED, LAST_CHUNK, UNTIL_CLOSE, RequestHead, ResponseHead
from penstock.ingress.large_bodies import LARGE_BODY_BYTES, Facts
from penstock.ingress.openai import parse
from penstock.ingress.outcomes import Outcome, report
from penstock.ingress.ports import Downstream, ResponseListener
from penstock.ingress.relay import Relay
from penstock.ingress.responses import error_response

# Moves to another instance that cost no retry: nothing of the request can have been worked on.
FREE_MOVES = 2


class State(Enum):
    """Where a request is."""

    PLACING = "placing"
    ATTEMPTING = "attempting"
    RELAYING = "relaying"
    DONE = "done"


class Exchange:
    """From a whole request to the last byte of its response; knows ports only."""

    # What most requests never change stands here once, and costs none of them an assignment.
    request: ScheduleRequest
    state = State.PLACING
    attempt: Attempt | None = None
    relay: Relay | None = None
    policy = error = ""
    placed_at = 0.0
    stream = False
    copied: Copied | None = None
    retries = free_moves = status = 0
    _paused = _stale = False

    _body: bytes | bytearray

    def __init__(
        self, gateway: Gateway, downstream: Downstream, head: RequestHead, body: bytes | bytearray
    ) -> None:
        self._gateway, self._downstream, self.head, self._body = gateway, downstream, head, body
        self.request_id = gateway.request_id(head.read.get(b"x-request-id"))
        self.received_at = gateway.clock()
        self.deadline = self.received_at + gateway.settings.request_timeout
        self.decisions: list[str] = []
        self._keep_alive = head.keep_alive

    def start(self, facts: Facts | None = None) -> None:
        """Parse the body and ask for a placement; a large body comes back from its reading as `facts`."""
        gateway = self._gateway
        gateway.exchanges.add(self)
        try:
            gateway.admit()
            if facts is None and len(self._body) > LARGE_BODY_BYTES:
                kind = self.head.header(b"content-type")
                gateway.large_bodies.read(self, self._downstream.peer, self.head.path, kind, self._body)
                return
            inference = facts or parse(self.head.path, self.head.header(b"content-type"), self._body)
            gateway.require_model(inference.model)
            self.stream = inference.stream
            self.request = gateway.schedule_request(self.head, inference, self.request_id)
        except GatewayError as exc:
            self._fail(exc, Outcome.REJECTED)
            return
        if gateway.capture is not None:
            self.copied = gateway.capture.copy(self.head, self._body, inference.model, self.request_id)
        self.decisions.append(self.request.decision_id)
        gateway.placer.submit(self)

    def body_refused(self, error: GatewayError) -> None:
        """The body, a large one, is not valid or could not be read."""
        self._fail(error, Outcome.REJECTED)

    # -- placement ---------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether a placement is still wanted."""
        return self.state is State.PLACING

    def placed(self, placement: Placement, instance: Instance) -> None:
        """Go to `instance`."""
        gateway = self._gateway
        self.placed_at = self.placed_at or gateway.clock()
        self.policy = placement.policy
        work = gateway.account.start(
            placement.decision_id, instance.id, self.request.prompt_tokens, placement.matched_tokens
        )
        head = gateway.upstream_head(self.head, instance, self.request_id, len(self._body))
        self.attempt = Attempt(gateway, self, instance, work, head, self._body)
        self.state = State.ATTEMPTING
        gateway.upstreams.acquire(instance, self.attempt)

    def rejected(self, rejection: Rejection) -> None:
        """No instance. After a failed attempt the failure is the answer, not the lack of others."""
        if self._stale and self.free_moves < FREE_MOVES:
            # A keep-alive race says nothing against the instance, and there is no other one.
            self._stale = False
            self.free_moves += 1
            self._ask_again(self.request.excluded[:-1])
            return
        if self.error:
            self._fail(GatewayError("upstream_unreachable", self.error), Outcome.FAILED)
            return
        code = REJECTIONS[rejection.reason]
        param = {"model_not_found": "model", "invalid_strategy": "routing-strategy"}.get(code)
        error = GatewayError(code, rejection.message, param=param, retry_after_s=rejection.retry_after_s)
        self._fail(error, Outcome.REJECTED)

    def broken(self) -> None:
        """A fault of this program met it. Once the head is out, an error would be taken for the body."""
        text = "the gateway could not handle the request"
        if self.state is State.RELAYING:
            self.error = text
            self._downstream.abort()
            self.finish(Outcome.FAILED)
        elif self.state is not State.DONE:
            error = GatewayError("internal_error", text)
            self._fail(error, Outcome.FAILED)

    # -- attempts ----------------------------------------------------------------------------------

    def failed(self, attempt: Attempt, failure: Failure, cause: str) -> None:
        """No response: another instance, unless there are too many connections already."""
        if failure is Failure.OVERFLOW:
            self._fail(GatewayError("overloaded", cause, retry_after_s=1.0), Outcome.REJECTED)
            return
        self._again(cause, free=failure is not Failure.LOST, stale=failure is Failure.STALE)

    def answered(self, attempt: Attempt, head: ResponseHead) -> ResponseListener | None:
        """Pass the response on, unless another instance is to be tried."""
        gateway = self._gateway
        if head.status >= 500 and self.retries < gateway.settings.retry_max_count:
            self._again(f"the instance answered {head.status}", free=False)
            return None
        self.state = State.RELAYING
        # No other instance can be asked any more: a stream must not hold its prompt for minutes.
        self._body = b""
        self.status = head.status
        relay = self.relay = Relay(self, self._downstream, head, gateway, attempt.work)
        if head.length == CHUNKED and self.head.minor == 0:
            relay.dechunk()
            self._keep_alive = False
        elif head.length == UNTIL_CLOSE or gateway.draining:
            self._keep_alive = False
        routing = b""
        if gateway.settings.expose_routing_headers:
            routing = gateway.routing_headers(self.policy, attempt.instance)
        relay.begin(self.request_id, routing, keep_alive=self._keep_alive)
        return relay

    # -- the response ------------------------------------------------------------------------------

    def response_began(self, now: float) -> None:
        """The first piece of a stream: the prompt is computed."""
        attempt = self.attempt
        if attempt is not None and self.stream and self.status == 200:
            work = attempt.work
            uncached = max(0, work.prompt_tokens - work.cached_tokens)
            self._gateway.speeds.first_token(work.instance, attempt.sent_at, now, uncached)
            self._gateway.account.began(work)

    def response_done(self) -> None:
        """The client has all of it."""
        if self.attempt is not None:
            self.attempt.done()
        self.finish(Outcome.COMPLETED)

    def response_lost(self, cause: str) -> None:
        """The instance went away in the middle of it."""
        text = f"the instance ended the response early: {cause}"
        self._break_off("upstream_unreachable", text, Outcome.FAILED)

    # -- downstream --------------------------------------------------------------------------------

    def client_gone(self) -> None:
        """The client left: cancel the work."""
        if not self.decisions:
            self._gateway.large_bodies.forget(self)
        self.finish(Outcome.CLIENT_GONE)

    def pause(self) -> None:
        """The client reads slowly: its own upstream waits, and nobody else's."""
        self._paused = True
        if self.attempt is not None:
            self.attempt.pause()

    def resume(self) -> None:
        """The client caught up. Time spent waiting for it is not the instance's silence."""
        self._paused = False
        if self.relay is not None:
            self.relay.touch()
        if self.attempt is not None:
            self.attempt.resume()

    # -- ends --------------------------------------------------------------------------------------

    def expire(self) -> None:
        """The deadline passed."""
        settings = self._gateway.settings
        if self.state is State.RELAYING:
            who = "the client read" if self._paused else "the instance sent"
            text = f"{who} nothing for {settings.stream_idle_timeout:g} s"
            self._break_off("upstream_timeout", text, Outcome.TIMED_OUT)
        else:
            text = f"no response within {settings.request_timeout:g} s"
            self._fail(GatewayError("upstream_timeout", text), Outcome.TIMED_OUT)

    def shut_down(self) -> None:
        """The drain timeout is over."""
        text = "the gateway is shutting down"
        if self.state is State.RELAYING:
            self._break_off("shutting_down", text, Outcome.SHUTDOWN)
        else:
            self._fail(GatewayError("shutting_down", text, retry_after_s=1.0), Outcome.SHUTDOWN)

    def finish(self, outcome: Outcome, *, terminated: bool = False) -> None:
        """The one way out: releases what is held, tells the log, hands the connection back. `terminated`: a
        response that was broken off has its last chunk all the same."""
        if self.state is State.DONE:
            return
        relaying = self.state is State.RELAYING
        self.state = State.DONE
        if self.attempt is not None:
            self.attempt.close()
        self._gateway.exchanges.discard(self)
        report(self._gateway, self, outcome)
        # They know this exchange: a cycle would wait for the garbage collector, body and all.
        self.attempt = self.relay = None
        if outcome is not Outcome.CLIENT_GONE:
            complete = terminated or outcome is Outcome.COMPLETED or not relaying
            self._downstream.exchange_done(self._keep_alive and complete)

    def _again(self, cause: str, *, free: bool, stale: bool = False) -> None:
        """Another instance, if the request may still move; the failed one is excluded."""
        self._stale = stale
        failed = self.attempt.instance.id if self.attempt else ""
        self.error = f"instance {failed}: {cause}"
        if free and self.free_moves < FREE_MOVES:
            self.free_moves += 1
        elif self.retries < self._gateway.settings.retry_max_count:
            self.retries += 1
        else:
            self._fail(GatewayError("upstream_unreachable", self.error), Outcome.FAILED)
            return
        if self.attempt is not None:
            self.attempt.close()
        self._gateway.count_move(free)
        self._ask_again((*self.request.excluded, failed))

    def _ask_again(self, excluded: tuple[str, ...]) -> None:
        self.state = State.PLACING
        self.request = self._gateway.another_attempt(self.request, excluded)
        self.decisions.append(self.request.decision_id)
        self._gateway.placer.submit(self)

    def _fail(self, error: GatewayError, outcome: Outcome) -> None:
        """An error of ours as the whole response."""
        self.status, self.error = error.status, error.message
        if self._gateway.draining:
            self._keep_alive = False
        self._downstream.write(
            error_response(
                error, self.request_id, keep_alive=self._keep_alive, head_only=self.head.method == b"HEAD"
            )
        )
        self.finish(outcome)

    def _break_off(self, code: str, text: str, outcome: Outcome) -> None:
        """An error after the head went out: a last event for streams, else the connection breaks."""
        self.error = text
        event = self.relay.end_with(GatewayError(code, text)) if self.relay is not None else None
        if event is None:
            self._downstream.abort()
            self.finish(outcome)
            return
        # Of a chunked one nothing is missing to its client, who may be writing its next request by now.
        self.finish(outcome, terminated=event.endswith(LAST_CHUNK))
