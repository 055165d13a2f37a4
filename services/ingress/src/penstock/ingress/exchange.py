"""One request's life: placed, connected, sent, relayed, finished. Every path ends in `finish`."""

from __future__ import annotations

import logging
from enum import Enum, StrEnum

from penstock.common.messages import Placement, Rejection, ScheduleRequest
from penstock.common.model import Instance
from penstock.common.routing_events import OUTCOME, OutcomeEvent
from penstock.ingress.chunked_body import ChunkedBody
from penstock.ingress.failures import REJECTIONS, GatewayError
from penstock.ingress.gateway import Gateway
from penstock.ingress.http_wire import CHUNKED, LAST_CHUNK, UNTIL_CLOSE, RequestHead, ResponseHead
from penstock.ingress.in_flight import Work
from penstock.ingress.large_bodies import LARGE_BODY_BYTES, Facts
from penstock.ingress.openai import parse, usage_in
from penstock.ingress.ports import Downstream, Upstream
from penstock.ingress.responses import client_head, error_response, last_event

log = logging.getLogger(__name__)

# Moves to another instance that cost no retry: nothing of the request can have been worked on.
FREE_MOVES = 2
# Enough for a usage object with every detail field, at the end of a response.
TAIL_BYTES = 2048


class State(Enum):
    """Where a request is."""

    PLACING = "placing"
    CONNECTING = "connecting"
    WAITING = "waiting"
    RELAYING = "relaying"
    DONE = "done"


class Outcome(StrEnum):
    """How a request ended."""

    COMPLETED = "completed"
    REJECTED = "rejected"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    CLIENT_GONE = "client_gone"
    SHUTDOWN = "shutdown"


