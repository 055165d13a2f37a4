"""`POST /admin/api/explain`: where a request would go now, and why; nothing is placed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from penstock.common.bus import Bus
from penstock.common.instances import InstanceTable
from penstock.common.messages import ScheduleRequest
from penstock.common.routing_events import CandidateTerms, Explained, PlacementEvent, RejectionEvent
from penstock.common.subjects import DEFAULT_SHARD, EXPLAIN_NOW
from penstock.ingress.admin.documents import ROOT
from penstock.ingress.admin.operations import Answer, Call, Operation, Strict
from penstock.ingress.block_hash import RUN_BLOCKS, of_tenant
from penstock.ingress.disaggregation.bodies import divisible, members
from penstock.ingress.disaggregation.protocols import Method
from penstock.ingress.failures import GatewayError
from penstock.ingress.large_bodies import Facts, Refusal, Setup, Task, Tokenizer, read
from penstock.ingress.owners import Owners
from penstock.ingress.wishes import MAX_PRIORITY

ANSWER_WITHIN_S = 2.0
# The field that a body has, by which its path is known.
PATHS = {
    "messages": b"/v1/chat/completions",
    "prompt": b"/v1/completions",
    "input": b"/v1/embeddings",
    "documents": b"/v1/rerank",
}


@dataclass(frozen=True)
class Hashing:
    """How this ingress hashes prompts; `tokenizer` is asked for with the first request."""

    setup: Setup = field(default_factory=lambda: Setup("", 256))
    tenant: str = "none"
    tokenizer: Callable[[], Tokenizer | None] = lambda: None


class Divides(Protocol):
    """How this ingress divides requests."""

    def __call__(self, request: ScheduleRequest) -> Method | None:
        """A request's method; None if it is not to be divided. Raises GatewayError where nobody says how."""


def undivided(request: ScheduleRequest) -> Method | None:
    """For a gateway that divides none."""
    return None


class RoutingIn(Strict):
    """What headers say of a request: `routing-strategy`, `config-profile`, `x-owned-by`, `x-session-id`,
    `user`, `x-priority`."""

    strategy: str = Field("", max_length=512)
    profile: str = Field("", max_length=512)
    owner: str = Field("", max_length=512)
    session: str = Field("", max_length=512)
    user: str = Field("", max_length=512)
    priority: int = Field(0, ge=-MAX_PRIORITY, le=MAX_PRIORITY)


