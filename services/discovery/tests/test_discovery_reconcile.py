"""The fleet: verdicts and lists in, records and events out."""

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.model import Endpoint, Instance, InstanceState, Role
from penstock.discovery.reconcile import Fleet, Verdict

READY, UNHEALTHY = InstanceState.READY, InstanceState.UNHEALTHY
GOOD = Verdict(models=("m",), owner="vllm")
BAD = Verdict("refused", "connection refused")
VERDICTS = {"g": GOOD, "b": BAD}


def instance(name: str = "a", port: int = 1, role: Role = Role.NEUTRAL) -> Instance:
    return Instance(id=name, endpoint=Endpoint(name, port), role=role)


def fleet_of(*instances: Instance, rise: int = 1, fall: int = 2) -> Fleet:
    fleet = Fleet("endpoints", rise, fall)
    fleet.desire(instances or [instance()])
    return fleet


def state_after(history: str, rise: int, fall: int) -> tuple[InstanceState, str]:
    fleet = fleet_of(rise=rise, fall=fall)
    for letter in history:
        fleet.judge("a", VERDICTS[letter])
    (record,) = fleet.records()
    return record.state, record.reason


@pytest.mark.parametrize(
    ("history", "rise", "fall", "state", "reason"),
    [
        ("g", 1, 2, READY, ""),
        ("g", 3, 2, READY, ""),
        ("b", 1, 2, UNHEALTHY, "connection refused"),
        ("b", 1, 9, UNHEALTHY, "connection refused"),
        ("gb", 1, 2, READY, ""),
        ("gbb", 1, 2, UNHEALTHY, "connection refused"),
        ("gbgbgb", 1, 2, READY, ""),
        ("gb", 1, 1, UNHEALTHY, "connection refused"),
        ("bg", 1, 2, READY, ""),
        ("gbbg", 3, 2, UNHEALTHY, "1 of 3 good probes"),
        ("gbbggbgg", 3, 2, UNHEALTHY, "2 of 3 good probes"),
        ("gbbggg", 3, 2, READY, ""),
    ],
)
def test_rise_and_fall_damp_what_follows_the_first_verdict(
    history: str, rise: int, fall: int, state: InstanceState, reason: str
) -> None:
    assert state_after(history, rise, fall) == (state, reason)


def test_an_instance_has_no_record_before_its_first_verdict() -> None:
    fleet = fleet_of(instance("a"), instance("b"))
    assert (fleet.records(), fleet.unjudged) == ([], 2)
    fleet.judge("a", GOOD)
    assert ([record.id for record in fleet.records()], fleet.unjudged) == (["a"], 1)


def test_a_record_joins_what_the_source_lists_with_what_the_engine_says() -> None:
    fleet = fleet_of(instance(role=Role.PREFILL))
    fleet.judge("a", Verdict(models=("m",), lora_adapters=("l",), owner="sglang"))
    assert fleet.records() == [
        Instance(
            id="a",
            endpoint=Endpoint("a", 1),
            role=Role.PREFILL,
            models=("m",),
            lora_adapters=("l",),
            owner="sglang",
            state=READY,
            source="endpoints",
        )
    ]


def test_an_unhealthy_instance_keeps_its_last_known_models() -> None:
    fleet = fleet_of()
    for verdict in (GOOD, BAD, BAD):
        fleet.judge("a", verdict)
    (record,) = fleet.records()
    assert (record.models, record.owner, record.state) == (("m",), "vllm", UNHEALTHY)


def test_each_change_is_told_once_with_its_reason() -> None:
    fleet = fleet_of()
    told = []
    for verdict in (BAD, BAD, GOOD, GOOD, BAD, BAD, BAD, GOOD, Verdict(models=("m", "n"))):
        event = fleet.judge("a", verdict)
        told.append((event.change, event.state, event.reason, event.models) if event else None)
    assert told == [
        ("added", "unhealthy", "connection refused", ()),
        None,
        ("recovered", "ready", "", ("m",)),
        None,
        None,
        ("unhealthy", "unhealthy", "connection refused", ("m",)),
        None,
        ("recovered", "ready", "", ("m",)),
        ("updated", "ready", "", ("m", "n")),
    ]


def test_another_reason_for_the_same_state_changes_the_record_but_tells_nothing() -> None:
    fleet = fleet_of()
    fleet.judge("a", BAD)
    version = fleet.version
    assert fleet.judge("a", Verdict("timeout", "no answer within 2 s")) is None
    assert fleet.records()[0].reason == "no answer within 2 s"
    assert fleet.version > version


