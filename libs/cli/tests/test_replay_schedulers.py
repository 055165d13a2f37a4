"""Replicas in a replay: what each of them knows, and when."""

import struct
from collections.abc import Sequence

from penstock.cli.replay.schedulers import Schedulers
from penstock.cli.replay.setups import Setup
from penstock.cli.replay.timeline import Timeline
from penstock.scheduler.chain import unpack
from penstock.scheduler.policies.catalog import Catalog
from penstock.scheduler.policies.table import Thresholds
from penstock.sim.cluster import Arrival, Cluster
from penstock.sim.engine import Engine
from penstock.sim.spec import EngineRequest, EngineSpec

PACKED = struct.pack("<4Q", *(number << 32 for number in range(1, 5)))
HASHES = tuple(unpack(PACKED))
ALL = -1


def stand(replicas: int, delay_ms: float, ingresses: int = 1) -> tuple[list[Engine], Schedulers]:
    engines = [Engine(EngineSpec(kv_blocks=1000, block_size=100)) for _ in range(3)]
    setup = Setup("prefix-cache", 3, replicas, delay_ms, ingresses)
    catalog = Catalog(Thresholds())
    return engines, Schedulers(
        engines, catalog, setup, lambda _: PACKED, index_blocks=10_000, kv_factor=0, seed=1
    )


def request(name: str) -> EngineRequest:
    return EngineRequest(name, 400, 50, HASHES)


def knowing(schedulers: Schedulers) -> int:
    """Replicas that know of somebody who holds the prompt."""
    return sum(bool(replica.index.match(HASHES, ALL)) for replica in schedulers.replicas)


def counts(schedulers: Schedulers) -> list[int]:
    return [replica.ledger.in_flight for replica in schedulers.replicas]


def test_a_placement_is_known_to_its_replica_at_once_and_to_others_after_the_delay() -> None:
    engines, schedulers = stand(3, delay_ms=20.0)
    first = schedulers.decide(request("a"), 1.0, engines)
    assert (knowing(schedulers), sorted(counts(schedulers))) == (1, [0, 0, 1])
    schedulers.decide(request("b"), 1.019, engines)
    assert max(counts(schedulers)) <= 2
    assert schedulers.decide(request("c"), 1.040, engines) == first
    assert knowing(schedulers) == 3


def test_requests_of_one_instant_and_ingress_go_to_one_replica() -> None:
    engines, schedulers = stand(4, delay_ms=1000.0)
    for number in range(8):
        schedulers.decide(request(str(number)), 1.0, engines)
    assert sorted(counts(schedulers)) == [0, 0, 0, 8]
    for number in range(8, 40):
        schedulers.decide(request(str(number)), 1.0 + number / 1000, engines)
    assert all(counts(schedulers))


def test_at_the_end_no_replica_counts_anything_in_flight() -> None:
    engines, schedulers = stand(2, delay_ms=5.0, ingresses=2)
    most: list[int] = []

    def decide(one: EngineRequest, now: float, fleet: Sequence[Engine]) -> int:
        most.append(max(counts(schedulers)))
        return schedulers.decide(one, now, fleet)

    arrivals = [Arrival(0.3 * number, request(str(number))) for number in range(40)]
    cluster = Cluster(engines, decide, schedulers.observe)
    outcomes = cluster.run(arrivals)
    assert len(outcomes) == 40
    # Answers take 1.05 s, so that without word of those that ended all 40 would be counted.
    assert 3 <= max(most) <= 12
    schedulers.pass_to(max(arrival.at_s for arrival in arrivals) + 60.0)
    assert counts(schedulers) == [0, 0]


def test_a_timeline_calls_in_order_of_time_and_of_entry() -> None:
    timeline, called = Timeline(), list[tuple[str, float]]()
    timeline.every(2.0, lambda now: called.append(("every", now)), first_s=1.0)
    timeline.at(3.0, lambda now: called.append(("late", now)))
    timeline.at(0.5, lambda now: timeline.at(0.5, lambda at: called.append(("entered while calling", at))))
    timeline.pass_to(3.0)
    assert called == [("entered while calling", 0.5), ("every", 1.0), ("late", 3.0), ("every", 3.0)]
    timeline.pass_to(4.9)
    assert len(called) == 4
