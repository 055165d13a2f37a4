"""One request's life: placed, attempted, relayed, finished. Every path ends in `finish`."""

from __future__ import annotations

from typing import Final

from msgspec import structs

from penstock.common.messages import Placement, Reason, Rejection, ScheduleRequest
from penstock.common.model import Instance
from penstock.ingress.attempt import Attempt, Failure, Retry
from penstock.ingress.detours import Detours
from penstock.ingress.disaggregation.protocols import PD
from penstock.ingress.failures import GatewayError
from penstock.ingress.http_wire import CHUNKED, LAST_CHUNK, UNTIL_CLOSE, ResponseHead
from penstock.ingress.kept import Kept
from penstock.ingress.large_bodies import LARGE_BODY_BYTES, Facts
from penstock.ingress.metering import metered, settle
from penstock.ingress.openai import parse
from penstock.ingress.outcomes import Outcome, report
from penstock.ingress.ports import ResponseListener
from penstock.ingress.relay import Relay
from penstock.ingress.request_body import InferenceRequest
from penstock.ingress.responses import client_head, error_response
from penstock.ingress.standing import Standing
from penstock.ingress.states import State

# An enum's member costs 0.1 us where it is read from its class.
_PLACING: Final = State.PLACING
_ATTEMPTING: Final = State.ATTEMPTING
_RELAYING: Final = State.RELAYING
_DONE: Final = State.DONE
_SATURATED: Final = Reason.SATURATED