def test_an_instance_that_is_not_listed_any_more_is_removed() -> None:
    fleet = fleet_of(instance("a"), instance("b"))
    fleet.judge("a", GOOD)
    events = fleet.desire([instance("c")])
    assert [(event.instance, event.change) for event in events] == [("a", "removed")]
    assert (fleet.records(), list(fleet.endpoints()), fleet.unjudged) == ([], ["c"], 1)
    assert fleet.judge("a", GOOD) is None


def test_a_listed_change_is_an_update_and_a_moved_endpoint_another_instance() -> None:
    fleet = fleet_of()
    fleet.judge("a", GOOD)
    (event,) = fleet.desire([instance(role=Role.DECODE)])
    assert (event.change, fleet.records()[0].role, fleet.records()[0].state) == (
        "updated",
        Role.DECODE,
        READY,
    )
    (event,) = fleet.desire([instance(port=2, role=Role.DECODE)])
    assert (event.change, fleet.records(), fleet.unjudged) == ("removed", [], 1)


def test_listing_the_same_again_changes_nothing() -> None:
    fleet = fleet_of()
    fleet.judge("a", GOOD)
    version = fleet.version
    assert (fleet.desire([instance()]), fleet.version) == ([], version)


def adopted(*verdicts: Verdict, state: InstanceState = READY) -> Fleet:
    fleet = Fleet("endpoints", rise=2, fall=2)
    held = msgspec.structs.replace(instance(), models=("m",), state=state, source="endpoints", reason="why")
    fleet.adopt([held])
    assert fleet.desire([instance()]) == []
    for verdict in verdicts:
        fleet.judge("a", verdict)
    return fleet


@pytest.mark.parametrize(
    ("held", "verdicts", "state"),
    [
        (READY, (), READY),
        (READY, (BAD,), READY),
        (READY, (BAD, BAD), UNHEALTHY),
        (UNHEALTHY, (), UNHEALTHY),
        (UNHEALTHY, (GOOD,), UNHEALTHY),
        (UNHEALTHY, (GOOD, GOOD), READY),
    ],
)
def test_a_restart_goes_on_from_what_the_registry_holds(
    held: InstanceState, verdicts: tuple[Verdict, ...], state: InstanceState
) -> None:
    fleet = adopted(*verdicts, state=held)
    (record,) = fleet.records()
    assert (record.state, record.models) == (state, ("m",))
    assert fleet.unjudged == (0 if verdicts else 1)


def test_what_was_adopted_and_is_not_listed_is_removed() -> None:
    fleet = adopted()
    assert [event.change for event in fleet.desire([])] == ["removed"]


@pytest.mark.parametrize(
    ("history", "seconds"),
    [
        ("g", 5.0),
        ("gb", 0.5),
        ("gbb", 1.0),
        ("gbbb", 2.0),
        ("gbbbb", 4.0),
        ("gbbbbb", 5.0),
        ("b" * 5000, 5.0),
        ("bg", 0.5),
    ],
)
def test_trouble_is_probed_sooner_and_then_less_and_less_often(history: str, seconds: float) -> None:
    fleet = fleet_of(rise=2)
    for letter in history:
        fleet.judge("a", VERDICTS[letter])
    assert fleet.next_probe_s("a", 5.0) == seconds


def test_probing_sooner_is_never_slower_than_the_interval() -> None:
    fleet = fleet_of()
    fleet.judge("a", BAD)
    assert fleet.next_probe_s("a", 0.1) == 0.1
    assert fleet.next_probe_s("gone", 0.1) == 0.1


@given(
    st.dictionaries(st.sampled_from("abcd"), st.text("gb", max_size=8), min_size=1),
    st.randoms(use_true_random=False),
    st.integers(1, 3),
    st.integers(1, 3),
)
def test_any_interleaving_of_the_same_verdicts_ends_in_the_same_records(
    histories: dict[str, str], rng: random.Random, rise: int, fall: int
) -> None:
    order = [name for name, history in histories.items() for _ in history]
    rng.shuffle(order)
    mixed = fleet_of(*map(instance, histories), rise=rise, fall=fall)
    remaining = {name: iter(history) for name, history in histories.items()}
    for name in order:
        mixed.judge(name, VERDICTS[next(remaining[name])])
    alone = []
    for name, history in histories.items():
        fleet = fleet_of(instance(name), rise=rise, fall=fall)
        for letter in history:
            fleet.judge(name, VERDICTS[letter])
        alone += fleet.records()
    assert mixed.records() == alone
    assert mixed.unjudged == sum(not history for history in histories.values())