class Exchange:
    """From a whole request to the last byte of its response; knows ports only."""

    # What most requests never change stands here once, and costs none of them an assignment.
    request: ScheduleRequest
    state = State.PLACING
    _upstream: Upstream | None = None
    _instance: Instance | None = None
    _response: ResponseHead | None = None
    _chunked: ChunkedBody | None = None
    _work: Work | None = None
    _policy = _account_id = _error = ""
    _placed_at = _sent_at = _first_byte_at = 0.0
    _paused = _stale = _stream = False
    _stream_clean = True
    _retries = _free_moves = 0
    _status = _bytes_out = _chunks = 0
    _last = _previous = _held = b""

    _body: bytes | bytearray

    def __init__(
        self, gateway: Gateway, downstream: Downstream, head: RequestHead, body: bytes | bytearray
    ) -> None:
        self._gateway, self._downstream, self._head, self._body = gateway, downstream, head, body
        self.request_id = gateway.request_id(head.read.get(b"x-request-id"))
        self._received_at = gateway.clock()
        self.deadline = self._received_at + gateway.settings.request_timeout
        self._decisions: list[str] = []
        self._keep_alive = head.keep_alive

    def start(self, facts: Facts | None = None) -> None:
        """Parse the body and ask for a placement; a large body comes back from its reading as `facts`."""
        gateway = self._gateway
        gateway.exchanges.add(self)
        try:
            gateway.admit()
            if facts is None and len(self._body) > LARGE_BODY_BYTES:
                kind = self._head.header(b"content-type")
                gateway.large_bodies.read(self, self._downstream.peer, self._head.path, kind, self._body)
                return
            inference = facts or parse(self._head.path, self._head.header(b"content-type"), self._body)
            gateway.require_model(inference.model)
            self._stream = inference.stream
            self.request = gateway.schedule_request(self._head, inference, self.request_id)
        except GatewayError as exc:
            self._fail(exc, Outcome.REJECTED)
            return
        self._decisions.append(self.request.decision_id)
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
        self._placed_at = self._placed_at or gateway.clock()
        self._instance, self._policy = instance, placement.policy
        self._account_id = placement.decision_id
        self._work = gateway.account.start(
            placement.decision_id, instance.id, self.request.prompt_tokens, placement.matched_tokens
        )
        self.state = State.CONNECTING
        gateway.upstreams.acquire(instance, self)

    def rejected(self, rejection: Rejection) -> None:
        """No instance. After a failed attempt the failure is the answer, not the lack of others."""
        if self._stale and self._free_moves < FREE_MOVES:
            # A keep-alive race says nothing against the instance, and there is no other one.
            self._stale = False
            self._free_moves += 1
            self._ask_again(self.request.excluded[:-1])
            return
        if self._error:
            self._fail(GatewayError("upstream_unreachable", self._error), Outcome.FAILED)
            return
        code = REJECTIONS[rejection.reason]
        param = {"model_not_found": "model", "invalid_strategy": "routing-strategy"}.get(code)
        error = GatewayError(code, rejection.message, param=param, retry_after_s=rejection.retry_after_s)
        self._fail(error, Outcome.REJECTED)

    def broken(self) -> None:
        """A fault of this program met it. Once the head is out, an error would be taken for the body."""
        text = "the gateway could not handle the request"
        if self.state is State.RELAYING:
            self._error = text
            self._downstream.abort()
            self.finish(Outcome.FAILED)
        elif self.state is not State.DONE:
            error = GatewayError("internal_error", text)
            self._fail(error, Outcome.FAILED)

    # -- upstream ----------------------------------------------------------------------------------

    def upstream_connected(self, upstream: Upstream) -> None:
        """Send the request."""
        if self.state is not State.CONNECTING or self._instance is None:
            upstream.release()
            return
        self._upstream = upstream
        self.state = State.WAITING
        self._sent_at = self._gateway.clock()
        upstream.send(
            self._gateway.upstream_head(self._head, self._instance, self.request_id, len(self._body)),
            self._body,
        )

    def upstream_refused(self, cause: str, *, overflow: bool = False) -> None:
        """No connection: another instance at once, at most twice."""
        if self.state is not State.CONNECTING:
            return
        if overflow:
            self._fail(GatewayError("overloaded", cause, retry_after_s=1.0), Outcome.REJECTED)
            return
        self._again(cause, free=True)

    def upstream_lost(self, cause: str, *, answered: bool) -> None:
        """The instance went away, or answered nonsense."""
        upstream, self._upstream = self._upstream, None
        if self.state is State.WAITING:
            # A pooled connection that dies before any byte is a keep-alive race, not a failed attempt.
            stale = upstream is not None and upstream.reused and not answered
            self._again(cause, free=stale, stale=stale)
        elif self.state is State.RELAYING:
            self._break_off(
                "upstream_unreachable", f"the instance ended the response early: {cause}", Outcome.FAILED
            )

    def upstream_head(self, head: ResponseHead) -> None:
        """Pass the head on, unless another instance is to be tried."""
        if head.status >= 500 and self._retries < self._gateway.settings.retry_max_count:
            self._drop_upstream()
            self._again(f"the instance answered {head.status}", free=False)
            return
        self.state = State.RELAYING
        # No other instance can be asked any more: a stream must not hold its prompt for minutes.
        self._body = b""
        self._response, self._status = head, head.status
        if head.length == CHUNKED and self._head.minor == 0:
            self._chunked = ChunkedBody(collect=True)
        if head.length == UNTIL_CLOSE or self._chunked or self._gateway.draining:
            self._keep_alive = False
        self._touch()
        gateway, routing = self._gateway, b""
        if gateway.settings.expose_routing_headers and self._instance is not None:
            routing = gateway.routing_headers(self._policy, self._instance)
        self._held = client_head(
            head,
            self.request_id,
            routing,
            dechunked=self._chunked is not None,
            keep_alive=self._keep_alive,
        )

    def upstream_flush(self) -> None:
        """Send a head that came without any of its body."""
        if self._held:
            held, self._held = self._held, b""
            self._downstream.write(held)

    def upstream_data(self, data: bytes, boundary: bool) -> None:
        """Pass a piece on as it is."""
        if not self._first_byte_at:
            self._first_byte_at = self._gateway.clock()
            if self._stream and self._status == 200 and self._work is not None:
                self._began(self._work)
        if self._chunked is not None:
            self._chunked.feed(data)
            data = bytes(self._chunked.data)
            self._chunked.data.clear()
            if not data:
                return
        self._bytes_out += len(data)
        if data != LAST_CHUNK:
            self._chunks += 1
            self._previous, self._last = self._last, data
        self._stream_clean = boundary
        if self._held:
            # A write of its own for the head costs another system call, 8 us of the 80 of a request.
            data, self._held = self._held + data, b""
        else:
            self._touch()
        self._downstream.write(data)

    def upstream_done(self) -> None:
        """The response is complete."""
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.release()
        self.upstream_flush()
        self.finish(Outcome.COMPLETED)

    # -- downstream --------------------------------------------------------------------------------

    def client_gone(self) -> None:
        """The client left: cancel the work."""
        if not self._decisions:
            self._gateway.large_bodies.forget(self)
        self.finish(Outcome.CLIENT_GONE)

    def pause(self) -> None:
        """The client reads slowly: its own upstream waits, and nobody else's."""
        self._paused = True
        if self._upstream is not None:
            self._upstream.pause()

    def resume(self) -> None:
        """The client caught up. Time spent waiting for it is not the instance's silence."""
        self._paused = False
        if self._upstream is not None:
            self._touch()
            self._upstream.resume()

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
        self._drop_upstream()
        self._release()
        gateway = self._gateway
        gateway.exchanges.discard(self)
        now = gateway.clock()
        if self._decisions:
            self._log(outcome, now)
        gateway.count(outcome, self._status, self._received_at, self._first_byte_at, now)
        if outcome is not Outcome.CLIENT_GONE:
            complete = terminated or outcome is Outcome.COMPLETED or not relaying
            self._downstream.exchange_done(self._keep_alive and complete)

    def _again(self, cause: str, *, free: bool, stale: bool = False) -> None:
        """Another instance, if the request may still move; the failed one is excluded."""
        self._stale = stale
        failed = self._instance.id if self._instance else ""
        self._error = f"instance {failed}: {cause}"
        if free and self._free_moves < FREE_MOVES:
            self._free_moves += 1
        elif self._retries < self._gateway.settings.retry_max_count:
            self._retries += 1
        else:
            self._fail(GatewayError("upstream_unreachable", self._error), Outcome.FAILED)
            return
        self._release()
        self._gateway.count_move(free)
        self._ask_again((*self.request.excluded, failed))

    def _ask_again(self, excluded: tuple[str, ...]) -> None:
        self.state = State.PLACING
        self.request = self._gateway.another_attempt(self.request, excluded)
        self._decisions.append(self.request.decision_id)
        self._gateway.placer.submit(self)

    def _release(self) -> None:
        if self._account_id:
            self._gateway.account.finish(self._account_id)
            self._account_id, self._work = "", None

    def _drop_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.abort()

    def _fail(self, error: GatewayError, outcome: Outcome) -> None:
        """An error of ours as the whole response."""
        self._status, self._error = error.status, error.message
        if self._gateway.draining:
            self._keep_alive = False
        self._downstream.write(
            error_response(
                error, self.request_id, keep_alive=self._keep_alive, head_only=self._head.method == b"HEAD"
            )
        )
        self.finish(outcome)

    def _break_off(self, code: str, text: str, outcome: Outcome) -> None:
        """An error after the head went out: a last event for streams, else the connection breaks."""
        self._error = text
        self.upstream_flush()
        event = None
        if self._response is not None and self._stream_clean:
            tail = (self._previous[-8:] + self._last)[-8:]
            error = GatewayError(code, text)
            event = last_event(self._response, tail, error, dechunked=self._chunked is not None)
        if event is None:
            self._downstream.abort()
            self.finish(outcome)
            return
        self._downstream.write(event)
        # Of a chunked one nothing is missing to its client, who may be writing its next request by now.
        self.finish(outcome, terminated=event.endswith(LAST_CHUNK))

    def _began(self, work: Work) -> None:
        """The first piece of a stream: the prompt is computed."""
        gateway = self._gateway
        uncached = max(0, work.prompt_tokens - work.cached_tokens)
        gateway.speeds.first_token(work.instance, self._sent_at, self._first_byte_at, uncached)
        gateway.account.began(work)

    def _touch(self) -> None:
        self.deadline = self._gateway.clock() + self._gateway.settings.stream_idle_timeout
        if self._work is not None:
            self._work.output_tokens = self._chunks

    def _log(self, outcome: Outcome, now: float) -> None:
        gateway, request = self._gateway, self.request
        prompt = completion = cached = 0
        if self._status == 200:
            last = self._last
            tail = last if len(last) >= TAIL_BYTES else self._previous[-TAIL_BYTES:] + last
            prompt, completion, cached = usage_in(tail[-TAIL_BYTES:])
        if outcome is Outcome.COMPLETED and self._status == 200 and self._instance is not None:
            gateway.speeds.answered(
                self._instance.id,
                prompt or request.prompt_tokens,
                completion or (self._chunks if self._stream else 0),
                self._first_byte_at if self._stream else self._sent_at,
                now,
            )
        # In the order of its fields: by name, the 19 of them cost 0.8 us more.
        event = OutcomeEvent(
            self.request_id,
            request.model,
            outcome.value,
            self._status,
            self._head.path.decode("ascii", "replace"),
            gateway.identity.id,
            self._decisions,
            self._instance.id if self._instance else "",
            1 + self._retries + self._free_moves,
            self._stream,
            _ms(self._received_at, self._placed_at),
            _ms(self._received_at, self._first_byte_at),
            _ms(self._received_at, now),
            self._bytes_out,
            self._chunks,
            prompt or request.prompt_tokens,
            completion,
            cached,
            self._error,
        )
        gateway.events.emit(OUTCOME, request.model, self.request_id, event)
        gateway.access_log.add(event)


def _ms(start: float, end: float) -> float:
    return int((end - start) * 1e6) / 1000 if end else 0.0