class Exchange(Standing):
    """From a whole request to the last byte of its response; knows ports only."""

    __slots__ = ()

    def start(self, facts: Facts | None = None, *, by_bytes: bool = False) -> None:
        """Parse the body and ask for a placement; a large body comes back from its reading as `facts`.
        `by_bytes`: without its tokens."""
        gateway = self._gateway
        gateway.exchanges.add(self)
        try:
            if facts is None and not by_bytes and len(self.body) > gateway.most_body_bytes:
                self._read_elsewhere()
                return
            read = parse if by_bytes else gateway.parse
            inference = facts or read(self.head.path, self.head.content_type, self.body)
            self.stream = inference.stream
            if inference.body:
                self.body = inference.body
            if self.head.caller is not None:
                self.head.caller.require(inference.model)
            if gateway.limits is None or gateway.admit_user(self, inference):
                self.go(inference)
        except GatewayError as exc:
            self.fail(exc, Outcome.REJECTED)

    def go(self, inference: InferenceRequest | Facts) -> None:
        """No limit stands against it. Raises GatewayError if nobody can serve it."""
        routes = self._gateway.splitting.routes
        if routes is None:
            self.place(inference)
        else:
            detours = self.detours = Detours(self._gateway, self, routes)
            detours.choose(routes, inference)

    def _read_elsewhere(self) -> None:
        gateway, head = self._gateway, self.head
        if gateway.splitting.routes is None:
            # Before the work, that is.
            gateway.admit()
        divide = gateway.dividing.wants(head.read.get(b"routing-strategy"))
        gateway.large_bodies.read(
            self, self._downstream.peer, head.path, head.content_type, self.body, divide=divide
        )

    def body_refused(self, error: GatewayError) -> None:
        """The body, a large one, is not valid or could not be read. One that was to be read for its tokens
        alone goes by its bytes instead."""
        if error.code == "overloaded" and len(self.body) <= LARGE_BODY_BYTES:
            self.start(by_bytes=True)
        else:
            self.fail(error, Outcome.REJECTED)

    def refused(self, error: GatewayError) -> None:
        """There is no capacity for it, or none in time."""
        if self.ticket is not None:
            self._gateway.waiting.leave(self)
        if self.trace is not None:
            self.trace.refused(self, error.code)
        self.detour().refused(error)

    # -- placement ---------------------------------------------------------------------------------

    def place(self, inference: InferenceRequest | Facts) -> None:
        """Ask for an instance. Raises GatewayError if there cannot be one."""
        gateway = self._gateway
        gateway.admit()
        gateway.require_model(inference.model)
        self.request = request = gateway.schedule_request(self.head, inference, self.request_id)
        if gateway.divides or request.strategy == PD:
            gateway.dividing.begin(self, inference)
        if gateway.tripped:
            self._leave_out(gateway.ejected(inference.model))
        if gateway.capture is not None:
            self.copy(inference.model)
        self.decisions.append(self.request.decision_id)
        self._submit()

    def _leave_out(self, ejected: tuple[str, ...]) -> None:
        if ejected:
            self.request = structs.replace(self.request, excluded=ejected)
            self.detour().eject(ejected)

    def placed(self, placement: Placement, instance: Instance) -> None:
        """Go to `instance`."""
        if self.reservation is not None and self.reservation.pending:
            self.reservation.find(placement, instance)
            return
        gateway = self._gateway
        if self.trace is not None:
            self.trace.placed(self, placement, instance)
        if self.ticket is not None:
            gateway.waiting.leave(self, placed=True)
        self.placed_at = self.placed_at or gateway.clock()
        self.policy, self.profile = placement.policy, placement.profile
        if self.divided is not None and self.divided.placed(placement, instance):
            return
        work = gateway.account.start(
            placement.decision_id, instance.id, self.request.prompt_tokens, placement.matched_tokens
        )
        body = self.local_body or self.body
        head = gateway.upstream_head(self.head, instance, self.request_id, len(body))
        if self.detours is None or not self.detours.moved:
            attempt = Attempt(gateway, self, instance, instance.id, work, head, body)
        else:
            attempt = Retry(gateway, self, instance, instance.id, work, head, body)
        self.attempt = attempt
        self.state = _ATTEMPTING
        if gateway.tripped:
            gateway.breakers.sent(instance.id, gateway.clock())
        gateway.upstreams.acquire(instance, attempt)

    def rejected(self, rejection: Rejection) -> None:
        """No instance. Where none has room, it waits."""
        if self.reservation is not None and self.reservation.pending:
            self.reservation.find(rejection, None)
            return
        self.rejected_id = rejection.decision_id
        if self.trace is not None:
            self.trace.rejected(self, rejection)
        if rejection.reason is _SATURATED:
            self._gateway.waiting.hold(self)
            if self.trace is not None:
                self.trace.asked(self)
        else:
            self.detour().rejected(rejection)

    def ask_again(self, excluded: tuple[str, ...]) -> None:
        """Ask for an instance that is none of `excluded`."""
        if self.trace is not None:
            self.trace.asks_again(self)
        request = self._gateway.another_attempt(self.request, excluded)
        if self.divided is not None:
            self.divided.close()
            request = self.divided.first_stage(request)
        self.ask(request)

    def ask(self, request: ScheduleRequest) -> None:
        """Ask for another placement."""
        self.state, self.request = _PLACING, request
        self.decisions.append(request.decision_id)
        self._submit()

    def _submit(self) -> None:
        """Ask for a placement, behind those who wait for the same instances."""
        waiting, trace = self._gateway.waiting, self.trace
        if trace is not None:
            trace.asks(self)
        if waiting.busy and waiting.queued(self):
            self._gateway.placer.admit((self,))
            if trace is not None:
                trace.asked(self)
        else:
            self._gateway.placer.submit(self)

    def broken(self) -> None:
        """A fault of this program met it. Once the head is out, an error would be taken for the body."""
        text = "the gateway could not handle the request"
        if self.state is _RELAYING:
            self.error = text
            self._downstream.abort()
            self.finish(Outcome.FAILED)
        elif self.state is not _DONE:
            error = GatewayError("internal_error", text)
            self.fail(error, Outcome.FAILED)

    # -- attempts ----------------------------------------------------------------------------------

    def attempting(self, attempt: Attempt) -> None:
        """It is the attempt in hand."""
        self.attempt = attempt
        if self.trace is not None:
            self.trace.attempting(self, attempt)
        self.state = _ATTEMPTING

    def detour(self) -> Detours:
        """What finds other ways for it."""
        if self.detours is None:
            self.detours = Detours(self._gateway, self)
        return self.detours

    def failed(self, attempt: Attempt, failure: Failure, cause: str) -> None:
        """No response."""
        if self.trace is not None:
            self.trace.failed(self, attempt, failure)
        self.detour().failed(attempt, failure, cause)

    def answered(self, attempt: Attempt, head: ResponseHead) -> ResponseListener | None:
        """Pass the response on, unless it is an error and something better may come."""
        gateway = self._gateway
        if head.status >= 400:
            keeper = self.detour().keep(attempt, head)
            if keeper is not None:
                return keeper
        if head.status >= 500 or gateway.failing:
            self.judge(head.status < 500)
        if self.detours is not None:
            self.detours.done(answered=head.status < 400)
        self.state = _RELAYING
        # Nobody else can be asked any more: a stream must not hold its prompt for minutes.
        self.body = self.local_body = b""
        if self.divided is not None:
            self.divided.relayed()
        self.status = head.status
        relay = self.relay = Relay(self, self._downstream, head, gateway, attempt.work)
        if head.length == CHUNKED and self.head.minor == 0:
            relay.dechunk()
            self._keep_alive = False
        elif head.length == UNTIL_CLOSE or gateway.draining:
            self._keep_alive = False
        routing = b""
        if gateway.expose_routing_headers:
            if self.detours is None and self.divided is None and attempt.instance is not None:
                routing = gateway.routing_headers(self.policy, self.profile, attempt.instance)
            else:
                routing = self.routing_lines(attempt)
        if self.reservation is not None:
            routing += metered(self, self.reservation, relay, head)
        relay.begin(self.request_id, routing, keep_alive=self._keep_alive)
        return relay

    # -- the response ------------------------------------------------------------------------------

    def response_began(self, now: float) -> None:
        """The first piece of a stream: the prompt is computed."""
        attempt = self.attempt
        if attempt is not None and self.stream and self.status == 200 and attempt.instance is not None:
            work = attempt.work
            uncached = max(0, work.prompt_tokens - work.cached_tokens)
            self._gateway.speeds.first_token(work.instance, attempt.sent_at, now, uncached)
            self._gateway.account.began(work)
            if self.relay is not None:
                self.relay.gaps = self._gateway.gaps_of_next_stream()
        if self.divided is not None:
            self.divided.began(now)

    def response_done(self) -> None:
        """The client has all of it."""
        if self.attempt is not None:
            self.attempt.done()
        self.finish(Outcome.COMPLETED)

    def response_lost(self, cause: str) -> None:
        """The instance went away in the middle of it."""
        text = f"{self.sender} ended the response early: {cause}"
        self.judge(False)
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
        if self.state is _RELAYING:
            who = "the client read" if self._paused else f"{self.sender} sent"
            if not self._paused:
                self.judge(False)
            text = f"{who} nothing for {settings.stream_idle_timeout:g} s"
            self._break_off("upstream_timeout", text, Outcome.TIMED_OUT)
        elif self.divided is not None and self.divided.expired():
            return
        elif self.detours is None or not self.detours.expired(self.attempt):
            if self.state is _ATTEMPTING and self.attempt is not None and self.attempt.sent_at:
                self.judge(False)
            text = f"no response within {settings.request_timeout:g} s"
            self.fail(GatewayError("upstream_timeout", text), Outcome.TIMED_OUT)

    def shut_down(self) -> None:
        """The drain timeout is over."""
        text = "the gateway is shutting down"
        if self.state is _RELAYING:
            self._break_off("shutting_down", text, Outcome.SHUTDOWN)
        else:
            self.fail(GatewayError("shutting_down", text, retry_after_s=1.0), Outcome.SHUTDOWN)

    def finish(self, outcome: Outcome, *, terminated: bool = False) -> None:
        """The one way out: releases what is held, tells the log, hands the connection back. `terminated`: a
        response that was broken off has its last chunk all the same."""
        if self.state is _DONE:
            return
        relaying, attempting = self.state is _RELAYING, self.state is _ATTEMPTING
        undecided = self.state is _PLACING and self.decisions[-1:] not in ([], [self.rejected_id])
        self.state = _DONE
        gateway = self._gateway
        if self.ticket is not None:
            gateway.waiting.leave(self)
        if self.attempt is not None:
            self.attempt.close()
            if gateway.tripped:
                gateway.breakers.undecided(self.attempt.target)
        if self.detours is not None:
            self.detours.done(answered=False)
        gateway.exchanges.discard(self)
        if self.trace is not None:
            self.trace.ends(self, outcome)
        if self.divided is not None:
            self.divided.close()
        report(gateway, self, outcome, undecided)
        if self.reservation is not None:
            settle(self, outcome, attempting)
        # They know this exchange: a cycle would wait for the garbage collector, body and all.
        self.attempt = self.relay = self.detours = self.divided = None
        if outcome is not Outcome.CLIENT_GONE:
            complete = terminated or outcome is Outcome.COMPLETED or not relaying
            self._downstream.exchange_done(self._keep_alive and complete)

    def answer_with(self, kept: Kept) -> None:
        """An error answer that was kept as the whole response."""
        self.status = kept.head.status
        if self._gateway.draining:
            self._keep_alive = False
        routing = kept.routing if self._gateway.expose_routing_headers else b""
        head = kept.head
        if self.reservation is not None:
            head, routing = head.unlimited(), routing + self.reservation.headers
        lines = client_head(head, self.request_id, routing, dechunked=False, keep_alive=self._keep_alive)
        self._downstream.write(lines + kept.body)
        self.finish(Outcome.COMPLETED)

    def fail(self, error: GatewayError, outcome: Outcome) -> None:
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
