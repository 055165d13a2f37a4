"""Limits at work: requests are claimed against a store, and settled by what they used when they end."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from pydantic import ValidationError

from penstock.common.live_config import USER, Changed, LiveConfig
from penstock.common.telemetry import Metrics
from penstock.ingress.failures import GatewayError
from penstock.ingress.large_bodies import Facts
from penstock.ingress.limit_settings import Limits, LimitSettings, UserRecord
from penstock.ingress.limits import (
    Allowances,
    Correction,
    Counts,
    LocalCounts,
    Part,
    Reservation,
    Verdict,
    estimate,
    refusal,
)
from penstock.ingress.openai import InferenceRequest, asking_usage
from penstock.ingress.outcomes import Outcome
from penstock.ingress.ports import LimitStore, StoreLost

if TYPE_CHECKING:
    from penstock.ingress.exchange import Exchange
    from penstock.ingress.relay import Relay

log = logging.getLogger(__name__)

GENERATES = frozenset({b"/v1/chat/completions", b"/v1/completions", b"/v1/responses", b"/v1/messages"})
# Where `stream_options` exists.
ASKS_USAGE = frozenset({b"/v1/chat/completions", b"/v1/completions"})
# Ends at which an instance may be at work on a request.
LEAVING = frozenset({Outcome.CLIENT_GONE, Outcome.TIMED_OUT, Outcome.SHUTDOWN})
MAX_BATCH = 512
MAX_CORRECTIONS = 10_000
RETRY_S = 0.25
# What a client is told while nobody can be counted.
CLOSED_RETRY_S = 1.0

Inference = InferenceRequest | Facts


class _Claim(NamedTuple):
    exchange: Exchange
    inference: Inference
    parts: list[Part]


class _Local:
    """Counts of this process, at its clock."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._counts, self._wall = LocalCounts(), wall

    def claim(self, parts: list[Part]) -> Verdict:
        """As of `LocalCounts`."""
        return self._counts.claim(parts, self._wall())

    def correct(self, corrections: Iterable[Correction]) -> None:
        """As of `LocalCounts`."""
        self._counts.correct(corrections, self._wall())


