"""Recordings: a decision made again on its inputs is the same one, bit for bit."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping

import msgspec
import numpy as np
import pytest

from penstock.common.messages import Placement, Rejection, ScheduleRequest
from penstock.common.model import Endpoint, Instance
from penstock.common.routing_events import CandidateTerms, Inputs, ViewAge
from penstock.scheduler.bench import table_of
from penstock.scheduler.decisions import Page, Recording
from penstock.scheduler.loads import Loads
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.custom import CandidateView, Policy
from penstock.scheduler.policies.table import STRATEGIES, Thresholds
from penstock.scheduler.pool import Floats
from penstock.scheduler.prefix_index import PrefixIndex
from penstock.scheduler.recording import (
    BadInputs,
    NumbersOf,
    PageWriter,
    Ring,
    decide_again,
    inputs_of,
    recording_of,
    verdict_of,
)
from penstock.scheduler.scheduler import schedule
from penstock.scheduler.view import ClusterView


def nosy(request: ScheduleRequest, candidates: CandidateView) -> Floats:
    """Reads all there is."""
    zones = [instance.labels["zone"] == "1" for instance in candidates.instances]
    numbers = candidates.requests + candidates.tokens + candidates.prefill_tokens + candidates.kv_used
    numbers += candidates.ms_per_prompt_token + candidates.ms_per_output_token
    numbers += candidates.expected_ttft_ms + candidates.matched_ratio + np.array(zones)
    return 1.0 / (1.0 + numbers)


def faulty(request: ScheduleRequest, candidates: CandidateView) -> Floats:
    return np.full(len(candidates), np.nan)


CUSTOM: Mapping[str, Policy] = {"nosy": nosy, "faulty": faulty}
POLICIES = (
    *STRATEGIES,
    *CUSTOM,
    "prefix-cache:6,least-request:1",
    "nosy:2,load-balance:1,least-latency:3",
    "throughput:1,throughput:2,session-affinity:1,least-busy-time:5,cache-aware:2",
)


class World:
    """A fleet whose numbers a seeded chance has set, and changes with each decision."""

    def __init__(self, rng: random.Random, instances: int) -> None:
        self._rng = rng
        self.terms: dict[int, list[CandidateTerms]] = {}
        self.view, self.index = ClusterView(rng.randrange(100)), PrefixIndex(10_000)
        self.catalog = Catalog(Thresholds(rng.uniform(1, 20), rng.random(), rng.choice((0, 0, 5))), CUSTOM)
        fleet = [
            Instance(
                id=f"i{number}",
                endpoint=Endpoint("h", 1),
                models=("m",) if number % 7 else ("n",),
                weight=rng.uniform(0.5, 3),
                labels={"zone": str(number % 2)},
            )
            for number in range(instances)
        ]
        self.view.refresh(table_of(fleet), self.index.forget)
        self._stems = [[rng.getrandbits(60) for _ in range(20)] for _ in range(6)]

    def page(self, *numbers: int) -> Page:
        """The decisions of one message."""
        writer = PageWriter()
        for number in numbers:
            self._decide(number, writer)
        page = writer.page("i", ViewAge())
        assert page is not None
        return page

    def decide(self, number: int) -> Recording:
        return self._decide(number, PageWriter())

    def _decide(self, number: int, writer: PageWriter) -> Recording:
        rng, loads = self._rng, self.view.loads
        for name in Loads.NAMES:
            numbers = getattr(loads, name)
            if name not in ("weight", "status_at", "kv_at") and rng.random() < 0.3:
                numbers[:] = [rng.choice((1.0, rng.uniform(0.01, 9))) for _ in numbers]
        stem = rng.choice(self._stems)[: rng.randrange(21)]
        hashes = stem + [rng.getrandbits(60) for _ in range(rng.randrange(5))]
        request = ScheduleRequest(
            f"d{number}",
            f"r{number}",
            "m",
            strategy=POLICIES[number % len(POLICIES)],
            prompt_tokens=rng.randrange(5000),
            block_hashes=struct.pack(f"<{len(hashes)}Q", *(block << 4 for block in hashes)),
            session=rng.choice(("", "s1", "s2")),
            user="somebody",
            excluded=("i1",) if rng.random() < 0.2 else (),
        )
        decision = schedule(
            request, self.view, self.index, self.catalog, default="random", replicas=rng.choice((1, 3))
        )
        numbers = NumbersOf(loads).decision(decision)
        recording = recording_of(request, decision, numbers, "i", ViewAge())
        writer.add(request, decision, numbers)
        self.terms[number] = decision.terms
        if isinstance(decision.outcome, Placement):
            self.index.insert(decision.hashes, decision.slot, decision.outcome.matched_blocks)
            pool = self.view.pool("m")
            assert pool is not None
            pool.turn += 1
        return recording


@pytest.mark.parametrize("instances", [2, 9, 40, 150])
def test_what_is_decided_again_on_recorded_inputs_is_the_same_bit_for_bit(instances: int) -> None:
    rng = random.Random(instances)
    world = World(rng, instances)
    ring = Ring()
    for number in range(0, 60 * len(POLICIES), 3):
        ring.keep(world.page(number, number + 1, number + 2))
    placed = 0
    for number in range(60 * len(POLICIES)):
        (recording,) = ring.of(f"r{number}")
        inputs = inputs_of(recording)
        assert inputs is not None
        there_and_back = msgspec.json.decode(msgspec.json.encode(inputs), type=Inputs)
        for one in (inputs, there_and_back):
            again = decide_again(one, CUSTOM)
            told = verdict_of(again, recording.facts.outcome, recording.facts.score)
            if isinstance(recording.facts.outcome, Placement):
                assert again is not None
                assert again.outcome == recording.facts.outcome
                assert again.terms == world.terms[number]
                assert told == "same pick, same score"
                placed += 1
            else:
                assert told == "no candidates, as before"
    assert placed > 50 * len(POLICIES)


def test_inputs_name_neither_user_nor_session() -> None:
    world = World(random.Random(1), 9)
    told = b"".join(msgspec.json.encode(inputs_of(world.decide(number))) for number in range(50))
    assert b"somebody" not in told
    assert b'"s1"' not in told
    assert b'"s2"' not in told


def test_a_policy_that_failed_is_told_and_the_fallback_is_made_again() -> None:
    world = World(random.Random(1), 9)
    recording = world.decide(POLICIES.index("faulty"))
    assert recording.facts.fault == "policy faulty: not-finite: a score is NaN or infinite"
    inputs = inputs_of(recording)
    assert inputs is not None
    assert inputs.policy == "least-request"


def test_inputs_that_do_not_fit_together_are_refused() -> None:
    inputs = inputs_of(World(random.Random(1), 9).decide(0))
    assert inputs is not None
    replaced = msgspec.structs.replace
    for broken in (
        replaced(inputs, policy="none such"),
        replaced(inputs, thresholds={"max_requests": 0.5}),
        replaced(inputs, numbers={}),
        replaced(inputs, numbers={**inputs.numbers, "wait_ms": b"12345678"}),
        replaced(inputs, numbers={**inputs.numbers, "wait_ms": b"1"}),
        replaced(inputs, request=replaced(inputs.request, block_hashes=b"123")),
        replaced(inputs, steps=[(1, b"\xff" * 9)]),
    ):
        with pytest.raises(BadInputs):
            decide_again(broken, CUSTOM)


def test_another_outcome_is_not_called_the_same() -> None:
    recording = World(random.Random(1), 9).decide(0)
    inputs = inputs_of(recording)
    assert inputs is not None
    again = decide_again(inputs)
    other = Placement("d0", "elsewhere")
    assert verdict_of(again, other, recording.facts.score).startswith("not the same")
    assert verdict_of(None, other, 0.0).startswith("not the same")
    assert verdict_of(again, recording.facts.outcome, recording.facts.score) == "same pick, same score"
    assert verdict_of(again, recording.facts.outcome, -1.0) == "same pick, another score"
    assert verdict_of(again, Rejection("d0", reason=None), 0.0).startswith("not the same")  # type: ignore[arg-type]


def test_a_ring_keeps_the_last_ones_within_both_bounds() -> None:
    world = World(random.Random(1), 9)
    pages = [world.page(number, number + 1) for number in range(0, 30, 2)]
    ring = Ring(decisions=9)
    for one in pages:
        ring.keep(one)
    assert (len(ring), ring.of("r19"), len(ring.of("d20"))) == (10, [], 1)
    assert ring.held_bytes == sum(one.held_bytes for one in pages[10:])
    assert list(ring.requests()) == [f"d{number}" for number in range(20, 30)]
    small = Ring(max_bytes=pages[-1].held_bytes)
    for one in pages:
        small.keep(one)
    assert small.held_bytes <= pages[-1].held_bytes
    assert [one.facts.request.request_id for one in small.of("r29")] == ["r29"]


def test_a_decision_comes_out_of_the_ring_as_it_went_in() -> None:
    alone, together = World(random.Random(1), 9), World(random.Random(1), 9)
    recordings = [alone.decide(number) for number in range(30)]
    ring = Ring()
    ring.keep(together.page(*range(30)))
    for number, one in enumerate(recordings):
        (kept,) = ring.of(f"d{number}")
        assert kept.facts == one.facts
        assert inputs_of(kept) == inputs_of(one)
