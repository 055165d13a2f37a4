"""Where a request goes that is not simply placed, or whose attempt failed: routes, retries, fallbacks."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from penstock.common.messages import Reason, Rejection
from penstock.common.routing_events import RetryEvent
from penstock.ingress.attempt import Attempt, Failure
from penstock.ingress.backoff import RETRY_FIRST_S, RETRY_MOST_S, delay_s
from penstock.ingress.failures import PARAMS, REJECTIONS, GatewayError
from penstock.ingress.fallbacks import TOO_MANY, Fallbacks
from penstock.ingress.http_wire import ResponseHead
from penstock.ingress.kept import Keeper, Kept
from penstock.ingress.large_bodies import Facts
from penstock.ingress.openai import with_model
from penstock.ingress.outcomes import Outcome
from penstock.ingress.request_body import InferenceRequest
from penstock.ingress.routes import Route, Routes

if TYPE_CHECKING:
    from penstock.ingress.exchange import Exchange
    from penstock.ingress.gateway import Gateway

# Moves to another instance that cost no retry: nothing of the request can have been worked on.
FREE_MOVES = 2
# An error's body that takes longer is given up.
KEEP_S = 1.0
# Rejections that say something of the instances, and nothing of the request.
_OURS = frozenset({Reason.UNKNOWN_MODEL, Reason.NO_INSTANCE, Reason.SATURATED})
_NOT_PLACED = frozenset({"model_not_found", "no_available_instance"})


class Detours:
    """One exchange's way past what fails; made when it is first needed. The client's answer is the last one
    that came from an instance or endpoint, or an error of ours if none did."""

    def __init__(self, gateway: Gateway, exchange: Exchange, routes: Routes | None = None) -> None:
        self._gateway, self._exchange, self._splitting = gateway, exchange, gateway.splitting
        self._routes = routes
        self._fallbacks = Fallbacks(gateway, exchange, routes.chain if routes is not None else ())
        self._retries = self._free_moves = 0
        self._stale = False
        self._ejected: tuple[str, ...] = ()
        self._keeper: Keeper | None = None
        self._kept: Kept | None = None

    @property
    def attempts(self) -> int:
        """How many attempts there were beyond the first."""
        chain = self._fallbacks
        return self._retries + self._free_moves + chain.moves + chain.resends

    @property
    def route(self) -> str:
        """Name of the route in hand; empty without routes."""
        return self._fallbacks.name

    # -- routes ------------------------------------------------------------------------------------

    def choose(self, routes: Routes, inference: InferenceRequest | Facts) -> None:
        """Take the request's route. Raises GatewayError if it cannot be served."""
        exchange, splitting, head = self._exchange, self._splitting, self._exchange.head
        exchange.request = self._gateway.unplaced_request(inference, exchange.request_id)
        session = head.header(b"x-session-id") if splitting.settings.route_sticky_sessions else ""
        user = (head.wishes or self._gateway.wishes_of(head)).user
        route, reason = routes.choose(head, inference.model, session, splitting.draw(), user)
        name = route.name if route is not None else "none"
        if (route is None and routes.chain) or (route is not None and route.external is not None):
            exchange.copy(inference.model)
        splitting.say_routed(exchange.request_id, inference.model, name, reason)
        if route is None:
            text = f"The model '{inference.model}' does not exist."
            self._next("no_route", GatewayError("model_not_found", text, param="model"), Outcome.REJECTED)
        elif route.external is None:
            self._go_local(route, inference)
        elif not self._fallbacks.begin(route):
            error = GatewayError("no_available_instance", exchange.error, retry_after_s=1.0)
            self._next("breaker_open", error, Outcome.REJECTED)

    def _go_local(self, route: Route, inference: InferenceRequest | Facts) -> None:
        exchange = self._exchange
        self._fallbacks.route = route
        if route.rewrite:
            # The fallbacks get the client's body, with models of their own if they want that.
            exchange.local_body = with_model(exchange.head.path, exchange.body, route.rewrite)
            inference = msgspec.structs.replace(inference, model=route.rewrite)
        try:
            exchange.place(inference)
        except GatewayError as exc:
            if exc.code not in _NOT_PLACED:
                raise
            self._next("not_placed", exc, Outcome.REJECTED)

    # -- failures ----------------------------------------------------------------------------------

    def failed(self, attempt: Attempt, failure: Failure, cause: str) -> None:
        """An attempt came to nothing: what is next."""
        exchange, instance = self._exchange, attempt.instance
        if failure is not Failure.OVERFLOW or not attempt.retry:
            exchange.error = f"{self._source(attempt)}: {cause}"
        if failure not in (Failure.OVERFLOW, Failure.STALE):
            self._splitting.breakers.failed(attempt.target, self._gateway.clock())
        attempt.close()
        if exchange.divided is not None:
            exchange.divided.close()
        if instance is not None:
            if failure is Failure.OVERFLOW:
                self._over_bound(attempt, cause)
            else:
                self._instance_failed(instance.id, failure, cause)
        elif failure is Failure.STALE and self._free_moves < FREE_MOVES:
            self._free_moves += 1
            self._fallbacks.again()
        else:
            self._leave_queue("failed")
            outcome = Outcome.TIMED_OUT if failure is Failure.SILENT else Outcome.FAILED
            self._next(failure.value, _last_word(failure, cause, exchange.error), outcome)

    def _instance_failed(self, failed: str, failure: Failure, cause: str) -> None:
        """Another instance, if the request may still move; the failed one is excluded."""
        exchange, gateway = self._exchange, self._gateway
        self._stale = failure is Failure.STALE
        if failure in (Failure.REFUSED, Failure.STALE) and self._free_moves < FREE_MOVES:
            self._free_moves += 1
            gateway.count_move(True)
            exchange.ask_again((*exchange.request.excluded, failed))
        elif self._may_retry and self._retry(failed, failure):
            gateway.count_move(False)
        else:
            self._next(failure.value, _last_word(failure, cause, exchange.error))

    def _over_bound(self, attempt: Attempt, cause: str) -> None:
        """The fallbacks; without one the client hears of the bound, or of what failed before the retry that
        cannot be made."""
        if attempt.retry:
            self._next(Failure.OVERFLOW.value, GatewayError("upstream_unreachable", self._exchange.error))
        else:
            error = _last_word(Failure.OVERFLOW, cause, cause)
            self._next(Failure.OVERFLOW.value, error, Outcome.REJECTED)

    @property
    def moved(self) -> bool:
        """Whether an attempt at an instance failed, and the next one is a retry."""
        return self._retries + self._free_moves > 0

    @property
    def _may_retry(self) -> bool:
        divided = self._exchange.divided
        spent = divided is not None and divided.spent
        return self._retries < self._gateway.settings.retry_max_count and not spent

    def free_move(self) -> bool:
        """Take a move that costs no retry; False if there is none left."""
        if self._free_moves >= FREE_MOVES:
            return False
        self._free_moves += 1
        self._stale = False
        self._gateway.count_move(True)
        return True

    def restart(self, cause: str) -> None:
        """Begin again, for no fault of an instance."""
        exchange = self._exchange
        exchange.error = cause
        if self.free_move():
            exchange.ask_again(exchange.request.excluded)
        else:
            self._next("restart", GatewayError("upstream_unreachable", cause))

    def _retry(self, failed: str, failure: Failure) -> bool:
        """Try another instance after a short wait, if the budget allows it."""
        exchange, gateway, splitting = self._exchange, self._gateway, self._splitting
        delay = delay_s(self._retries, RETRY_FIRST_S, RETRY_MOST_S, splitting.draw())
        allowed = splitting.budget.spend(gateway.seen, gateway.clock())
        event = RetryEvent(
            exchange.request_id,
            exchange.request.model,
            failed,
            failure.value,
            gateway.identity.id,
            self._retries + 1,
            round(delay * 1000, 3) if allowed else 0.0,
            "sent" if allowed else "over_budget",
        )
        splitting.say_retry(event)
        if allowed:
            self._retries += 1
            exchange.wait_to_retry()
            asyncio.get_running_loop().call_later(delay, self._ask_again, failed)
        return allowed

    def _ask_again(self, failed: str) -> None:
        exchange = self._exchange
        if exchange.retrying:
            exchange.ask_again((*exchange.request.excluded, failed))

    def rejected(self, rejection: Rejection) -> None:
        """No instance: the fallbacks, or the last failure as the answer, not the lack of others."""
        exchange = self._exchange
        if self._stale and self._free_moves < FREE_MOVES:
            # A keep-alive race says nothing against the instance, and there is no other one.
            self._stale = False
            self._free_moves += 1
            exchange.ask_again(exchange.request.excluded[:-1])
            return
        ejected, self._ejected = self._ejected, ()
        if ejected and rejection.reason is Reason.NO_INSTANCE:
            # Better an instance that failed lately than none.
            exchange.ask_again(tuple(i for i in exchange.request.excluded if i not in ejected))
            return
        code = REJECTIONS[rejection.reason]
        error = GatewayError(
            code, rejection.message, param=PARAMS.get(code), retry_after_s=rejection.retry_after_s
        )
        if rejection.reason not in _OURS:
            exchange.fail(error, Outcome.REJECTED)
        elif exchange.error:
            self._next("not_placed", GatewayError("upstream_unreachable", exchange.error))
        else:
            self._next("not_placed", error, Outcome.REJECTED)

    def refused(self, error: GatewayError) -> None:
        """No instance had room for it, or none in time."""
        exchange = self._exchange
        if exchange.error:
            self._next("saturated", GatewayError("upstream_unreachable", exchange.error))
        else:
            self._next("saturated", error, Outcome.REJECTED)

    def eject(self, instances: tuple[str, ...]) -> None:
        """These were left out of the request's candidates for failing lately."""
        self._ejected = instances

    def expired(self, attempt: Attempt | None) -> bool:
        """The deadline passed before a response; False if that ends the request."""
        if self._keeper is not None:
            self._keeper.give_up()
        elif attempt is None or attempt.instance is not None:
            if self._kept is None:
                return False
            self._splitting.breakers.failed(attempt.target, self._gateway.clock()) if attempt else None
            self._exchange.answer_with(self._kept)
        elif self._exchange.queued:
            self._leave_queue("expired")
            self._next("expired", GatewayError("upstream_timeout", self._exchange.error))
        else:
            timeout_s = self._gateway.settings.request_timeout
            self.failed(attempt, Failure.SILENT, f"no response within {timeout_s:g} s")
        return True

    # -- answers with an error status --------------------------------------------------------------

    def keep(self, attempt: Attempt, head: ResponseHead) -> Keeper | None:
        """Who reads an error answer while something better may come; None: it is the client's answer."""
        chain = self._fallbacks
        if attempt.instance is not None:
            movable = head.status >= 500 and (self._may_retry or chain.any_left)
        else:
            movable = chain.any_left or (head.status == TOO_MANY and chain.may_queue)
        if not movable:
            return None

        deadline = self._exchange.deadline

        def done(kept: Kept) -> None:
            self._keeper, self._kept = None, kept
            self._exchange.deadline = deadline
            if kept.whole:
                attempt.done()
            self._answered(attempt, kept)

        routing = self._exchange.routing_lines(attempt)
        self._keeper = Keeper(head, routing, self._source(attempt), done)
        self._exchange.deadline = min(deadline, self._gateway.clock() + KEEP_S)
        return self._keeper

    def _answered(self, attempt: Attempt, kept: Kept) -> None:
        status = kept.head.status
        text = f"the {'instance' if attempt.instance else 'endpoint'} answered {status}"
        if attempt.instance is not None or status >= 500:
            self.failed(attempt, Failure.ANSWERED, text)
            return
        self._splitting.breakers.succeeded(attempt.target, self._gateway.clock())
        attempt.close()
        self._exchange.error = f"{self._source(attempt)}: {text}"
        self._leave_queue("")
        if status == TOO_MANY and self._fallbacks.queue_up(kept, datetime.now(UTC)):
            return
        self._next(f"{status // 100}xx", GatewayError("upstream_unreachable", self._exchange.error))

    def done(self, *, answered: bool) -> None:
        """The request moves no more: it is answered, or over."""
        self._leave_queue("answered" if answered else "")

    def _leave_queue(self, result: str) -> None:
        self._fallbacks.leave_queue(result if self._fallbacks.resent else "")

    def _next(self, cause: str, error: GatewayError, outcome: Outcome = Outcome.FAILED) -> None:
        """The next fallback; without one the last answer there was, or else `error`."""
        if self._exchange.divided is not None:
            self._exchange.divided.close()
        if self._fallbacks.next(cause):
            return
        if self._kept is not None:
            self._exchange.answer_with(self._kept)
        else:
            self._exchange.fail(error, outcome)

    def _source(self, attempt: Attempt) -> str:
        return f"instance {attempt.instance.id}" if attempt.instance is not None else self._fallbacks.name


def _last_word(failure: Failure, cause: str, error: str) -> GatewayError:
    """What the client is told if there is nobody left to ask."""
    if failure is Failure.OVERFLOW:
        return GatewayError("overloaded", cause, retry_after_s=1.0, lines="x-envoy-overloaded: true\r\n")
    return GatewayError("upstream_timeout" if failure is Failure.SILENT else "upstream_unreachable", error)
