"""The decision function of a simulated cluster with divided requests, made of the scheduler's own code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from penstock.cli.replay.ingress import SimIngress
from penstock.cli.replay.schedulers import MODEL, Schedulers
from penstock.cli.replay.setups import Setup
from penstock.common.messages import Mode, Placement, ScheduleRequest, Stage
from penstock.ingress.in_flight import of_prefill_id
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import Thresholds
from penstock.scheduler.profile import Division
from penstock.sim.cluster import Arrival
from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest, TokenEvent

# Of the request that prefill gets; decode's has the trace's name.
PREFILL = "+p"


@dataclass
class _Divided:
    request: EngineRequest
    ingress: SimIngress
    prefill: int
    decode: str = ""


@dataclass(frozen=True)
class Transfer:
    """How long KV takes from one engine to the other: `setup_s`, then so many prompt tokens a second."""

    setup_s: float
    tokens_per_s: float

    def lasts_s(self, tokens: int) -> float:
        """Of a prompt of so many tokens."""
        return self.setup_s + tokens / self.tokens_per_s


@dataclass
class _Books:
    waiting: dict[str, _Divided] = field(default_factory=dict)
    sent_s: dict[str, float] = field(default_factory=dict)
    prefill_cached: dict[str, int] = field(default_factory=dict)
    # Requests that one engine does all of.
    whole: set[str] = field(default_factory=set)


class PairSchedulers(Schedulers):
    """Requests arrive as prefill's part; what is computed goes to `later` as decode's, once transferred."""

    def __init__(
        self,
        engines: Sequence[Engine],
        requests: Sequence[EngineRequest],
        packed: Callable[[int], bytes],
        *,
        staged: bool,
        transfer: Transfer,
        index_blocks: int,
        kv_factor: float,
        seed: int,
        division: Division,
    ) -> None:
        """`requests` are whole, by their place in the trace, which is their id."""
        setup = Setup("cache-aware", len(engines), delay_ms=1.0)
        super().__init__(
            engines,
            Catalog(Thresholds()),
            setup,
            lambda name: packed(int(name.removesuffix(PREFILL))),
            index_blocks=index_blocks,
            kv_factor=kv_factor,
            seed=seed,
            division=division,
        )
        self._requests, self._staged, self._transfer = requests, staged, transfer
        self._books = _Books()
        self.later: Callable[[Arrival], None] = lambda arrival: None

    @property
    def undivided(self) -> int:
        """Requests that one engine did all of."""
        return len(self._books.whole)

    @property
    def sent_s(self) -> dict[str, float]:
        """When decode's part of a request reached its engine."""
        return self._books.sent_s

    @property
    def prefill_cached(self) -> dict[str, int]:
        """Prompt tokens that prefill found in its cache."""
        return self._books.prefill_cached

    def decide_part(
        self, request: EngineRequest, now: float, engines: Sequence[Engine]
    ) -> int | tuple[int, EngineRequest]:
        """Index of the engine of the part that arrives, or of all of the request, which comes with it."""
        divided = self._books.waiting.pop(request.request_id, None)
        if divided is not None:
            # Fetched: prefill's blocks are free.
            engines[divided.prefill].let_go(request.request_id + PREFILL)
            self.sent_s[request.request_id] = now
            return self._numbers[divided.decode]
        return self._first(request, now)

    def _first(self, request: EngineRequest, now: float) -> int | tuple[int, EngineRequest]:
        self._timeline.pass_to(now)
        name, tokens = request.request_id.removesuffix(PREFILL), request.prompt_tokens
        ingress = self._to_ingress.choice(self._ingresses)
        stage = (Mode.PD_STAGED, Stage.PREFILL) if self._staged else (Mode.PD_BATCH, Stage.ONLY)
        wanted = msgspec.structs.replace(self._wanted(request), mode=stage[0], stage=stage[1])
        placement = self._place(ingress, wanted, now)
        self.expected_tokens += placement.matched_tokens
        prefill = placement.prefill_instance
        if not prefill:
            return self._whole(name, ingress, placement, now)
        divided = _Divided(self._requests[int(name)], ingress, self._numbers[prefill])
        of_prefill = msgspec.structs.replace(placement, instance=prefill)
        if not self._staged:
            decision_id = of_prefill_id(placement.decision_id)
            of_prefill = msgspec.structs.replace(of_prefill, decision_id=decision_id)
            self._decode_placed(divided, placement, now)
        ingress.sent(request.request_id, of_prefill, tokens, now)
        self._open[request.request_id] = ingress
        self._books.waiting[name] = divided
        return divided.prefill

    def _whole(
        self, name: str, ingress: SimIngress, placement: Placement, now: float
    ) -> tuple[int, EngineRequest]:
        request = self._requests[int(name)]
        ingress.sent(name, placement, request.prompt_tokens, now)
        self._open[name] = ingress
        self.sent_s[name] = now
        self._books.whole.add(name)
        return self._numbers[placement.instance], request

    def _decode_placed(self, divided: _Divided, placement: Placement, now: float) -> None:
        """All of the prompt is computed elsewhere."""
        request, tokens = divided.request, divided.request.prompt_tokens
        placed = msgspec.structs.replace(placement, matched_tokens=tokens)
        divided.ingress.sent(request.request_id, placed, tokens, now)
        self._open[request.request_id] = divided.ingress
        divided.decode = placement.instance

    def observe(self, event: TokenEvent, engine: int, now: float) -> None:
        """A token came back; with prefill's, decode is next."""
        super().observe(event, engine, now)
        if event.finished and event.request_id in self._books.whole:
            self.prefill_cached[event.request_id] = event.cached_tokens
        if event.finished and event.request_id.endswith(PREFILL):
            name = event.request_id.removesuffix(PREFILL)
            self.prefill_cached[name] = event.cached_tokens
            self._computed(self._books.waiting[name], now)

    def _computed(self, divided: _Divided, now: float) -> None:
        request = divided.request
        if self._staged:
            self._decisions += 1
            wanted = ScheduleRequest(
                decision_id=f"{self._seed}.{self._decisions}",
                request_id=request.request_id,
                model=MODEL,
                prompt_tokens=request.prompt_tokens,
                block_hashes=self._packed(request.request_id),
                mode=Mode.PD_STAGED,
                stage=Stage.DECODE,
                prefill_instance=self._names[divided.prefill],
            )
            self._decode_placed(divided, self._place(divided.ingress, wanted, now), now)
        divided.ingress.forwarded(request.request_id, now)
        imported = msgspec.structs.replace(request, imported_tokens=request.prompt_tokens)
        self.later(Arrival(now + self._transfer.lasts_s(request.prompt_tokens), imported))
