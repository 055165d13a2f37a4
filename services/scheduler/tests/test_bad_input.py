"""What a scheduler is sent that makes no sense: a typed refusal or a fallback, an event, and a next decision.

Elsewhere: faults of policy modules of every kind (test_custom_policies, test_scheduler_service), what engines
say of themselves (test_measures, test_scheduler_view, discovery's test_discovery_engine_metrics), garbage on
the bus (test_scheduler_service, test_bus_hostile).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from penstock.common.errors import BusTimeout
from penstock.common.instances import encode_instance, instance_key
from penstock.common.messages import MAX_BLOCKS, EngineStatus, Mode, Placement, Reason, Rejection
from penstock.common.model import Endpoint, EngineLoad, Instance, Role
from penstock.common.subjects import EVENTS, INSTANCES, STATUS

from .scheduler_service_lab import ask, events_of, eventually, register, replica, request, wire


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"model": "nobody-has-it"}, Reason.UNKNOWN_MODEL),
        ({"model": "\0" * 512}, Reason.UNKNOWN_MODEL),
        ({"model": "prefill-only"}, Reason.NO_INSTANCE),
        ({"model": "prefill-only", "mode": Mode.PD_BATCH}, Reason.NO_INSTANCE),
        ({"owner": "nobody"}, Reason.UNKNOWN_MODEL),
        ({"excluded": ("a", "b")}, Reason.NO_INSTANCE),
        ({"strategy": "best"}, Reason.BAD_STRATEGY),
        ({"strategy": "random:nan"}, Reason.BAD_STRATEGY),
        ({"block_hashes": bytes(8 * MAX_BLOCKS - 1)}, Reason.BAD_REQUEST),
    ],
)
async def test_a_request_that_cannot_be_placed_is_refused_with_its_reason_and_an_event(
    asked: dict[str, Any], reason: Reason
) -> None:
    broker, client = wire()
    await client.ensure_stream(EVENTS)
    await register(client, "a", "b")
    only = Instance(
        id="p", endpoint=Endpoint("h", 1), models=("prefill-only",), role=Role.PREFILL, source="test"
    )
    await client.put(INSTANCES, instance_key("p"), encode_instance(only))
    async with replica(broker) as running:
        await eventually(lambda: running.serving and running.view.slot("p") is not None)
        refused, placed = (await ask(client, request("d1", **asked), request("d2"))).outcomes
        assert isinstance(refused, Rejection)
        assert refused.reason is reason
        assert isinstance(placed, Placement)
        assert await running.events.flush(2.0)
        (event,) = await events_of(client, "rejection", 1)
    assert (event["data"]["reason"], event["data"]["decision_id"]) == (reason.value, "d1")


async def test_more_hashes_than_a_prompt_has_are_dropped_and_the_next_request_is_placed() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        absurd = request("d1", block_hashes=bytes(8 * (MAX_BLOCKS + 1)))
        with pytest.raises(BusTimeout):
            await ask(client, absurd)
        (placed,) = (await ask(client, request("d2", block_hashes=bytes(8 * MAX_BLOCKS)))).outcomes
        assert isinstance(placed, Placement)


@pytest.mark.parametrize("figure", [math.nan, math.inf, -math.inf, -1.0, 1e300])
async def test_an_absurd_figure_of_an_engine_is_not_taken(figure: float) -> None:
    broker, client = wire()
    await register(client, "a", "b")
    async with replica(broker, default_routing_strategy="load-balance") as running:
        await eventually(lambda: running.serving)
        client.publish(STATUS, EngineStatus("a", EngineLoad(kv_usage_ratio=figure)), "a")
        client.publish(STATUS, EngineStatus("b", EngineLoad(kv_usage_ratio=0.5)), "b")
        await eventually(lambda: running.view.status_ages(running.clock.now) == [("b", 0.0)])
        for number in range(4):
            (placed,) = (await ask(client, request(f"d{number}"))).outcomes
            assert isinstance(placed, Placement)
        loads = running.view.loads
        for name in loads.NAMES:
            if name not in ("status_at", "kv_at"):
                numbers = getattr(loads, name)
                assert ((numbers >= 0) & (numbers < math.inf)).all(), name


@pytest.mark.parametrize("answer", ["[float('nan')] * len(pool)", "[[0.5]]", "'best'", "pool.nothing"])
async def test_a_policy_that_answers_nonsense_is_told_of_and_the_fallback_decides(
    tmp_path: Path, answer: str
) -> None:
    module = tmp_path / "odd.py"
    module.write_text(f"POLICIES = {{'odd': lambda request, pool: {answer}}}")
    broker, client = wire()
    await client.ensure_stream(EVENTS)
    await register(client, "a", "b")
    async with replica(broker, policy_module=str(module), default_routing_strategy="odd") as running:
        await eventually(lambda: running.serving)
        (placed,) = (await ask(client, request("d1"))).outcomes
        assert isinstance(placed, Placement)
        assert placed.policy == "least-request"
        assert await running.events.flush(2.0)
        (told,) = await events_of(client, "degraded", 1)
        (event,) = await events_of(client, "placement", 1)
    assert (told["data"]["what"], told["data"]["active"]) == ("policy odd", True)
    assert event["data"]["fault"]
