"""Traced requests: what an exchange does, told in spans. An exchange that is not sampled has no trace, and
while tracing is off nobody asks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from penstock.common.messages import Placement, Rejection, TraceMark
from penstock.common.model import Instance
from penstock.common.tracing import Context, Ids, Kind, Sampler, Span, SpanEvent, Spans, Value
from penstock.ingress.attempt import Attempt, Failure
from penstock.ingress.outcomes import Outcome

if TYPE_CHECKING:
    from penstock.ingress.askers import Asker
    from penstock.ingress.exchange import Exchange
    from penstock.ingress.gateway import Gateway

TRACEPARENT = b"traceparent"
# Of a trace that began here: what the client says of its own is not part of it.
_OTHERS = re.compile(rb"^(?:traceparent|tracestate):[^\r\n]*\r\n", re.IGNORECASE | re.MULTILINE)
_PARENT = re.compile(rb"^traceparent:[^\r\n]*\r\n", re.IGNORECASE | re.MULTILINE)
# As OpenTelemetry's conventions for generative AI name what is asked for.
_OPERATIONS = {b"/v1/completions": "text_completion", b"/v1/embeddings": "embeddings"}
_CHATS = frozenset({b"/v1/chat/completions", b"/v1/responses", b"/v1/messages"})
_FAILURES = frozenset({Outcome.FAILED, Outcome.TIMED_OUT, Outcome.SHUTDOWN})
MAX_EVENTS = 32
WAITING, FAILED = "waiting", "failed"

Attributes = dict[str, Value]


class Tracing:
    """Says which exchanges are traced."""

    def __init__(self, gateway: Gateway, sampler: Sampler, spans: Spans, wall_ns: Callable[[], int]) -> None:
        """`wall_ns`: Unix time in ns."""
        self.spans, self.wall_ns, self.ids = spans, wall_ns, Ids()
        self._gateway, self._sampler = gateway, sampler
        self._placing: set[Trace] = set()

    def sampling(self) -> Callable[[Exchange], None]:
        """What gives some exchanges a trace. To nearly all it costs a call and a number that is counted down:
        0.2 us."""
        sampler, left = self._sampler, self._sampler.gap()

        def sample(exchange: Exchange) -> None:
            nonlocal left
            taken, parent, read = None, None, exchange.head.read
            if TRACEPARENT in read:
                taken, parent = sampler.continues(read[TRACEPARENT])
                if taken is False:
                    return
            if taken is None:
                left -= 1
                if left > 0:
                    return
                left = sampler.gap()
            exchange.trace = Trace(self, exchange, parent)

        return sample

    def placing(self, trace: Trace) -> None:
        """Its exchange asks for a placement: schedule messages say whose trace it is."""
        self._placing.add(trace)
        self._gateway.placer.marks = marks_of

    def settled(self, trace: Trace) -> None:
        """It asks no more. Where nobody does, messages are not looked through."""
        self._placing.discard(trace)
        if not self._placing:
            self._gateway.placer.marks = None


def marks_of(askers: Sequence[Asker]) -> tuple[TraceMark, ...]:
    """Which of them are traced, for the schedulers."""
    return tuple(
        TraceMark(asker.request.decision_id, asker.trace.at.context.pack())
        for asker in askers
        if asker.trace is not None
    )


class Trace:
    """The spans of one request: its own, and below it, one at a time, schedule, waiting, and each call to an
    engine. The exchange tells it what it is about to do."""

    def __init__(self, tracing: Tracing, exchange: Exchange, parent: Context | None) -> None:
        """`parent`: the client's span, if its trace is continued."""
        self._tracing, head = tracing, exchange.head
        self._root = Span(
            f"POST {head.path_text}",
            "server",
            parent.trace_id if parent is not None else tracing.ids.trace(),
            tracing.ids.span(),
            parent.span_id if parent is not None else 0,
            tracing.wall_ns(),
        )
        # The span in hand below the request's, and those of the halves of a pair below it.
        self._step: Span | None = None
        self._prefill: Span | None = None
        self._decode: Span | None = None
        self._block = (_PARENT if parent is not None else _OTHERS).sub(b"", head.block)
        self._operation = "chat" if head.path in _CHATS else _OPERATIONS.get(head.path, "generate_content")

    @property
    def id(self) -> str:
        """In hexadecimal digits."""
        return self._root.trace_id.hex()

    @property
    def at(self) -> Span:
        """The innermost span of the moment."""
        return self._step or self._root

    # -- spans -------------------------------------------------------------------------------------

    def _open(self, name: str, kind: Kind, parent: Span, attributes: Attributes) -> Span:
        tracing = self._tracing
        return Span(
            name,
            kind,
            parent.trace_id,
            tracing.ids.span(),
            parent.span_id,
            tracing.wall_ns(),
            attributes=attributes,
        )

    def _begin(self, exchange: Exchange, name: str, kind: Kind, attributes: Attributes) -> Span:
        self._end(exchange)
        self._step = self._open(name, kind, self._root, attributes)
        return self._step

    def _end(self, exchange: Exchange, error: str = "") -> None:
        """End the step in hand."""
        self._end_prefill(exchange)
        decode, self._decode = self._decode, None
        if decode is not None:
            self._close(decode, error)
        step, self._step = self._step, None
        if step is not None:
            self._close(step, error)

    def _close(self, span: Span, error: str = "") -> None:
        span.end_ns = span.end_ns or self._tracing.wall_ns()
        if error:
            span.error = span.attributes["error.type"] = error
        self._tracing.spans.add(span)

    def _end_prefill(self, exchange: Exchange) -> None:
        span, self._prefill = self._prefill, None
        if span is not None:
            took_ms = exchange.divided.prefill_ms if exchange.divided is not None else 0.0
            # Its request left a little before the span began: what comes next must not begin before its end.
            span.end_ns = min(span.start_ns + int(took_ms * 1e6), self._tracing.wall_ns()) if took_ms else 0
            self._close(span)

    def _note(self, name: str, attributes: Attributes) -> None:
        """An event of the request."""
        if len(self._root.events) < MAX_EVENTS:
            self._root.events.append(SpanEvent(name, self._tracing.wall_ns(), attributes))

    def _call(self, exchange: Exchange, attributes: Attributes) -> None:
        """Begin the span of a call to an engine; what the engine does becomes its child."""
        model = exchange.request.model
        attributes |= {"gen_ai.operation.name": self._operation, "gen_ai.request.model": model}
        span = self._begin(exchange, f"{self._operation} {model}", "client", attributes)
        # A head is of a whole connection: this one is the request's own.
        head = exchange.head = exchange.head.with_length(exchange.head.length)
        head.block = b"%btraceparent: %b\r\n" % (self._block, span.context.traceparent())

    # -- what the exchange does --------------------------------------------------------------------

    def asks(self, exchange: Exchange) -> None:
        """A placement is asked for."""
        self._tracing.placing(self)
        self._begin(exchange, "schedule", "client", {"penstock.decision_id": exchange.request.decision_id})

    def asked(self, exchange: Exchange) -> None:
        """It is on its way, or the exchange stands in line."""
        if exchange.ticket is not None and self.at.name != WAITING:
            self._begin(exchange, WAITING, "internal", {"penstock.priority": exchange.request.priority})

    def placed(self, exchange: Exchange, placement: Placement, instance: Instance) -> None:
        """It goes to `instance`."""
        self._tracing.settled(self)
        if self._step is not None:
            self._step.attributes |= {
                "penstock.policy": placement.policy,
                "penstock.instance": placement.instance,
                "penstock.prefill_instance": placement.prefill_instance,
                "penstock.matched_tokens": placement.matched_tokens,
            }
        self._call(
            exchange,
            {
                "gen_ai.provider.name": str(instance.engine),
                "server.address": instance.endpoint.host,
                "server.port": instance.endpoint.port,
                "penstock.instance": instance.id,
            },
        )

    def rejected(self, exchange: Exchange, rejection: Rejection) -> None:
        """No instance; what waits goes on waiting."""
        if self.at.name != WAITING:
            self._end(exchange, rejection.reason.value)

    def refused(self, exchange: Exchange, code: str) -> None:
        """There is no capacity for it, or none in time."""
        self._end(exchange, code)

    def attempting(self, exchange: Exchange, attempt: Attempt) -> None:
        """A half of a pair, told once; or an external endpoint."""
        prefill = exchange.divided.prefill_instance if exchange.divided is not None else ""
        if not prefill or self._step is None:
            return
        if attempt.target != prefill:
            if exchange.divided is not None and exchange.divided.prefill_ms:
                self._end_prefill(exchange)
            self._decode = self._decode or self._half("decode", self._step, attempt)
        elif self._prefill is None:
            self._prefill = self._half("prefill", self._step, attempt)

    def _half(self, name: str, call: Span, attempt: Attempt) -> Span:
        return self._open(name, "internal", call, {"penstock.instance": attempt.target})

    def goes_outside(self, exchange: Exchange) -> None:
        """It is about to go to an external endpoint."""
        self._end(exchange, FAILED)
        self._note("fallback", {"penstock.cause": exchange.error})
        self._call(exchange, {"gen_ai.provider.name": "external"})

    def failed(self, exchange: Exchange, attempt: Attempt, failure: Failure) -> None:
        """No response."""
        self._note("attempt failed", {"error.type": failure.value, "penstock.target": attempt.target})
        self._end(exchange, failure.value)

    def asks_again(self, exchange: Exchange) -> None:
        """Another instance, after a failure or an answer that was passed over."""
        self._end(exchange, FAILED)
        self._note("retry", {"penstock.cause": exchange.error})

    def ends(self, exchange: Exchange, outcome: Outcome) -> None:
        """All is over, and nothing let go of yet."""
        self._tracing.settled(self)
        usage, step, status = _usage(exchange), self._step, exchange.status
        error = outcome.value if outcome in _FAILURES or status >= 500 else ""
        if step is not None:
            step.attributes |= usage
            if status:
                step.attributes["http.response.status_code"] = status
            self._tell_first_piece(exchange, step)
        self._end(exchange, error)
        root = self._root
        root.attributes |= usage | {
            "http.request.method": "POST",
            "url.path": exchange.head.path_text,
            "http.response.status_code": status,
            "gen_ai.operation.name": self._operation,
            "penstock.request_id": exchange.request_id,
            "penstock.outcome": outcome.value,
            "penstock.stream": exchange.stream,
        }
        if exchange.decisions:
            root.attributes["gen_ai.request.model"] = exchange.request.model
            root.attributes["penstock.attempts"] = 1 + (exchange.detours.attempts if exchange.detours else 0)
        self._close(root, error)

    def _tell_first_piece(self, exchange: Exchange, step: Span) -> None:
        first_at = exchange.relay.first_byte_at if exchange.relay is not None else 0.0
        if first_at:
            at_ns = self._root.start_ns + int((first_at - exchange.received_at) * 1e9)
            step.events.append(SpanEvent("first piece", at_ns))


def _usage(exchange: Exchange) -> Attributes:
    if exchange.relay is None or exchange.status != 200:
        return {}
    prompt, completion, cached = exchange.relay.usage()
    if not (prompt or completion):
        return {}
    return {
        "gen_ai.usage.input_tokens": prompt,
        "gen_ai.usage.output_tokens": completion,
        "gen_ai.usage.cache_read.input_tokens": cached,
    }
