"""Which requests are divided between a prefill and a decode instance, and what all divided ones share."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from penstock.common.model import Instance, InstanceId
from penstock.common.profiles import BATCHED, STAGED, ModelProfiles
from penstock.common.telemetry import Metrics
from penstock.ingress.disaggregation.bodies import DIVIDED_PATHS, Members, divisible, members, members_at
from penstock.ingress.disaggregation.protocol import Pair, Question
from penstock.ingress.disaggregation.protocols import PD, Method
from penstock.ingress.disaggregation.stages import first_stage
from penstock.ingress.divided import Divided
from penstock.ingress.errands import Errands
from penstock.ingress.large_bodies import LARGE_BODY_BYTES, Facts
from penstock.ingress.methods import Methods
from penstock.ingress.prompt_holds import PromptHolds
from penstock.ingress.request_body import InferenceRequest

if TYPE_CHECKING:
    from penstock.ingress.exchange import Exchange
    from penstock.ingress.gateway import Gateway

log = logging.getLogger(__name__)

MAX_KNOWN = 8192


class Dividing:
    """The methods of one ingress process, what prefill instances told, figures, cancellations."""

    def __init__(self, gateway: Gateway, metrics: Metrics) -> None:
        settings = gateway.settings
        self._gateway = gateway
        self.methods = Methods(
            settings.pd_disagg_protocol, staged=settings.separate_pd_scheduling, table=gateway.table
        )
        self.errands = Errands(gateway.upstreams, gateway.settings.engine_api_key.get_secret_value())
        self.prefill_timeout_s, self.lease_s = settings.prefill_timeout, settings.prefill_lease
        self._told: dict[InstanceId, tuple[Instance, Question, Any]] = {}
        self._pairs = metrics.counter(
            "penstock_ingress_pairs_total",
            "Pairs of a prefill and a decode instance by what became of them",
            "protocol",
            "mode",
            "result",
        )
        self._cancels = metrics.counter(
            "penstock_ingress_prefill_cancels_total",
            "Orders to prefill instances to end what nobody will fetch, by whether they arrived",
            "result",
        )
        self.holds = PromptHolds(self.lease_s)
        metrics.gauge(
            "penstock_ingress_prompt_holds",
            "Prompts that prefill instances keep for requests in hand",
            lambda: len(self.holds),
        )
        self._leaks = metrics.counter(
            "penstock_ingress_prompt_leaks_total",
            "Prompts kept by prefill that were neither fetched nor given up 1 s after their lease",
        ).labels()
        metrics.tally(
            "penstock_ingress_prompt_holds_unseen_total",
            "Prompts kept by prefill whose answer in one piece had not come 1 s after their lease: whether "
            "they were fetched the engines alone know",
            lambda: self.holds.unseen,
        )
        self.prefill_time = metrics.histogram(
            "penstock_ingress_prefill_seconds", "Prefill request sent to its answer"
        ).labels()
        self.transfer_wait = metrics.histogram(
            "penstock_ingress_transfer_wait_seconds", "Prefill's answer to decode's request sent"
        ).labels()
        self.decode_ttft = metrics.histogram(
            "penstock_ingress_decode_ttft_seconds", "Decode request sent to the first piece of its answer"
        ).labels()

    def configure(self, profiles: Mapping[str, ModelProfiles]) -> None:
        """From here on the config profiles are these, by model or ANY_MODEL."""
        self.methods.configure(profiles)
        self._gateway.divides = self.methods.divides

    def wants(self, strategy: bytes | None) -> bool:
        """Whether a request with such a `routing-strategy` is to be divided, if it can be."""
        return self.methods.divides or strategy == PD.encode()

    def begin(self, exchange: Exchange, inference: InferenceRequest | Facts) -> None:
        """Have the request divided, if it can be. Raises GatewayError where nobody says how."""
        request, path = exchange.request, exchange.head.path
        method = self.methods.of(request)
        if request.strategy == PD:
            request = exchange.request = msgspec.structs.replace(request, strategy="")
        if method is None or path not in DIVIDED_PATHS:
            return
        parts = _parts(exchange, inference)
        if not parts or not divisible(path, parts):
            return
        exchange.request = first_stage(request, method)
        exchange.divided = Divided(self._gateway, self, exchange, method, parts)

    def pair(self, prefill: Instance, decode: Instance | None, decision_id: str, request_id: str) -> Pair:
        """An attempt. Some connectors find a prompt by the request's id, which a client may use twice: with
        the decision's it is like no other."""
        name = f"{request_id}-{decision_id}"
        return Pair(prefill, decode, name, f"xfer-{decision_id}", secrets.randbits(63))

    def told(self, prefill: Instance, question: Question) -> Any:
        """What the instance answered to the question before, under this very record; None if nothing."""
        known = self._told.get(prefill.id)
        return known[2] if known is not None and known[0] is prefill and known[1] == question else None

    def learn(self, prefill: Instance, question: Question, answer: Any) -> None:
        """Keep an answer."""
        if len(self._told) >= MAX_KNOWN:
            self._told.clear()
        self._told[prefill.id] = prefill, question, answer

    def forget(self, prefill: Instance) -> None:
        """Something failed: it may be another engine by now."""
        self._told.pop(prefill.id, None)

    def cancel(self, pair: Pair, method: Method) -> None:
        """Tell prefill that nobody will fetch, where the protocol has a way to."""
        order = method.protocol.cancel(pair)
        if (
            order is not None
            and self.errands.post(pair.prefill, order.path, order.body, self._cancelled) is None
        ):
            self._cancelled("too many")

    def count(self, method: Method, result: str) -> None:
        """A pair ended."""
        self._pairs.inc(method.name, STAGED if method.staged else BATCHED, result)

    def sweep(self, now: float) -> None:
        """Tell what outlived its lease."""
        for transfer_id, prefill in self.holds.leaked(now) if len(self.holds) else ():
            self._leaks.value += 1
            fields = {"instance": prefill, "transfer": transfer_id}
            log.warning("a kept prompt has outlived its lease", extra={"fields": fields})

    def _cancelled(self, cause: str) -> None:
        self._cancels.inc("lost" if cause else "arrived")


def _parts(exchange: Exchange, inference: InferenceRequest | Facts) -> Members:
    """The members of the body that instances get; none if there are too many."""
    if exchange.local_body:
        return members(exchange.local_body)
    if isinstance(inference, Facts) and (inference.members or len(exchange.body) > LARGE_BODY_BYTES):
        return members_at(exchange.body, inference.members)
    return members(exchange.body)
