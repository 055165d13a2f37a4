"""Explaining: what is asked of a replica's ring, where a request would go, and what the log holds."""

from __future__ import annotations

import msgspec
import pytest

from penstock.common.adapters.memory_bus import MemoryBus
from penstock.common.errors import BusTimeout
from penstock.common.messages import ExplainRequest, Mode, Placement, ScheduleRequest
from penstock.common.routing_events import PLACEMENT, Explained, Inputs, PlacementEvent
from penstock.common.subjects import DEFAULT_SHARD, EXPLAIN, EXPLAIN_NOW
from penstock.scheduler.recording import decide_again

from .scheduler_service_lab import ask, events_of, eventually, register, replica, request, wire

WEIGHTED = "prefix-cache:6,least-request:1"


async def explain(client: MemoryBus, name: str) -> list[Explained]:
    reply = await client.request(EXPLAIN, ExplainRequest(name), DEFAULT_SHARD, deadline_s=0.5)
    return [msgspec.json.decode(one, type=Explained) for one in reply.decisions]


async def explain_now(client: MemoryBus, wanted: ScheduleRequest) -> Explained:
    reply = await client.request(EXPLAIN_NOW, wanted, DEFAULT_SHARD, deadline_s=0.5)
    (one,) = reply.decisions
    return msgspec.json.decode(one, type=Explained)


async def test_the_replica_that_decided_tells_every_candidate_and_makes_the_decision_again() -> None:
    broker, client = wire()
    await register(client, *(f"i{number}" for number in range(5)))
    async with replica(broker, "s1") as one, replica(broker, "s2") as other:
        await eventually(lambda: one.serving and other.serving)
        for number in range(8):
            await ask(
                client, request(f"d{number}", session="secret", strategy="prefix-cache:6,least-request:1")
            )
        told = [(await explain(client, f"r-d{number}"))[0] for number in range(8)]
        assert await explain(client, "d3") == [told[3]]
        with pytest.raises(BusTimeout):
            await explain(client, "unknown")
    assert {one.recomputed for one in told} == {"same pick, same score"}
    for number, explained in enumerate(told):
        placement = explained.placement
        assert placement is not None
        assert (placement.request_id, len(placement.candidates)) == (f"r-d{number}", 5)
        assert placement.weights == {"prefix-cache": 6 / 7, "least-request": 1 / 7}
        for term in placement.candidates:
            assert term.score == pytest.approx(
                sum(term.terms[name] * weight for name, weight in placement.weights.items())
            )
        assert placement.inputs is not None
        assert b"secret" not in msgspec.json.encode(explained)


async def test_where_a_request_would_go_is_told_and_nothing_is_placed() -> None:
    broker, client = wire()
    await register(client, "a", "b")
    async with replica(broker) as one:
        await eventually(lambda: one.serving)
        told = await explain_now(client, request("d1", strategy="least-request"))
        refused = await explain_now(client, request("d2", strategy="nonsense"))
        assert list(one.view.loads.requests[:2]) == [0, 0]
        with pytest.raises(BusTimeout):
            await explain(client, "r-d1")
        reply = await ask(client, request("d1", strategy="least-request"))
    assert told.placement is not None
    assert told.placement.instance == reply.outcomes[0].instance  # type: ignore[union-attr]
    assert refused.rejection is not None
    assert refused.rejection.reason == "bad_strategy"
    assert refused.recomputed == "refused before any instance was looked at"


async def test_with_full_every_event_holds_inputs_and_the_age_of_the_view() -> None:
    broker, client = wire()
    await register(client, "a", "b")
    async with replica(broker, explain="full") as one:
        await eventually(lambda: one.serving)
        await ask(client, request("d1"))
        await ask(client, request("d2", excluded=("a", "b")))
        (placement,) = await events_of(client, "placement", 1)
        (rejection,) = await events_of(client, "rejection", 1)
    data = placement["data"]
    assert data["weights"] == {"expected-ttft": 1.0}
    assert data["view"]["registry_ms"] == 0
    inputs = msgspec.convert(data["inputs"], Inputs)
    again = decide_again(inputs)
    assert again is not None
    assert again.outcome.instance == data["instance"]  # type: ignore[union-attr]
    assert [term.score for term in again.terms] == [term["score"] for term in data["candidates"]]
    assert rejection["data"]["inputs"]["request"][0] == "d2"
    assert rejection["data"]["excluded"] == {"excluded": 2}


async def test_sampled_holds_inputs_of_rejections_as_far_as_there_are_not_too_many() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker) as one:
        await eventually(lambda: one.serving)
        for number in range(70):
            await ask(client, request(f"d{number}", excluded=("a",)))
        events = await events_of(client, "rejection", 70)
    # A clock that stands still: all in one second.
    assert 50 <= sum("inputs" in event["data"] for event in events) <= 55


async def test_off_keeps_and_tells_nothing() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker, explain="off") as one:
        await eventually(lambda: one.serving)
        await ask(client, request("d1", excluded=("a",)))
        (event,) = await events_of(client, "rejection", 1)
        with pytest.raises(BusTimeout):
            await explain(client, "d1")
    assert "inputs" not in event["data"]


async def test_of_a_pair_both_choices_are_told_and_made_again() -> None:
    broker, client = wire()
    await register(client, "p-1", "p-2", "d-1", "d-2", "d-3")
    wanted = request("d1", mode=Mode.PD_BATCH)
    async with replica(broker, explain="full") as one:
        await eventually(lambda: one.serving)
        now = await explain_now(client, wanted)
        (outcome,) = (await ask(client, wanted)).outcomes
        (told,) = await explain(client, "r-d1")
        (event,) = await events_of(client, PLACEMENT, 1)
    assert isinstance(outcome, Placement)
    for explained in (now, told):
        placed = explained.placement
        assert placed is not None
        assert explained.recomputed == "same pick, same score"
        assert (placed.prefill_instance, placed.instance) == (outcome.prefill_instance, outcome.instance)
        assert {term.instance for term in placed.prefill_candidates} == {"p-1", "p-2"}
        assert {term.instance for term in placed.candidates} == {"d-1", "d-2", "d-3"}
        assert (placed.prefill_candidates[0].instance, placed.prefill_weights) == (
            outcome.prefill_instance,
            {"expected-ttft": 1.0},
        )
    logged = msgspec.convert(event["data"], PlacementEvent, strict=False)
    assert logged.inputs is not None
    for inputs, instance in (
        (logged.inputs, outcome.instance),
        (logged.inputs.prefill, outcome.prefill_instance),
    ):
        assert inputs is not None
        again = decide_again(inputs)
        assert again is not None
        assert isinstance(again.outcome, Placement)
        assert again.outcome.instance == instance
