"""Limits at work: requests are claimed, here or at a store that processes share, before they are placed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

from pydantic import ValidationError

from penstock.common.live_config import USER, Changed, LiveConfig
from penstock.common.telemetry import Metrics
from penstock.ingress.api_keys import ApiKeys
from penstock.ingress.claims import Claim
from penstock.ingress.failures import GatewayError
from penstock.ingress.large_bodies import Facts
from penstock.ingress.limit_settings import Limits, LimitSettings, UserRecord
from penstock.ingress.limits import (
    OUTPUT_TOKENS,
    Correction,
    Held,
    LocalCounts,
    Part,
    Verdict,
    left_s,
    refusal,
)
from penstock.ingress.metering import ask_for_usage
from penstock.ingress.plans import Allowances, Plan
from penstock.ingress.ports import LimitStore
from penstock.ingress.rates import Rates
from penstock.ingress.request_body import InferenceRequest
from penstock.ingress.store_line import StoreLine

if TYPE_CHECKING:
    from penstock.ingress.exchange import Exchange

log = logging.getLogger(__name__)

GENERATES = frozenset({b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages"})
# What a client is told while nobody can be counted.
CLOSED_RETRY_S = 1.0
MAX_OVER = 10_000

Inference = InferenceRequest | Facts
_NO_PARTS: tuple[Part, ...] = ()


class _Local:
    """Counts of this process, at its clock."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._counts, self._wall = LocalCounts(), wall

    def claim(self, parts: Sequence[Part]) -> Verdict:
        """As of `LocalCounts`."""
        return self._counts.claim(parts, self._wall())

    def correct(self, corrections: Iterable[Correction]) -> None:
        """As of `LocalCounts`."""
        self._counts.correct(corrections, self._wall())


