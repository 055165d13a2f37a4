"""The scheduler on a bus: warm before it serves, one count per decision, siblings in step."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from penstock.common.codec import encode, encode_record
from penstock.common.errors import BusTimeout, BusUnavailable
from penstock.common.instances import instance_key
from penstock.common.messages import (
    EngineStatus,
    Heartbeat,
    InFlight,
    InstanceSpeed,
    LoadReport,
    Mode,
    Placement,
    Reason,
    Rejection,
    Stage,
)
from penstock.common.model import EngineLoad
from penstock.common.subjects import (
    DEFAULT_SHARD,
    EVENTS,
    HEARTBEAT,
    INSTANCES,
    LOAD,
    PLACED,
    SCHEDULE,
    STATUS,
)
from penstock.scheduler.faults import QUIET_S
from penstock.scheduler.service import HEARTBEAT_ROUND_S

from .scheduler_service_lab import (
    ask,
    batch,
    events_of,
    eventually,
    instances_of,
    register,
    replica,
    report,
    request,
    wire,
)


async def test_a_batch_is_answered_in_order_and_each_request_sees_the_ones_before() -> None:
    broker, client = wire()
    await register(client, "a", "b")
    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        reply = await ask(client, *(request(f"d{n}") for n in range(10)), request("x", model="nope"))
        assert [outcome.decision_id for outcome in reply.outcomes] == [*(f"d{n}" for n in range(10)), "x"]
        assert instances_of(reply) == {"a": 5, "b": 5}
        refused = reply.outcomes[-1]
        assert isinstance(refused, Rejection)
        assert refused.reason is Reason.UNKNOWN_MODEL
        assert reply.replica == "s1"
        assert running.ledger.in_flight == 10


async def test_a_decision_asked_for_again_counts_once() -> None:
    broker, client = wire()
    await register(client, "a", "b")
    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        for _ in range(3):
            await ask(client, request("d"))
        assert running.ledger.in_flight == 1
        client.publish(LOAD, report(1, finished=("d",)), "i")
        await eventually(lambda: running.ledger.in_flight == 0)
        await ask(client, request("d"))
        assert running.ledger.in_flight == 0


async def test_load_reports_steer_placements() -> None:
    broker, client = wire()
    await register(client, "a", "b")
    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        client.publish(LOAD, report(1, *(InFlight(f"w{n}", "a", 5) for n in range(8))), "i")
        await eventually(lambda: running.ledger.in_flight == 8)
        assert instances_of(await ask(client, *(request(f"d{n}") for n in range(8)))) == {"b": 8}


async def test_a_sibling_counts_the_placements_and_knows_the_prefixes_and_none_counts_its_own_twice() -> None:
    broker, client = wire()
    await register(client, *"abcdefgh")
    async with replica(broker, "s1") as one, replica(broker, "s2") as two:
        await eventually(lambda: one.serving and two.serving)
        hashes = bytes(range(64))
        placed = await ask(client, request("d1", strategy="prefix-cache", block_hashes=hashes))
        await eventually(lambda: one.ledger.in_flight == 1 and two.ledger.in_flight == 1)
        (instance,) = instances_of(placed)
        longer = msgspec.structs.replace(
            request("d"), strategy="prefix-cache", block_hashes=hashes + bytes(8)
        )
        # Sent in one turn, so that the queue group hands them to its members by turns.
        asked = [msgspec.structs.replace(longer, decision_id=f"d{number}") for number in range(2, 6)]
        replies = await asyncio.gather(*(ask(client, one_of_them) for one_of_them in asked))
        assert {reply.replica for reply in replies} == {"s1", "s2"}
        for reply in replies:
            (outcome,) = reply.outcomes
            assert isinstance(outcome, Placement)
            assert outcome.instance == instance
            assert outcome.matched_blocks >= 8
        await eventually(lambda: one.ledger.load(instance) == two.ledger.load(instance) == (5, 50))
        await eventually(lambda: one.count("penstock_scheduler_in_flight_requests") == 5)
        assert one.count("penstock_scheduler_feed_missed_total") == 0


async def test_requests_are_taken_once_the_registry_is_synced() -> None:
    broker, client = wire()
    await register(client, "a", complete=False)
    async with replica(broker) as running:
        await eventually(lambda: len(running.service.replica.table) == 1)
        assert running.lifecycle.missing() == ["requests: the registry is not synced"]
        with pytest.raises(BusUnavailable):
            await ask(client, request("d"))
        await register(client)
        await eventually(lambda: running.serving)
        assert instances_of(await ask(client, request("d"))) == {"a": 1}


async def test_requests_are_taken_once_every_ingress_that_is_heard_has_told_its_work() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker, warm_up_s=1e9) as running:
        client.publish(HEARTBEAT, Heartbeat("ingress", "i", "1", ready=True), "ingress")
        awaited = ["requests: load snapshots of 1 of 1 ingresses heard are awaited"]
        await eventually(lambda: running.lifecycle.missing() == awaited)
        client.publish(LOAD, report(1, InFlight("w", "a")), "i")
        await eventually(lambda: running.ledger.in_flight == 1)
        running.clock.now += HEARTBEAT_ROUND_S
        assert running.lifecycle.missing() == awaited
        client.publish(LOAD, report(2, InFlight("w", "a"), pieces=1), "i")
        await eventually(lambda: running.serving)


async def test_an_ingress_that_stays_silent_holds_it_up_only_for_the_warm_up() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker, warm_up_s=1.5) as running:
        await eventually(lambda: "awaited" in str(running.lifecycle.missing()))
        running.clock.now += 1.5
        await eventually(lambda: running.serving)


async def test_the_warm_up_begins_when_the_bus_is_there() -> None:
    broker, client = wire()
    await register(client, "a")
    broker.set_up(False)
    async with replica(broker, warm_up_s=1.5) as running:
        running.clock.now += 60.0
        broker.set_up(True)
        await eventually(lambda: "awaited" in str(running.lifecycle.missing()))
        running.clock.now += 1.5
        await eventually(lambda: running.serving)


async def test_a_batch_whose_budget_is_spent_is_not_decided() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        with pytest.raises(BusTimeout):
            await client.request(SCHEDULE, batch(request("d"), budget_ms=0), DEFAULT_SHARD, deadline_s=0.05)
        assert running.ledger.in_flight == 0
        assert running.count("penstock_scheduler_batches_expired_total") == 1


async def test_garbage_and_longer_messages_of_later_releases_do_no_harm() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        subjects = (
            SCHEDULE.request.name(DEFAULT_SHARD),
            LOAD.name("i"),
            PLACED.name(DEFAULT_SHARD),
            STATUS.name("a"),
            HEARTBEAT.name("ingress"),
        )
        for subject in subjects:
            for payload in (b"", b"\xc1", b"\x90", b"{}", encode_record([1]), bytes(1000), b"\x91" * 5000):
                broker.deliver(subject, payload, None)
        later = [*msgspec.msgpack.decode(encode(report(1, InFlight("w", "a")))), "a field to come"]
        broker.deliver(LOAD.name("i"), msgspec.msgpack.encode(later), None)
        client.publish(STATUS, EngineStatus("a", EngineLoad(running=-5, kv_usage_ratio=7.0)), "a")
        client.publish(STATUS, EngineStatus("a", EngineLoad(running=3), age_s=2.0), "a")
        await eventually(lambda: running.view.status_ages(running.clock.now) == [("a", 2.0)])
        assert running.ledger.load("a") == (1, 0)
        assert instances_of(await ask(client, request("d"))) == {"a": 1}
        assert running.count("penstock_bus_dropped_total", LOAD.pattern, "undecodable") == 7


async def test_every_outcome_is_an_event() -> None:
    broker, client = wire()
    await client.ensure_stream(EVENTS)
    await register(client, "a", "b")
    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        await ask(client, request("d1", block_hashes=bytes(16)), request("d2", strategy="bogus"))
        assert await running.events.flush(2.0)
    (placement,), (rejection,) = (
        await events_of(client, "placement", 1),
        await events_of(client, "rejection", 1),
    )
    assert placement["subject"] == "r-d1"
    data = placement["data"]
    assert (data["decision_id"], data["policy"], data["replica"]) == ("d1", "cache-aware", "s1")
    assert (data["ingress"], data["blocks"], data["prompt_tokens"]) == ("i", 2, 10)
    assert {candidate["instance"] for candidate in data["candidates"]} == {"a", "b"}
    assert rejection["subject"] == "r-d2"
    assert rejection["data"]["reason"] == "bad_strategy"
    assert running.count("penstock_scheduler_decisions_total", "cache-aware", "placement") == 1
    assert running.count("penstock_scheduler_decisions_total", "unknown", "bad_strategy") == 1


async def test_it_leaves_the_queue_group_before_it_stops_and_siblings_take_over() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker, "s1") as one, replica(broker, "s2") as two:
        await eventually(lambda: one.serving and two.serving)
        in_hand = asyncio.gather(*(ask(client, request(f"d{n}")) for n in range(4)))
        await asyncio.sleep(0)
        await one.service.drain()
        assert {reply.replica for reply in await in_hand} == {"s1", "s2"}
        replies = [await ask(client, request(f"e{n}")) for n in range(4)]
        assert {reply.replica for reply in replies} == {"s2"}


async def test_replicas_alive_are_counted_by_their_heartbeats() -> None:
    broker, client = wire()
    async with replica(broker) as running:
        peers = running.service.replica.peers
        for beat in (
            Heartbeat("scheduler", "s1", "1", ready=True),
            Heartbeat("scheduler", "s2", "1", ready=True),
            Heartbeat("scheduler", "s3", "1", ready=False),
            Heartbeat("discovery", "x", "1", ready=True),
            Heartbeat("ingress", "i", "1", ready=False),
        ):
            client.publish(HEARTBEAT, beat, beat.service)
        await eventually(lambda: peers.ingresses == ["i"])
        assert peers.replicas == 2
        client.publish(HEARTBEAT, Heartbeat("scheduler", "s2", "1", ready=False), "scheduler")
        await eventually(lambda: peers.replicas == 1)
        running.clock.now += 4.0
        await eventually(lambda: peers.ingresses == [])


async def test_a_scheduler_that_fell_silent_is_told_of_until_one_joins() -> None:
    broker, client = wire()

    def beat(name: str, ready: bool = True) -> None:
        client.publish(HEARTBEAT, Heartbeat("scheduler", name, "1", ready), "scheduler")

    async with replica(broker) as running:
        running.clock.now += 60.0
        peers = running.service.replica.peers
        for name in ("leaves", "dies"):
            beat(name)
        await eventually(lambda: peers.replicas == 3)
        beat("leaves", ready=False)
        await eventually(lambda: peers.replicas == 2)
        running.clock.now += 4.0
        await eventually(lambda: peers.replicas == 1)
        assert peers.lost_schedulers == {"dies"}
        beat("joins")
        await eventually(lambda: peers.replicas == 2)
        events = await events_of(client, "degraded", 2)
        assert [(e["data"]["what"], e["data"]["active"]) for e in events] == [
            ("a scheduler", True),
            ("a scheduler", False),
        ]
        assert "dies" in events[0]["data"]["cause"]


async def test_while_the_bus_is_away_nothing_is_released_and_service_resumes_by_itself() -> None:
    broker, client = wire()
    await register(client, "a", "b")
    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        client.publish(LOAD, report(1, InFlight("w", "a")), "i")
        await eventually(lambda: running.ledger.in_flight == 1)
        client.publish(HEARTBEAT, Heartbeat("ingress", "i", "1", ready=True), "ingress")
        await eventually(lambda: running.service.replica.peers.ingresses)
        broker.set_up(False)
        await eventually(lambda: running.service.replica.table.lost)
        assert running.lifecycle.missing() == ["bus: not connected"]
        running.clock.now += 60.0
        # Housekeeping has run: it forgot the ingress's heartbeat, but not its work.
        await eventually(lambda: not running.service.replica.peers.ingresses)
        assert running.ledger.in_flight == 1
        broker.set_up(True)
        await eventually(lambda: not running.service.replica.table.lost)
        assert instances_of(await ask(client, request("d"))) == {"b": 1}
        running.clock.now += 6.0
        await eventually(lambda: running.ledger.in_flight == 0)
        assert await running.events.flush(2.0)
    events = await events_of(client, "degraded", 2)
    assert [(e["data"]["what"], e["data"]["active"]) for e in events] == [
        ("registry", True),
        ("registry", False),
    ]


async def test_an_instance_that_goes_takes_no_more_and_its_prefixes_are_forgotten() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        hashes = bytes(range(64))
        await ask(client, request("d1", block_hashes=hashes))
        await client.delete(INSTANCES, instance_key("a"))
        await register(client, "b")
        await eventually(lambda: running.view.slot("b") is not None)
        (outcome,) = (await ask(client, request("d2", block_hashes=hashes))).outcomes
        assert isinstance(outcome, Placement)
        assert (outcome.instance, outcome.matched_blocks) == ("b", 0)


async def test_a_policy_that_fails_is_counted_each_time_and_told_when_it_begins_and_ends(
    tmp_path: Path,
) -> None:
    module = tmp_path / "broken.py"
    module.write_text("POLICIES = {'broken': lambda request, pool: [pool.nothing]}")
    broker, client = wire()
    await client.ensure_stream(EVENTS)
    await register(client, "a", "b")
    async with replica(broker, policy_module=str(module), default_routing_strategy="broken") as running:
        await eventually(lambda: running.serving)
        reply = await ask(client, *(request(f"d{n}") for n in range(6)))
        assert instances_of(reply) == {"a": 3, "b": 3}
        assert {outcome.policy for outcome in reply.outcomes if isinstance(outcome, Placement)} == {
            "least-request"
        }
        assert running.count("penstock_scheduler_policy_faults_total", "broken", "raised") == 6
        assert await running.events.flush(2.0)
        assert len(await events_of(client, "placement", 6)) == 6
        running.clock.now += QUIET_S - 1.0
        await ask(client, request("d6"))
        running.clock.now += QUIET_S - 1.0
        await ask(client, request("d7"))
        running.clock.now += QUIET_S
        told = await events_of(client, "degraded", 2)
    assert [(event["data"]["what"], event["data"]["active"]) for event in told] == [
        ("policy broken", True),
        ("policy broken", False),
    ]
    assert "raised: AttributeError" in told[0]["data"]["cause"]


async def test_a_saturated_pool_says_so_and_when_to_come_back() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker, max_requests_per_instance=2) as running:
        await eventually(lambda: running.serving)
        reply = await ask(client, *(request(f"d{n}") for n in range(3)))
        placed, also_placed, refused = reply.outcomes
        assert isinstance(placed, Placement)
        assert isinstance(also_placed, Placement)
        assert isinstance(refused, Rejection)
        assert (refused.reason, refused.retry_after_s) == (Reason.SATURATED, 1.0)


async def test_speeds_that_an_ingress_reports_reach_the_decisions() -> None:
    broker, client = wire()
    await register(client, "fast", "slow")
    async with replica(broker) as running:
        await eventually(lambda: running.serving)
        speeds = tuple(
            InstanceSpeed(name, 10, 0, 0, 10, 0, ms, 100_000)
            for name, ms in (("fast", 5_000), ("slow", 50_000))
        )
        client.publish(LOAD, LoadReport("i", "1", 1, (), (), 0, 0, False, speeds), "i")
        loads = running.view.loads
        await eventually(lambda: loads.prefill_tokens.sum() > 0)
        running.clock.now += 2.0
        reply = await ask(client, *(request(f"d{n}", prompt_tokens=10_000) for n in range(4)))
        assert instances_of(reply) == {"fast": 4}


async def test_requests_of_an_ingress_that_fell_silent_are_told_lost_under_an_id_of_their_decision() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker) as first, replica(broker, "s2") as second:
        await eventually(lambda: first.serving and second.serving)
        reply = await ask(client, request("d1"))
        work = InFlight("d1", "a", 10), InFlight("unheard-of", "a", 10)
        client.publish(LOAD, report(1, *work, pieces=1), "i")
        await eventually(lambda: first.ledger.in_flight == second.ledger.in_flight == 2)
        for one in (first, second):
            one.clock.now += 10.0
        lost = await events_of(client, "outcome", 4)
        gone = await events_of(client, "writer", 2)
    assert reply.outcomes[0].decision_id == "d1"
    assert Counter((event["source"], event["id"]) for event in lost) == {
        ("/penstock/ingress/i", "lost/d1"): 2,
        ("/penstock/ingress/i", "lost/unheard-of"): 2,
    }
    assert {event["data"]["witness"] for event in lost} == {"s1", "s2"}
    told = [event["data"] for event in lost if event["subject"] == "r-d1"]
    assert told
    for data in told:
        assert (data["outcome"], data["instance"], data["decisions"]) == ("lost", "a", ["d1"])
    assert {(event["data"]["writer"], event["data"]["change"]) for event in gone} == {("ingress/i", "silent")}


async def test_what_prefill_has_computed_goes_ahead_of_what_is_to_compute() -> None:
    broker, client = wire()
    await register(client, "p-1", "d-1")
    fresh = request("d1", mode=Mode.PD_BATCH)
    computed = request("d2", mode=Mode.PD_STAGED, stage=Stage.DECODE, prefill_instance="p-1")
    async with replica(broker, max_requests_per_instance=1) as one:
        await eventually(lambda: one.serving)
        reply = await ask(client, fresh, computed)
    first, second = reply.outcomes
    assert isinstance(first, Rejection)
    assert (first.decision_id, first.reason) == ("d1", Reason.SATURATED)
    assert isinstance(second, Placement)
    assert (second.decision_id, second.instance) == ("d2", "d-1")
