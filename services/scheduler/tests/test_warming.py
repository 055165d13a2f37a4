"""A replica on the bus before it takes requests, and while its loop does not keep up."""

from __future__ import annotations

import asyncio

import pytest

from penstock.common.adapters.memory_bus import MemoryBus
from penstock.common.errors import BusTimeout
from penstock.common.messages import (
    Heartbeat,
    Placed,
    PlacedFeed,
    Placement,
    SnapshotCursor,
    SnapshotPiece,
    SnapshotRequest,
)
from penstock.common.subjects import DEFAULT_SHARD, EVENTS, HEARTBEAT, PLACED, SCHEDULE_BY, SNAPSHOT
from penstock.scheduler import warming

from .scheduler_service_lab import (
    Running,
    ask,
    batch,
    events_of,
    eventually,
    register,
    replica,
    request,
    wire,
)

PROMPT = bytes(range(64))


def alive(client: MemoryBus, *names: str) -> None:
    for name in names:
        client.publish(HEARTBEAT, Heartbeat("scheduler", name, "1", ready=True), "scheduler")


async def asked(client: MemoryBus, name: str) -> set[str]:
    """Who answers four requests of one turn, which the queue group hands to its members by turns."""
    replies = await asyncio.gather(*(ask(client, request(f"{name}{n}")) for n in range(4)))
    return {reply.replica for reply in replies}


async def heard(running: Running, replicas: int) -> None:
    await eventually(lambda: running.service.replica.peers.replicas == replicas)


async def test_a_joining_replica_knows_what_was_placed_before_it_takes_requests() -> None:
    broker, client = wire()
    await register(client, *"abcdefgh")
    async with replica(broker, "s1") as one:
        await eventually(lambda: one.serving)
        (first,) = (await ask(client, request("d1", block_hashes=PROMPT))).outcomes
        assert isinstance(first, Placement)
        async with replica(broker, "s2", warm_up_s=1.5) as two:
            alive(client, "s1")
            await heard(two, 2)
            two.clock.now += 1.5
            await eventually(lambda: two.serving)
            assert two.count("penstock_scheduler_warm_ups_total", "snapshot") == 1
            reply = await client.request(
                SCHEDULE_BY,
                batch(request("d2", block_hashes=PROMPT)),
                DEFAULT_SHARD,
                "s2",
                deadline_s=1.0,
            )
            (second,) = reply.outcomes
            assert isinstance(second, Placement)
            assert (second.instance, second.matched_blocks) == (first.instance, 8)


async def test_one_without_siblings_knows_what_was_placed_before_it_was_started_again() -> None:
    broker, client = wire()
    await register(client, *"abcdefgh")
    async with replica(broker, "s1") as one:
        await eventually(lambda: one.serving)
        assert one.count("penstock_scheduler_warm_ups_total", "alone") == 1
        homes = []
        for number in range(3):
            placed = [request(f"d{number}", strategy="random", block_hashes=PROMPT[: 32 + 8 * number])]
            (first,) = (await ask(client, *placed)).outcomes
            assert isinstance(first, Placement)
            homes.append(first.instance)
    # Whoever may publish placements may store nonsense.
    client.publish(PLACED, PlacedFeed("s9", "1", 1, (Placed("x", "i", "1", "gone", tail=PROMPT),)), "0")
    broker.stored.store(PLACED.name("0"), b"\xc1", {})
    async with replica(broker, "s2") as again:
        await eventually(lambda: again.serving)
        assert again.count("penstock_scheduler_warm_ups_total", "replay") == 1
        assert again.ledger.in_flight == 0
        (second,) = (
            await ask(client, request("d9", strategy="prefix-cache", block_hashes=PROMPT[:48]))
        ).outcomes
        assert isinstance(second, Placement)
        assert (second.instance, second.matched_blocks) == (homes[-1], 6)


async def test_a_stream_that_cannot_be_read_is_waited_for_no_longer_than_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(warming, "REPLAY_S", 0.0)
    broker, client = wire()
    await register(client, "a")
    async with replica(broker, "s1") as one:
        await eventually(lambda: one.serving)
        assert one.count("penstock_scheduler_warm_ups_total", "alone") == 1


async def test_a_replica_that_is_not_warm_gives_no_snapshot() -> None:
    broker, client = wire()
    async with replica(broker, "s1"):
        piece = await client.request(SNAPSHOT, SnapshotRequest("s2"), DEFAULT_SHARD, "s1", deadline_s=1.0)
        assert piece.refused
        assert piece.next is None


Answer = SnapshotPiece | None


@pytest.mark.parametrize(
    "answer",
    [
        SnapshotPiece("bad", "1", refused=True),
        SnapshotPiece("bad", "1", SnapshotCursor(1, 0, 5), hashes=bytes(8)),
        SnapshotPiece("bad", "1", SnapshotCursor(1, 0, 5)),
        SnapshotPiece("another", "1"),
        None,
    ],
    ids=["refuses", "contradicts itself", "never ends", "is somebody else", "is silent"],
)
async def test_after_a_sibling_that_gives_none_the_next_is_asked(
    answer: Answer,
) -> None:
    broker, client = wire()
    await register(client, "a")
    await client.serve(SNAPSHOT, lambda _: answer, DEFAULT_SHARD, "bad")
    async with replica(broker, "s1") as one:
        await eventually(lambda: one.serving)
        await ask(client, request("d1", block_hashes=PROMPT))
        async with replica(broker, "s2", warm_up_s=1.5) as two:
            # Which of them is asked first depends on the name.
            alive(client, "s1", "bad")
            await heard(two, 3)
            two.clock.now += 1.5
            await eventually(lambda: two.serving)
            assert len(two.service.replica.index) == 8
            assert two.count("penstock_scheduler_warm_ups_total", "snapshot") == 1