class ExplainIn(BaseModel):
    """A body as clients send it, with `messages`, `prompt`, `input` or `documents`; `routing` stands for its
    headers. Only text that is the same byte for byte matches what engines hold."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    model: str = Field(min_length=1, max_length=512)
    messages: list[JsonValue] | None = None
    prompt: JsonValue = None
    input: JsonValue = None
    documents: JsonValue = None
    routing: RoutingIn = RoutingIn()


class CandidateOut(BaseModel):
    """`terms` are scores by scorer, which times its weight add up to `score`."""

    instance: str
    score: float
    in_flight: int
    matched_blocks: int
    terms: dict[str, float]


class ExplainedOut(BaseModel):
    """Where it would go: to `instance` of the `candidates`, the best first; or nowhere, for `reason`.
    `excluded` counts instances by the filter that dropped them, `view_ms` is the age of what `replica` knows,
    `recomputed` says whether the decision came out the same when made again."""

    replica: str
    model: str
    instance: str | None
    prefill_instance: str | None
    reason: str | None
    message: str
    policy: str
    fault: str
    prompt_tokens: int
    blocks: int
    matched_blocks: int
    candidates: list[CandidateOut]
    excluded: dict[str, int]
    weights: dict[str, float]
    seed: int
    view_ms: dict[str, float]
    recomputed: str
    prefill_candidates: list[CandidateOut] = []
    prefill_weights: dict[str, float] = {}


class Explaining:
    """The operation, over the bus."""

    def __init__(
        self, bus: Bus, table: InstanceTable, hashing: Hashing, divides: Divides = undivided
    ) -> None:
        self._bus, self._owners, self._hashing, self._divides = bus, Owners(table), hashing, divides

    def operations(self) -> Iterator[Operation]:
        """What can be asked."""
        yield Operation(
            "POST",
            f"{ROOT}/explain",
            "Where a request would go now, and why, without placing it",
            self._explain,
            {200: ExplainedOut},
            body=ExplainIn,
        )

    async def _explain(self, call: Call) -> Answer:
        body: ExplainIn = call.body
        given = [name for name in PATHS if getattr(body, name) is not None]
        if len(given) != 1:
            text = f"one of {', '.join(PATHS)} is needed, not {' and '.join(given) or 'none'}"
            raise GatewayError("invalid_request", text, param=given[-1] if given else "messages")
        # A tokenizer may have to be loaded.
        facts = await asyncio.to_thread(self._read, PATHS[given[0]], call.raw)
        if isinstance(facts, Refusal):
            raise facts.error()
        request = self._request(facts, body.routing)
        if divisible(PATHS[given[0]], members(call.raw)):
            method = self._divides(request)
            if method is not None:
                mode, stage = method.first_call
                request = msgspec.structs.replace(request, mode=mode, stage=stage)
        reply = await self._bus.request(EXPLAIN_NOW, request, DEFAULT_SHARD, deadline_s=ANSWER_WITHIN_S)
        try:
            told = msgspec.json.decode(reply.decisions[0], type=Explained)
        except (IndexError, msgspec.MsgspecError, UnicodeDecodeError):
            raise GatewayError("bus_unavailable", "a scheduler's answer cannot be read") from None
        return Answer(200, _out(reply.replica, request, told))

    def _read(self, path: bytes, body: bytes) -> Facts | Refusal:
        hashing = self._hashing
        return read(Task(path, "application/json", len(body)), body, hashing.setup, hashing.tokenizer())

    def _request(self, facts: Facts, routing: RoutingIn) -> ScheduleRequest:
        owner = facts.owner or routing.owner
        if owner:
            owner = self._owners.resolve(facts.model, owner)
        # An id of its own: chance is drawn from it.
        name = f"explain-{uuid.uuid4().hex}"
        hashing = self._hashing
        return ScheduleRequest(
            decision_id=name,
            request_id=name,
            model=facts.model,
            owner=owner,
            strategy=routing.strategy,
            profile=routing.profile,
            prompt_tokens=facts.prompt_tokens,
            max_tokens=min(facts.max_tokens, 2**40),
            block_hashes=of_tenant(
                facts.block_hashes, hashing.setup.secret, hashing.tenant, routing.user, owner
            ),
            session=routing.session,
            user=routing.user,
            priority=routing.priority,
            run_blocks=RUN_BLOCKS,
        )


def _out(replica: str, request: ScheduleRequest, told: Explained) -> ExplainedOut:
    event: PlacementEvent | RejectionEvent | None = told.placement or told.rejection
    if event is None:
        raise GatewayError("bus_unavailable", "a scheduler's answer says nothing")
    placement, rejection = told.placement, told.rejection
    return ExplainedOut(
        replica=replica,
        model=request.model,
        instance=placement.instance if placement else None,
        prefill_instance=(placement.prefill_instance or None) if placement else None,
        reason=rejection.reason if rejection else None,
        message=rejection.message if rejection else "",
        policy=event.policy,
        fault=placement.fault if placement else "",
        prompt_tokens=request.prompt_tokens,
        blocks=len(request.block_hashes) // 8,
        matched_blocks=placement.matched_blocks if placement else 0,
        candidates=_shown(placement.candidates if placement else []),
        prefill_candidates=_shown(placement.prefill_candidates if placement else []),
        prefill_weights=placement.prefill_weights if placement else {},
        excluded=event.excluded,
        weights=placement.weights if placement else {},
        seed=event.seed,
        view_ms=msgspec.structs.asdict(event.view) if event.view else {},
        recomputed=told.recomputed,
    )


def _shown(candidates: list[CandidateTerms]) -> list[CandidateOut]:
    return [CandidateOut(**msgspec.structs.asdict(one)) for one in candidates]
