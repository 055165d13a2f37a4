"""Prefill's part of one pair: its request, what it answers, and what else has to be asked before decode."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from penstock.ingress.attempt import Attempt, Failure, Retry
from penstock.ingress.collecting import Collector, Drain
from penstock.ingress.disaggregation.bodies import Members, edited, parameters_in
from penstock.ingress.disaggregation.protocol import Answer, Order, Pair, Question
from penstock.ingress.disaggregation.protocols import Method
from penstock.ingress.errands import Errand
from penstock.ingress.http_wire import RequestHead, ResponseHead
from penstock.ingress.in_flight import Work
from penstock.ingress.ports import ResponseListener

if TYPE_CHECKING:
    from penstock.ingress.dividing import Dividing
    from penstock.ingress.gateway import Gateway

# Block ids of a prompt of a million tokens take half of it.
MAX_ANSWER_BYTES = 1024 * 1024
# The answer is read here, not by the client.
_ACCEPT_ENCODING = re.compile(rb"^accept-encoding:[^\r\n]*\r\n", re.IGNORECASE | re.MULTILINE)


class PrefillOwner(Protocol):
    """Who hears what became of prefill: of one of the last three, once."""

    def prefill_agreed(self) -> None:
        """It has answered 200, in a protocol where that is all."""

    def prefill_done(self, answer: Answer) -> None:
        """The prompt is computed, and decode may be asked."""

    def prefill_refused(self, attempt: Attempt, head: ResponseHead) -> ResponseListener | None:
        """It answered something else than 200; as `AttemptOwner.answered`."""

    def prefill_failed(self, attempt: Attempt, failure: Failure, cause: str) -> None:
        """It did not answer, or nothing of use."""


class Prefilling:
    """Owns the attempt at the prefill instance (`penstock.ingress.attempt.AttemptOwner`)."""

    # When the answer was complete.
    answered_at = 0.0
    attempt: Attempt
    _errand: Errand | None = None
    _open = True
    _refused = False

    def __init__(
        self, gateway: Gateway, dividing: Dividing, owner: PrefillOwner, method: Method, pair: Pair
    ) -> None:
        self._gateway, self._dividing, self._owner = gateway, dividing, owner
        self._method, self._pair = method, pair

    @property
    def pending(self) -> bool:
        """Whether its answer, or one to what else was asked, is to come."""
        return self._open and not self._refused and (not self.answered_at or self._errand is not None)

    @property
    def may_hold(self) -> bool:
        """Whether the instance may keep the prompt, or compute it."""
        return self.attempt.sent_at > 0 and not self._refused

    def send(self, client_head: RequestHead, parts: Members, work: Work, *, retry: bool) -> None:
        """`work` is in the account until this is closed, or the prompt computed; `retry`: of another pair."""
        pair, gateway = self._pair, self._gateway
        lacks = self._method.protocol.missing(pair.prefill)
        body = b"" if lacks else edited(parts, self._method.protocol.prefill(pair, parts))
        head = client_head.with_length(len(body))
        head.block = _ACCEPT_ENCODING.sub(b"", head.block)
        wire = gateway.upstream_head(head, pair.prefill, pair.request_id, len(body))
        make = Retry if retry else Attempt
        self.attempt = make(gateway, self, pair.prefill, pair.prefill.id, work, wire, body)
        if lacks:
            self._owner.prefill_failed(self.attempt, Failure.REFUSED, f"its record lacks {lacks}")
            return
        if gateway.tripped:
            gateway.breakers.sent(pair.prefill.id, gateway.clock())
        gateway.upstreams.acquire(pair.prefill, self.attempt)

    def answered(self, attempt: Attempt, head: ResponseHead) -> ResponseListener | None:
        """A head has come."""
        if head.status != 200:
            self._refused = True
            return self._owner.prefill_refused(attempt, head)
        if self._method.protocol.order is Order.TOGETHER:
            self._computed()
            self._owner.prefill_agreed()
            return Drain(self._released)
        if head.encoded:
            self._lost("its answer is compressed, which nobody asked for")
            return None
        # Of a stream nothing is read, and it holds nothing.
        read = not head.event_stream
        return Collector(
            head, MAX_ANSWER_BYTES, self._read if read else lambda _: self._read(b"{}"), self._lost
        )

    def failed(self, attempt: Attempt, failure: Failure, cause: str) -> None:
        """No response."""
        self._owner.prefill_failed(attempt, failure, cause)

    def late(self, limit_s: float) -> None:
        """It took too long."""
        cause = f"no answer to prefill within {limit_s:g} s"
        self._owner.prefill_failed(self.attempt, Failure.SILENT, cause)

    def close(self) -> None:
        """Let go of everything. More than once is once."""
        if self._open and not self.answered_at and self._gateway.tripped:
            self._gateway.breakers.undecided(self.attempt.target)
        self._open = False
        self.attempt.close()
        if self._errand is not None:
            self._errand.close()
            self._errand = None

    def _read(self, body: bytes) -> None:
        self._computed()
        self._released()
        try:
            answer = Answer(parameters_in(body))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._lost("it answered 200 without JSON")
            return
        question = self._method.protocol.question(self._pair, answer)
        if question is None:
            self._owner.prefill_done(answer)
            return
        told = self._dividing.told(self._pair.prefill, question)
        if told is not None:
            self._owner.prefill_done(Answer(answer.parameters, told))
        else:
            self._ask(question, answer)

    def _ask(self, question: Question, answer: Answer) -> None:
        def heard(body: bytes) -> None:
            try:
                said: Any = msgspec.json.decode(body)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                unheard("no JSON")
                return
            self._errand = None
            if self._open:
                self._dividing.learn(self._pair.prefill, question, said)
                self._owner.prefill_done(Answer(answer.parameters, said))

        def unheard(cause: str) -> None:
            self._errand = None
            if self._open:
                self._lost(f"port {question.port} did not answer {question.path}: {cause}")

        errand = self._dividing.errands.get(self._pair.prefill, question.port, question.path, heard, unheard)
        if errand is None:
            unheard("too many questions are open")
        elif errand.open:
            self._errand = errand

    def _computed(self) -> None:
        now, sent_at, work = self._gateway.clock(), self.attempt.sent_at, self.attempt.work
        self.answered_at = now
        self._dividing.prefill_time.observe(now - sent_at)
        uncached = max(0, work.prompt_tokens - work.cached_tokens)
        if self._gateway.failing:
            self._gateway.breakers.succeeded(self.attempt.target, now)
        self._gateway.speeds.first_token(work.instance, sent_at, now, uncached)

    def _released(self) -> None:
        self.attempt.done()
        self.attempt.close()

    def _lost(self, cause: str) -> None:
        self._owner.prefill_failed(self.attempt, Failure.LOST, cause)
