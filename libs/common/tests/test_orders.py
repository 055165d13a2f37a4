"""Orders of administrators: what drains and mappings make of a record; what makes no sense does nothing."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.common.bus import Entry, Listing, Position
from penstock.common.codec import encode_record
from penstock.common.live_config import DRAIN, MAPPING, ConfigRecord, LiveConfig, config_key
from penstock.common.model import Endpoint, Instance, InstanceState
from penstock.common.orders import SERVICE_LABEL, Orders, mapping_name, named_by


def instance(name: str, **said: Any) -> Instance:
    return Instance(**{"id": name, "endpoint": Endpoint("10.0.0.1", 80), "models": ("m",), **said})


def orders(*documents: tuple[str, str, object]) -> Orders:
    """By kind, name and value."""
    entries = {
        config_key(kind, name): Entry(
            encode_record(ConfigRecord(value, 1, "ops", "2030", "admin", kind=kind, name=name)), 1
        )
        for kind, name, value in documents
    }
    config, held = LiveConfig(), Orders()
    config.apply(Listing(Position("a", 1), entries))
    held.take(config)
    return held


def mapping(model: str, owner: str, service: str) -> tuple[str, str, object]:
    value = {"model": model, "owned_by": owner, "service_name": service}
    return MAPPING, mapping_name(model, owner), value


def test_without_orders_a_record_is_as_it_was() -> None:
    record = instance("a", owner="vllm")
    assert orders().amend(record) is record


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "drained by ops"),
        ({"reason": "new driver"}, "drained by ops: new driver"),
        ([1], "drained by ops"),
    ],
)
def test_a_drained_instance_drains_whatever_its_state(value: object, reason: str) -> None:
    held = orders((DRAIN, "a", value))
    for state in InstanceState:
        amended = held.amend(instance("a", state=state))
        assert (amended.state, amended.reason) == (InstanceState.DRAINING, reason)
    assert held.amend(instance("b")).state is InstanceState.READY


def test_a_mapping_says_whose_a_model_is_at_its_service() -> None:
    held = orders(mapping("m", "team", "g"))
    amended = held.amend(instance("a", group="g", owner="vllm", models=("m", "n")))
    assert (amended.owned_by("m"), amended.owned_by("n"), amended.owner) == ("team", "vllm", "vllm")
    assert held.amend(instance("b", owner="vllm")).owned_by("m") == "vllm"


def test_a_mapping_wins_over_what_was_found_for_its_key() -> None:
    held = orders(mapping("m", "vllm", "chosen"))
    assert held.amend(instance("chosen", owner="sglang")).owned_by("m") == "vllm"
    assert held.amend(instance("other", owner="vLLM")).owned_by("m") == ""
    assert held.amend(instance("third", owner="sglang")).owned_by("m") == "sglang"


def test_an_order_that_is_taken_back_leaves_no_trace() -> None:
    record = orders(mapping("m", "team", "a"), (DRAIN, "a", {})).amend(instance("a", owner="vllm"))
    again = orders().amend(record)
    assert again.owners == {}
    assert again.owned_by("m") == "vllm"


@pytest.mark.parametrize("value", [None, 7, {}, {"model": 1, "owned_by": "o", "service_name": "a"}, ["m"]])
def test_a_mapping_that_makes_no_sense_does_nothing(value: object) -> None:
    assert orders((MAPPING, "o/m", value)).amend(instance("a", owner="vllm")).owned_by("m") == "vllm"


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ({}, {"svc.ns_1", "10.0.0.1", "10.0.0.1:80"}),
        ({"group": "g"}, {"svc.ns_1", "g", "10.0.0.1", "10.0.0.1:80"}),
        ({"source": "kubernetes"}, {"svc.ns_1", "svc.ns", "svc", "10.0.0.1", "10.0.0.1:80"}),
        ({"labels": {SERVICE_LABEL: "front"}}, {"svc.ns_1", "front", "10.0.0.1", "10.0.0.1:80"}),
    ],
)
def test_names_of_services(said: dict[str, Any], names: set[str]) -> None:
    tried = {
        "",
        "svc",
        "svc.ns",
        "svc.ns_1",
        "s",
        "g",
        "front",
        "10.0.0.1",
        "10.0.0.1:80",
        "10.0.0.1:8",
        "ns",
    }
    assert {name for name in tried if named_by(instance("svc.ns_1", **said), name)} == names