class _Over:
    """Counts that a store found at their limits, until their windows are over: who adds to one is likely to
    be refused, and is placed only once it is not."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._last = 0.0

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self._until)

    def add(self, key: str, until: float) -> None:
        """Until a moment of our clock."""
        if len(self._until) >= MAX_OVER:
            self._until.clear()
        self._until[key] = until
        self._last = max(self._last, until)

    def any_of(self, keys: Sequence[str], now: float) -> bool:
        """Whether a claim of these is likely to be refused."""
        if now >= self._last:
            self._until.clear()
        return any(now < self._until.get(key, 0.0) for key in keys)


class Limiter:
    """Allowances, counts of this process, and the line of claims to a shared store."""

    def __init__(
        self,
        settings: LimitSettings,
        metrics: Metrics,
        degraded: Callable[[str, bool, str], None],
        wall: Callable[[], float],
        store: LimitStore | None = None,
    ) -> None:
        """Without `store` this process counts for itself. `wall`: seconds since 1970."""
        self.allowances = Allowances(Limits(rpm=settings.limits_default_rpm, tpm=settings.limits_default_tpm))
        self.rates = Rates()
        # Where requests need keys, which may have limits of their own.
        self.keys: ApiKeys | None = None
        self._on_loss = settings.limits_on_store_loss
        self._degraded = degraded
        self.local, self._wall = _Local(wall), wall
        self._over = _Over()
        self._line = StoreLine(store, metrics, self._say_lost, wall) if store is not None else None
        self._claimed = metrics.counter(
            "penstock_ingress_limits_total",
            "Limited requests: granted; over a limit of requests or tokens; let through (open) or "
            "refused (closed) while the store was away",
            "outcome",
        )
        self._granted = self._claimed.labels("granted")
        metrics.gauge(
            "penstock_ingress_limits_store_lost",
            "1 while --limits-on-store-loss applies",
            lambda: float(self._line is not None and self._line.lost),
            over="max",
        )

    @property
    def if_active(self) -> Limiter | None:
        """Itself while anybody is limited."""
        keys = self.keys is not None and self.keys.limited
        return self if keys or self.allowances.active or self.rates.active else None

    def follow(self, live: LiveConfig, changed: Changed) -> None:
        """Users' records changed. One that is not valid leaves the last good one in place."""
        for kind, user in changed:
            if kind != USER:
                continue
            document = live.get(USER, user)
            try:
                record = UserRecord.model_validate(document.value) if document is not None else None
            except ValidationError as exc:
                log.error("a user's live record is not valid, the last good one stays: %s", _faults(exc))
                continue
            self.allowances.put(user, record)

    def admit(self, exchange: Exchange, user: str, profile: str, inference: Inference) -> bool:
        """Whether it may go on at once; if not, `exchange.go` or `exchange.fail` is called later. `user` and
        `profile` are as it says, empty for none. Raises GatewayError for one over a limit."""
        prompt_tokens, max_tokens = inference.prompt_tokens, inference.max_tokens
        caller, more = exchange.head.caller, _NO_PARTS
        if caller is not None:
            more = caller.counts
        if self.rates.active:
            rate = self.rates.part(inference.model, profile, prompt_tokens, max_tokens)
            if rate is not None:
                more = (*more, rate)
        plan = self.allowances.plan(user, inference.model, more)
        if not plan.counts:
            return True
        tokens = prompt_tokens
        if exchange.head.path in GENERATES:
            tokens += max_tokens or OUTPUT_TOKENS
        line = self._line
        if line is not None and not line.lost:
            leased = line.grant(plan, tokens) if plan.leases is not None else None
            if leased is None:
                self._ask(line, exchange, inference, plan, tokens)
                return False
            self._hold(exchange, inference, leased)
            return True
        parts = plan.parts(tokens)
        if line is None:
            self._take(exchange, inference, plan, parts, self.local.claim(parts))
        else:
            self._without_store(exchange, inference, plan, parts)
        return True

    def _ask(
        self, line: StoreLine, exchange: Exchange, inference: Inference, plan: Plan, tokens: int
    ) -> None:
        claim = Claim(self, exchange, inference, plan, tokens, line)
        exchange.reservation = claim
        line.ask(plan, claim, claim.answered)
        if exchange.goes_straight and not (self._over.any and self._over.any_of(plan.keys, self._wall())):
            claim.go_beside(exchange)

    async def run(self) -> None:
        """Ask the shared store, if there is one: an eternal loop."""
        if self._line is not None:
            await self._line.run()

    def _say_lost(self, lost: bool, cause: str) -> None:
        if lost:
            log.warning("the store of rate limits is away (%s); goes on: %s", cause, self._on_loss)
        else:
            log.info("the store of rate limits is back")
        self._degraded("limits-store", lost, cause)

    def decided(
        self, claim: Claim, exchange: Exchange, inference: Inference, verdict: Verdict | None
    ) -> None:
        """The store's answer to a claim that its request waits for. Raises GatewayError for one over a
        limit."""
        plan, tokens = claim.plan, claim.tokens
        if verdict is None:
            exchange.reservation = None
            self._without_store(exchange, inference, plan, plan.parts(tokens))
        elif verdict[0] >= 0:
            exchange.reservation = None
            self._refuse(plan.parts(tokens), verdict)
        else:
            claim.now, claim.headers = verdict[2], plan.headers(claim, verdict)
            self._hold(exchange, inference, claim)

    def _without_store(
        self, exchange: Exchange, inference: Inference, plan: Plan, parts: Sequence[Part]
    ) -> None:
        if self._on_loss == "local":
            self._take(exchange, inference, plan, parts, self.local.claim(parts))
            return
        self._claimed.inc(self._on_loss)
        if self._on_loss == "closed":
            text = "the store of rate limits is away, and requests cannot be counted"
            raise GatewayError("limits_unavailable", text, retry_after_s=CLOSED_RETRY_S)

    def _take(
        self, exchange: Exchange, inference: Inference, plan: Plan, parts: Sequence[Part], verdict: Verdict
    ) -> None:
        if verdict.over >= 0:
            self._refuse(parts, verdict)
        self._hold(exchange, inference, plan.held(parts, verdict, self.local))

    def _refuse(self, parts: Sequence[Part], verdict: Verdict) -> NoReturn:
        part = parts[verdict.over]
        self._claimed.inc(part.what)
        if self._line is not None:
            self._over.add(part.key, self._wall() + left_s(verdict.now, part.window_s))
        raise refusal(parts, verdict)

    def _hold(self, exchange: Exchange, inference: Inference, held: Held) -> None:
        self._granted.value += 1
        exchange.reservation = held
        if held.counts_tokens and exchange.stream:
            ask_for_usage(exchange, held, inference)


def _faults(exc: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in exc.errors())[:512]
