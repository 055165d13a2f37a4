"""The view: slots, numbers, pools; and the draws it lends to policies."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from penstock.common.model import Endpoint, EngineLoad, Instance, InstanceState
from penstock.scheduler.bench import fleet, table_of
from penstock.scheduler.draws import draw, rendezvous, rendezvous_few, rendezvous_keys, seed_of
from penstock.scheduler.view import MAX_REQUESTS, ClusterView


def instance(name: str, *models: str, state: InstanceState = InstanceState.READY) -> Instance:
    return Instance(id=name, endpoint=Endpoint("h", 1), models=models or ("m",), state=state)


def refreshed(view: ClusterView, *instances: Instance) -> tuple[list[str], list[str], list[int]]:
    forgotten: list[int] = []
    added, gone = view.refresh(table_of(instances), forgotten.append)
    return added, gone, forgotten


def in_flight(view: ClusterView, model: str = "m") -> dict[str, float]:
    pool = view.pool(model)
    return {} if pool is None else dict(zip(pool.ids, view.loads.requests[pool.slots].tolist(), strict=True))


def test_an_instance_that_serves_two_models_has_one_number() -> None:
    view = ClusterView()
    assert refreshed(view, instance("b", "m", "n"), instance("a")) == (["a", "b"], [], [])
    view.take([("b", 3, 300, 0), ("nobody", 1, 1, 0)])
    assert in_flight(view) == {"a": 0, "b": 3}
    assert in_flight(view, "n") == {"b": 3}
    assert view.pool("other") is None


def test_slots_outlive_changes_of_the_registry_and_are_forgotten_before_they_are_reused() -> None:
    view = ClusterView()
    refreshed(view, instance("a"), instance("b"))
    view.take([("a", 1, 10, 0), ("b", 2, 20, 0)])
    slot = view.slot("a")
    assert slot is not None
    added, gone, forgotten = refreshed(view, instance("b"), instance("c"))
    assert (added, gone, forgotten) == (["c"], ["a"], [1 << slot])
    assert view.slot("a") is None
    assert view.slot("c") == slot
    assert in_flight(view) == {"b": 2, "c": 0}


def test_a_changed_record_changes_the_pool_and_keeps_slot_number_and_turn() -> None:
    view = ClusterView(first_turn=7)
    refreshed(view, instance("a"))
    before = view.pool("m")
    assert before is not None
    before.turn += 1
    view.take([("a", 4, 40, 0)])
    refreshed(view, instance("a", state=InstanceState.DRAINING))
    after = view.pool("m")
    assert after is not None
    assert not after.instances[0].takes_work
    assert after.turn == 8
    assert in_flight(view) == {"a": 4}


def test_the_arrays_grow_with_the_fleet_and_lose_nothing() -> None:
    view = ClusterView()
    view.refresh(table_of(fleet(60)), lambda slots: None)
    view.take((i, 5, 50, 0) for i in list(in_flight_ids(view)))
    view.refresh(table_of(fleet(300)), lambda slots: None)
    pool = view.pool("m")
    assert pool is not None
    assert len(set(pool.slots.tolist())) == 300
    assert view.loads.requests[pool.slots].sum() == 300


def in_flight_ids(view: ClusterView) -> tuple[str, ...]:
    pool = view.pool("m")
    return pool.ids if pool else ()


@pytest.mark.parametrize(
    ("load", "stored"),
    [
        (EngineLoad(running=3, waiting=1, kv_usage_ratio=0.5), (3, 1, 0.5)),
        (EngineLoad(running=0, waiting=0, kv_usage_ratio=0.0), (0, 0, 0)),
        (EngineLoad(running=4), (4, 8, 0.25)),
        (EngineLoad(running=-1, waiting=5, kv_usage_ratio=math.nan), (9, 5, 0.25)),
        (EngineLoad(running=MAX_REQUESTS + 1, kv_usage_ratio=1.0), (9, 8, 1.0)),
        (EngineLoad(kv_usage_ratio=math.inf), (9, 8, 0.25)),
        (EngineLoad(kv_usage_ratio=-0.1), (9, 8, 0.25)),
        (EngineLoad(), (9, 8, 0.25)),
    ],
)
def test_only_sane_figures_of_engines_are_stored(
    load: EngineLoad, stored: tuple[float, float, float]
) -> None:
    view = ClusterView()
    refreshed(view, instance("a"))
    view.take_status("a", EngineLoad(running=9, waiting=8, kv_usage_ratio=0.25), 10.0)
    usable = view.take_status("a", load, 20.0)
    loads, slot = view.loads, view.slot("a")
    assert slot is not None
    assert (loads.running.item(slot), loads.waiting.item(slot), loads.kv_usage_ratio.item(slot)) == stored
    assert usable == (loads.status_at.item(slot) == 20.0)
    assert view.status_ages(25.0) == [("a", 5.0 if usable else 15.0)]


@pytest.mark.parametrize("measured_at", [5.0, math.nan, -math.inf])
def test_older_or_timeless_figures_are_not_taken(measured_at: float) -> None:
    view = ClusterView()
    refreshed(view, instance("a"), instance("b"))
    assert view.take_status("a", EngineLoad(running=9), 10.0)
    assert not view.take_status("a", EngineLoad(running=1), measured_at)
    assert not view.take_status("nobody", EngineLoad(running=1), 10.0)
    assert view.loads.running.sum() == 9
    assert view.status_ages(10.0) == [("a", 0.0)]


def test_draws_repeat_and_fill_their_range_evenly() -> None:
    seeds = [seed_of(f"decision {number}") for number in range(3000)]
    first = [draw(seed, 0, 3) for seed in seeds]
    assert first == [draw(seed, 0, 3) for seed in seeds]
    assert Counter(first) == pytest.approx({0: 1000, 1: 1000, 2: 1000}, abs=150)
    pairs = Counter((draw(seed, 0, 2), draw(seed, 1, 2)) for seed in seeds)
    assert min(pairs.values()) > 600


def test_a_few_keys_are_ranked_as_many_are() -> None:
    for key in range(200):
        keys = rendezvous_keys(tuple(f"{key}-{number}" for number in range(1 + key % 9)))
        seed = seed_of(str(key))
        assert rendezvous_few(keys.tolist(), seed) == rendezvous(keys, seed)


def test_rendezvous_moves_only_what_the_leaver_had() -> None:
    ids = tuple("abcdefgh")
    keys = rendezvous_keys(ids)
    without_d = np.delete(keys, 3)
    counts: Counter[int] = Counter()
    for number in range(2000):
        key = seed_of(f"prompt {number}")
        place = rendezvous(keys, key)
        counts[place] += 1
        if place != 3:
            assert without_d[rendezvous(without_d, key)] == keys[place]
    assert min(counts.values()) > 170