class _Shared:
    """What is on its way to the shared store: corrections, summed by count and window."""

    def __init__(self, dropped: Callable[[int], None], wake: Callable[[], None]) -> None:
        self._dropped, self._wake = dropped, wake
        self._waiting: dict[tuple[str, int, int], int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def correct(self, corrections: Iterable[Correction]) -> None:
        """Keep them until the next turn; beyond MAX_CORRECTIONS they are dropped, and counted."""
        for key, window_s, number, delta in corrections:
            place = key, window_s, number
            if place not in self._waiting and len(self._waiting) >= MAX_CORRECTIONS:
                self._dropped(1)
                continue
            self._waiting[place] = self._waiting.get(place, 0) + delta
        self._wake()

    def take(self, most: int) -> list[Correction]:
        """Up to `most` of them."""
        places = list(itertools.islice(self._waiting, most))
        return [Correction(*place, self._waiting.pop(place)) for place in places]


class Limiter:
    """Allowances, counts, and the line of claims to a shared store."""

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
        self._on_loss = settings.limits_on_store_loss
        self._degraded, self._wall, self._store = degraded, wall, store
        self.local = _Local(wall)
        self._woken = asyncio.Event()
        self._shared = _Shared(self._drop, self._woken.set)
        self._claims: list[_Claim] = []
        self.lost = False
        self._claimed = metrics.counter(
            "penstock_ingress_limits_total",
            "Requests of limited users: granted; over a limit of requests or tokens; let through (open) or "
            "refused (closed) while the store was away",
            "outcome",
        )
        self._dropped = metrics.counter(
            "penstock_ingress_limit_corrections_dropped_total",
            "Corrections of estimated tokens that the store did not get",
        )
        metrics.gauge(
            "penstock_ingress_limits_store_lost",
            "1 while --limits-on-store-loss applies",
            lambda: float(self.lost),
        )

    @property
    def if_active(self) -> Limiter | None:
        """Itself while anybody is limited."""
        return self if self.allowances.active else None

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

    def admit(self, exchange: Exchange, user: str, inference: Inference) -> bool:
        """Whether it may go on at once; if not, `exchange.go` or `exchange.fail` is called later.
        Raises GatewayError for one over a limit."""
        generates = exchange.head.path in GENERATES
        tokens = estimate(inference.prompt_tokens, inference.max_tokens, generates=generates)
        parts = self.allowances.parts(user, inference.model, tokens)
        if not parts:
            return True
        if self._store is None:
            self._take(exchange, inference, parts, self.local.claim(parts), self.local)
        elif self.lost:
            self._without_store(exchange, inference, parts)
        else:
            self._claims.append(_Claim(exchange, inference, parts))
            self._woken.set()
            return False
        return True

    async def run(self) -> None:
        """Ask the shared store, once per turn of the loop for all that came meanwhile: an eternal loop."""
        store = self._store
        if store is None:
            return
        try:
            while True:
                if not self.lost:
                    await self._woken.wait()
                    self._woken.clear()
                await self._turn(store)
                if self.lost:
                    await asyncio.sleep(RETRY_S)
        finally:
            await store.close()

    async def _turn(self, store: LimitStore) -> None:
        claims, self._claims = self._claims[:MAX_BATCH], self._claims[MAX_BATCH:]
        corrections = self._shared.take(MAX_BATCH)
        if self._claims or len(self._shared):
            self._woken.set()
        try:
            verdicts = await store.settle([claim.parts for claim in claims], corrections)
        except StoreLost as exc:
            # Nobody knows whether they were counted, so they are not sent again.
            self._drop(len(corrections))
            self._say_lost(True, str(exc))
            claims, self._claims = [*claims, *self._claims], []
            for claim in claims:
                self._resolve(claim, None)
            return
        self._say_lost(False, "")
        for claim, verdict in zip(claims, verdicts, strict=True):
            self._resolve(claim, verdict)

    def _drop(self, count: int) -> None:
        self._dropped.inc(by=count)

    def _say_lost(self, lost: bool, cause: str) -> None:
        if lost is self.lost:
            return
        self.lost = lost
        if lost:
            log.warning("the store of rate limits is away (%s); goes on: %s", cause, self._on_loss)
        else:
            log.info("the store of rate limits is back")
        self._degraded("limits-store", lost, cause)

    def _resolve(self, claim: _Claim, verdict: Verdict | None) -> None:
        """Tell an exchange; a fault of ours costs the request that met it, not the others."""
        exchange, inference, parts = claim
        try:
            if not exchange.waiting:
                # Its client left meanwhile: what was held for it goes back.
                if verdict is not None and verdict.over < 0:
                    Reservation(parts, verdict, self._shared).settle(0)
                return
            if verdict is None:
                self._without_store(exchange, inference, parts)
            else:
                self._take(exchange, inference, parts, verdict, self._shared)
            exchange.go(inference)
        except GatewayError as exc:
            exchange.fail(exc, Outcome.REJECTED)
        except Exception:
            log.exception("claiming a limit failed")
            exchange.broken()

    def _without_store(self, exchange: Exchange, inference: Inference, parts: list[Part]) -> None:
        if self._on_loss == "local":
            self._take(exchange, inference, parts, self.local.claim(parts), self.local)
            return
        self._claimed.inc(self._on_loss)
        if self._on_loss == "closed":
            text = "the store of rate limits is away, and requests cannot be counted"
            raise GatewayError("limits_unavailable", text, retry_after_s=CLOSED_RETRY_S)

    def _take(
        self,
        exchange: Exchange,
        inference: Inference,
        parts: list[Part],
        verdict: Verdict,
        counts: Counts,
    ) -> None:
        if verdict.over >= 0:
            self._claimed.inc(parts[verdict.over].what)
            raise refusal(parts, verdict)
        self._claimed.inc("granted")
        exchange.reservation = held = Reservation(parts, verdict, counts)
        _ask_for_usage(exchange, held, inference)


def _ask_for_usage(exchange: Exchange, held: Reservation, inference: Inference) -> None:
    """Have the engine tell a stream's usage if tokens are limited, and remember to hide it from a client
    that did not ask. A large body whose members' places are known stays as it is, or they would move."""
    if isinstance(inference, Facts) and inference.members:
        return
    if exchange.stream and held.counts_tokens and exchange.head.path in ASKS_USAGE:
        body = asking_usage(exchange.body)
        if body is not None:
            exchange.body, held.hide_usage = body, True


def metered(exchange: Exchange, held: Reservation, relay: Relay) -> bytes:
    """Have the events of a response counted that is about to begin; the header lines that it gets."""
    relay.meter(hide=held.hide_usage, chunked=exchange.head.minor > 0)
    return held.headers


def settle(exchange: Exchange, outcome: Outcome, attempting: bool) -> None:
    """Settle what is held for a request that ends; `attempting`: before it was answered."""
    attempt, held = exchange.attempt, exchange.reservation
    if held is not None:
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


def _faults(exc: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in exc.errors())[:512]