async def test_without_a_snapshot_it_listens_for_a_while_and_joins_cold() -> None:
    broker, client = wire()
    await register(client, "a")
    await client.serve(SNAPSHOT, lambda _: SnapshotPiece("bad", "1", refused=True), DEFAULT_SHARD, "bad")
    async with replica(broker, "s2", warm_up_s=1.5) as two:
        alive(client, "bad")
        await heard(two, 2)
        two.clock.now += 1.5
        await eventually(lambda: "cold, listening" in str(two.lifecycle.missing()))
        alive(client, "bad")
        two.clock.now += 3.0
        await eventually(lambda: "for 7 s more" in str(two.lifecycle.missing()))
        alive(client, "bad")
        two.clock.now += warming.COLD_S
        await eventually(lambda: two.serving)
        assert two.count("penstock_scheduler_warm_ups_total", "cold") == 1


async def test_siblings_that_go_are_not_waited_for() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker, "s2", warm_up_s=1.5) as two:
        alive(client, "gone")
        await heard(two, 2)
        two.clock.now += 1.5
        await eventually(lambda: "cold, listening" in str(two.lifecycle.missing()))
        leaves = Heartbeat("scheduler", "gone", "1", ready=False)
        client.publish(HEARTBEAT, leaves, "scheduler")
        await eventually(lambda: two.serving)


async def test_placements_that_were_missed_are_made_up_for_by_a_snapshot() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker, "s1") as one, replica(broker, "s2") as two:
        await eventually(lambda: one.serving and two.serving)
        alive(client, "s1")
        await heard(two, 2)
        two.service.replica.missing = 3
        await eventually(lambda: two.count("penstock_scheduler_warm_ups_total", "snapshot") == 1)
        await eventually(lambda: two.service.replica.behind == 0)
        assert two.serving


async def test_what_was_missed_stays_missed_without_a_snapshot_and_requests_are_taken_meanwhile() -> None:
    broker, client = wire()
    await register(client, "a")
    await client.serve(SNAPSHOT, lambda _: SnapshotPiece("bad", "1", refused=True), DEFAULT_SHARD, "bad")
    async with replica(broker, "s1") as one:
        await eventually(lambda: one.serving)
        alive(client, "bad")
        await heard(one, 2)
        one.service.replica.missing = 3
        await eventually(lambda: one.count("penstock_scheduler_warm_ups_total", "refused") == 1)
        await eventually(lambda: one.service.replica.behind == 3)
        assert one.serving


async def test_a_replica_whose_loop_lags_leaves_and_comes_back_by_itself() -> None:
    broker, client = wire()
    await client.ensure_stream(EVENTS)
    await register(client, "a")
    async with replica(broker, "s1") as one, replica(broker, "s2", max_loop_lag_ms=250) as two:
        await eventually(lambda: one.serving and two.serving)
        two.loop_clock.rate = 4.0
        await eventually(lambda: two.lifecycle.missing() == ["requests: the event loop lags"])
        assert await asked(client, "d") == {"s1"}
        assert two.count("penstock_scheduler_loop_lags") == 1
        two.loop_clock.rate = 1.9
        await eventually(lambda: two.serving)
        assert await asked(client, "e") == {"s1", "s2"}
        assert await two.events.flush(2.0)
    told = await events_of(client, "degraded", 2)
    assert [(e["data"]["what"], e["data"]["active"]) for e in told] == [
        ("event loop", True),
        ("event loop", False),
    ]


async def test_what_waited_while_the_process_stood_still_is_not_decided_and_silence_forgiven() -> None:
    broker, client = wire()
    await register(client, "a")
    async with replica(broker, "s1") as one:
        await eventually(lambda: one.serving)
        alive(client, "s2")
        client.publish(HEARTBEAT, Heartbeat("ingress", "i", "1", ready=True), "ingress")
        await heard(one, 2)
        one.clock.now += 20.0
        one.loop_clock.skipped_s += 20.0
        answers = client.request(SCHEDULE_BY, batch(request("d1")), DEFAULT_SHARD, "s1", deadline_s=0.05)
        with pytest.raises(BusTimeout):
            await answers
        assert one.ledger.in_flight == 0
        assert one.service.replica.peers.ingresses == ["i"]
        assert one.count("penstock_scheduler_batches_expired_total") == 1
        client.publish(HEARTBEAT, Heartbeat("scheduler", "s2", "1", ready=False), "scheduler")
        await eventually(lambda: one.count("penstock_scheduler_warm_ups_total", "alone") == 2)
        await eventually(lambda: one.serving)
        assert (await ask(client, request("d2"))).replica == "s1"
