"""The fleet: verdicts and lists in, records and events out."""

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.codec import decode_record
from penstock.common.model import Endpoint, Instance, InstanceState, Role
from penstock.discovery.flaps import Flaps
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


def test_a_listed_change_is_an_update() -> None:
    fleet = fleet_of()
    fleet.judge("a", GOOD)
    (event,) = fleet.desire([instance(role=Role.DECODE)])
    assert (event.change, fleet.records()[0].role, fleet.records()[0].state) == (
        "updated",
        Role.DECODE,
        READY,
    )


@pytest.mark.parametrize(("verdict", "change"), [(GOOD, "updated"), (BAD, "unhealthy")])
def test_another_address_under_the_same_id_counts_once_it_was_probed(verdict: Verdict, change: str) -> None:
    fleet, old, new = fleet_of(), Endpoint("a", 1), Endpoint("a", 2)
    fleet.judge("a", GOOD)
    assert fleet.desire([instance(port=2)]) == []
    assert (fleet.records()[0].endpoint, fleet.endpoints(), fleet.unjudged) == (old, {"a": new}, 1)
    assert fleet.judge("a", BAD, endpoint=old) is None
    event = fleet.judge("a", verdict, endpoint=new)
    assert event is not None
    assert (event.change, event.endpoint) == (change, "a:2")
    assert (fleet.records()[0].endpoint, fleet.unjudged) == (new, 0)


@pytest.mark.parametrize(
    "marked", [{"state": InstanceState.DRAINING}, {"labels": {"penstock.io/drain": "True"}}]
)
def test_an_instance_marked_as_draining_stays_until_its_source_lets_go(marked: dict[str, Any]) -> None:
    fleet, drained = fleet_of(), msgspec.structs.replace(instance(), **marked)
    fleet.judge("a", GOOD)
    (event,) = fleet.desire([drained])
    assert (event.change, event.reason) == ("draining", "its source marks it so")
    assert [fleet.judge("a", verdict) for verdict in (BAD, BAD, GOOD)] == [None] * 3
    (record,) = fleet.records()
    assert (record.state, record.takes_work) == (InstanceState.DRAINING, False)
    assert [event.change for event in fleet.desire([instance()])] == ["recovered"]
    assert [event.change for event in fleet.desire([])] == ["removed"]


def test_a_source_that_calls_an_instance_unhealthy_is_believed() -> None:
    fleet = fleet_of()
    fleet.judge("a", GOOD)
    said = msgspec.structs.replace(instance(), state=UNHEALTHY, reason="not ready")
    assert [(event.change, event.reason) for event in fleet.desire([said])] == [("unhealthy", "not ready")]
    assert [event.change for event in fleet.desire([instance()])] == ["recovered"]


def test_a_silent_source_makes_ready_instances_stale_and_they_take_work_while_probes_are_good() -> None:
    fleet = fleet_of(instance("a"), instance("b"))
    fleet.judge("a", GOOD)
    fleet.judge("b", BAD)
    both = [instance("a"), instance("b")]
    (event,) = fleet.desire(both, stale="redis: refused")
    assert (event.instance, event.change, event.reason) == ("a", "stale", "redis: refused")
    assert [(record.state, record.takes_work) for record in fleet.records()] == [
        (InstanceState.STALE, True),
        (UNHEALTHY, False),
    ]
    event_of_b = fleet.judge("b", GOOD)
    assert event_of_b is not None
    assert event_of_b.change == "stale"
    fleet.judge("a", BAD)
    fell = fleet.judge("a", BAD)
    assert fell is not None
    assert fell.change == "unhealthy"
    assert [event.change for event in fleet.desire(both)] == ["recovered"]


@pytest.mark.parametrize(
    ("named", "adapters", "found", "models", "loras", "state"),
    [
        ((), (), GOOD, ("m",), (), READY),
        (("m",), ("mine",), Verdict(models=("m", "n"), lora_adapters=("l",)), ("m",), ("l", "mine"), READY),
        (("l",), (), Verdict(models=("m",), lora_adapters=("l",)), ("l",), (), READY),
        (("m",), (), Verdict(), ("m",), (), READY),
        (("x",), (), GOOD, ("x",), (), UNHEALTHY),
        ((), (), Verdict(), (), (), UNHEALTHY),
    ],
)
def test_a_record_that_names_models_restricts_what_the_engine_lists(
    named: tuple[str, ...],
    adapters: tuple[str, ...],
    found: Verdict,
    models: tuple[str, ...],
    loras: tuple[str, ...],
    state: InstanceState,
) -> None:
    fleet = fleet_of(msgspec.structs.replace(instance(), models=named, lora_adapters=adapters))
    fleet.judge("a", found)
    (record,) = fleet.records()
    assert (record.models, record.lora_adapters, record.state) == (models, loras, state)


