"""What a request of a limited user spends: its usage asked for, its events counted, its estimate settled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from penstock.ingress.http_wire import ResponseHead
from penstock.ingress.large_bodies import Facts
from penstock.ingress.limits import Held
from penstock.ingress.openai import asking_usage
from penstock.ingress.outcomes import Outcome
from penstock.ingress.request_body import InferenceRequest

if TYPE_CHECKING:
    from penstock.ingress.exchange import Exchange
    from penstock.ingress.relay import Relay

# Where `stream_options` exists.
ASKS_USAGE: Final = frozenset({b"/v1/chat/completions", b"/v1/completions"})
# Ends at which an instance may be at work on a request.
LEAVING: Final = frozenset({Outcome.CLIENT_GONE, Outcome.TIMED_OUT, Outcome.SHUTDOWN})


def ask_for_usage(exchange: Exchange, held: Held, inference: InferenceRequest | Facts) -> None:
    """Have the engine tell the usage of a stream whose tokens are limited, and remember to hide it from a
    client that did not ask. A large body whose members' places are known stays as it is: they would move."""
    if isinstance(inference, Facts) and inference.members:
        return
    if exchange.head.path in ASKS_USAGE:
        body = asking_usage(exchange.body)
        if body is not None:
            exchange.body, held.hide_usage = body, True


def metered(exchange: Exchange, held: Held, relay: Relay, head: ResponseHead) -> bytes:
    """Have the events of a response counted that is about to begin; the header lines that it gets, in the
    place of what `head` tells of limits of its sender's."""
    if head.limited:
        relay.drop_limits()
    if head.event_stream and held.counts_tokens:
        relay.meter(hide=held.hide_usage, chunked=exchange.head.minor > 0)
    return held.headers


def settle(exchange: Exchange, outcome: Outcome, attempting: bool) -> None:
    """Settle what is held for a request that ends; `attempting`: before it was answered."""
    attempt, held = exchange.attempt, exchange.reservation
    if held is not None and held.pending:
        held.leave()
    elif held is not None and held.counts_tokens:
        sent = attempting and attempt is not None and attempt.sent_at > 0
        held.settle(spent(exchange, left_at_work=sent and outcome in LEAVING))


def spent(exchange: Exchange, *, left_at_work: bool) -> int | None:
    """Tokens that a request used as far as anybody can tell when it ends; None: as estimated.

    The engine's own usage if it came. A stream that ended before: the prompt, and an output token for each
    event. Any other answer that broke off: nobody knows. Nothing for an error, nor without an answer, unless
    an instance was `left_at_work`."""
    relay = exchange.relay
    if relay is None:
        if not left_at_work:
            return 0
        return exchange.request.prompt_tokens if exchange.stream else None
    if not 200 <= exchange.status < 300:
        return 0
    prompt, completion, _ = relay.usage()
    if prompt or completion:
        return (prompt or exchange.request.prompt_tokens) + completion
    return exchange.request.prompt_tokens + relay.events if exchange.stream else None