def test_the_engine_is_named_by_the_record_then_by_its_models_then_by_its_metrics() -> None:
    fleet, address = fleet_of(), Endpoint("a", 1)
    fleet.judge("a", Verdict(models=("m",)))
    event = fleet.recognise("a", "sglang", address)
    assert event is not None
    assert (event.change, fleet.records()[0].engine) == ("updated", "sglang")
    fleet.judge("a", Verdict(models=("m",), engine="vllm"))
    assert fleet.records()[0].engine == "vllm"
    fleet.desire([msgspec.structs.replace(instance(), engine="trt")])
    assert fleet.records()[0].engine == "trt"
    assert fleet.recognise("a", "", address) is None
    assert fleet.recognise("gone", "vllm", address) is None


def test_each_failure_of_late_doubles_the_good_probes_that_are_asked_for() -> None:
    fleet = Fleet("endpoints", 1, 1, Flaps(600))
    fleet.desire([instance()])
    fleet.judge("a", GOOD, 0.0)
    needed = []
    for round_s in range(10):
        fleet.judge("a", BAD, float(round_s))
        count = 0
        while fleet.records()[0].state is UNHEALTHY:
            fleet.judge("a", GOOD, float(round_s))
            count += 1
        needed.append(count)
    assert needed == [1, 2, 4, 8, 16, 32, 64, 64, 64, 64]
    fleet.judge("a", BAD, 1000.0)
    fleet.judge("a", GOOD, 1000.0)
    assert fleet.records()[0].state is READY


def test_an_instance_that_comes_and_goes_proves_itself_like_one_that_fails() -> None:
    fleet = Fleet("endpoints", 1, 1, Flaps(600))
    for _ in range(3):
        fleet.desire([instance()], 1.0)
        for _ in range(9):
            fleet.judge("a", GOOD, 1.0)
        fleet.desire([], 1.0)
    fleet.desire([instance()], 2.0)
    fleet.judge("a", GOOD, 2.0)
    (record,) = fleet.records()
    assert (record.state, record.reason) == (UNHEALTHY, "1 of 4 good probes, having failed 3 times of late")


def test_what_leaves_for_another_source_goes_without_a_word_and_goes_on_there() -> None:
    first, second = fleet_of(), Fleet("redis", 1, 2)
    first.judge("a", GOOD)
    second.adopt(first.records())
    assert first.desire([], elsewhere={"a"}) == []
    (event,) = second.desire([instance()])
    assert (event.change, event.source, event.state) == ("updated", "redis", "ready")


def test_a_record_that_would_not_fit_into_the_registry_is_unhealthy_and_says_so() -> None:
    names = tuple(f"{n:0500}" for n in range(100))
    fleet = fleet_of(msgspec.structs.replace(instance(), lora_adapters=names))
    fleet.judge("a", Verdict(models=("m",), lora_adapters=tuple(f"x{n:0500}" for n in range(100))))
    (record,) = fleet.records()
    assert record.state is UNHEALTHY
    assert record.reason.startswith("its record would be ")
    assert len(fleet.encoded()["instance.a"]) < 65536


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


LISTINGS = st.dictionaries(st.sampled_from("abc"), st.tuples(st.integers(1, 2), st.sampled_from(Role)))
MOMENTS = st.floats(-1e9, 1e9)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("list"), LISTINGS, st.sampled_from(["", "silent"]), MOMENTS),
            st.tuples(st.just("judge"), st.sampled_from("abcx"), st.sampled_from("gb"), MOMENTS),
            st.tuples(st.just("restart"), st.none(), st.none(), MOMENTS),
        ),
        max_size=30,
    ),
    LISTINGS,
)
def test_any_order_of_repeated_stale_and_missing_updates_ends_in_the_same_records(
    steps: list[tuple[str, Any, Any, float]], last: dict[str, tuple[int, Role]]
) -> None:
    """Clocks may jump: the moments come in any order."""

    def made(listing: dict[str, tuple[int, Role]]) -> list[Instance]:
        return [instance(name, port, role) for name, (port, role) in listing.items()]

    def finish(fleet: Fleet) -> dict[str, Instance]:
        fleet.desire(made(last))
        for name in last:
            for _ in range(70):
                fleet.judge(name, GOOD, 2e9, fleet.endpoints()[name])
        assert {key: decode_record(Instance, value) for key, value in fleet.encoded().items()} == {
            f"instance.{record.id}": record for record in fleet.records()
        }
        return {record.id: record for record in fleet.records()}

    fleet = Fleet("endpoints", 1, 2, Flaps(600))
    for kind, what, how, now in steps:
        if kind == "list":
            fleet.desire(made(what), now, stale=how)
            fleet.desire(made(what), now, stale=how)
        elif kind == "judge":
            fleet.judge(what, VERDICTS[how], now)
        else:
            held = fleet.records()
            fleet = Fleet("endpoints", 1, 2, Flaps(600))
            fleet.adopt(held)
    assert finish(fleet) == finish(Fleet("endpoints", 1, 2))
    assert fleet.unjudged == 0
