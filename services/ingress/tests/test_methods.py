"""By which method a request is divided, and which profiles cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.common.bus import Entry, Listing, Position
from penstock.common.codec import encode_record
from penstock.common.instances import InstanceTable, complete_key, encode_instance, instance_key
from penstock.common.messages import CompleteMarker, ScheduleRequest
from penstock.common.model import Endpoint, Instance, Role
from penstock.common.profiles import read_document
from penstock.ingress.failures import GatewayError
from penstock.ingress.methods import Methods


def table_of(**connectors: str) -> InstanceTable:
    """A prefill instance of model `m` for each, with this connector in its record."""
    entries = {complete_key("t"): Entry(encode_record(CompleteMarker("t", ("t",))), 1)}
    for revision, (name, connector) in enumerate(connectors.items(), 2):
        labels = {"kv_connector": connector} if connector else {}
        one = Instance(
            id=name, endpoint=Endpoint("h", 1), models=("m",), role=Role.PREFILL, labels=labels, source="t"
        )
        entries[instance_key(name)] = Entry(encode_instance(one), revision)
    table = InstanceTable()
    table.apply(Listing(Position("t", len(entries)), entries))
    return table


def method(
    config: Any = None, *, protocol: str = "", staged: bool = False, spoken: str = "", **asked: Any
) -> tuple[str, bool] | None:
    """(protocol, staged) of a request under such profiles, flags and records; None if it is not divided."""
    methods = Methods(protocol, staged=staged, table=table_of(p=spoken))
    if config is not None:
        methods.configure({"m": read_document(config)})
    found = methods.of(ScheduleRequest("d", "r", "m", **asked))
    assert found is None or methods.divides or asked.get("strategy") == "pd"
    return None if found is None else (found.name, found.staged)


def pd(name: str = "default", **more: Any) -> dict[str, Any]:
    return {"profiles": {name: {"disaggregation": more}}}


@pytest.mark.parametrize(
    ("config", "more", "wanted"),
    [
        (None, {}, None),
        (None, {"protocol": "vllm-kvt"}, ("vllm-kvt", False)),
        (None, {"protocol": "vllm-kvt", "staged": True}, ("vllm-kvt", True)),
        (None, {"spoken": "nixl"}, None),
        (None, {"spoken": "nixl", "strategy": "pd"}, ("vllm-nixl", False)),
        # AIBrix's name for what speaks NIXL's format.
        (None, {"spoken": "shfs", "strategy": "pd"}, ("vllm-nixl", False)),
        (pd(protocol="vllm-nixl"), {}, ("vllm-nixl", False)),
        # A profile counts before the flags, the flags before the records.
        (pd(protocol="vllm-nixl"), {"protocol": "vllm-kvt", "staged": True}, ("vllm-nixl", True)),
        (pd(protocol="vllm-nixl", mode="staged"), {}, ("vllm-nixl", True)),
        (pd(mode="batched"), {"protocol": "vllm-kvt", "staged": True}, ("vllm-kvt", False)),
        (pd(mode="staged"), {"spoken": "kvt"}, ("vllm-kvt", True)),
        (pd(skip_below_tokens=9), {"spoken": "kvt"}, None),
        (pd(mode="off"), {"protocol": "vllm-kvt"}, None),
        (pd(mode="off"), {"protocol": "vllm-kvt", "strategy": "pd"}, ("vllm-kvt", False)),
        # Another profile than the request's.
        (pd("long", protocol="vllm-nixl"), {}, None),
        (pd("long", protocol="vllm-nixl"), {"profile": "long"}, ("vllm-nixl", False)),
        (
            {
                "profiles": {
                    "long": {"disaggregation": {"protocol": "vllm-nixl"}, "auto": {"prompt_tokens_gte": 9}}
                }
            },
            {"profile": "auto", "prompt_tokens": 9},
            ("vllm-nixl", False),
        ),
        # As a policy, in AIBrix's manner: a header counts before it, a lock before both.
        ({"profiles": {"default": {"routing_strategy": "pd"}}}, {"spoken": "nixl"}, ("vllm-nixl", False)),
        (
            {"profiles": {"default": {"routing_strategy": "pd"}}},
            {"spoken": "nixl", "strategy": "random"},
            None,
        ),
        ({"locked_routing_strategy": "pd"}, {"spoken": "nixl", "strategy": "random"}, ("vllm-nixl", False)),
        ({"locked_routing_strategy": "random"}, {"spoken": "nixl", "strategy": "pd"}, None),
        ({"profiles": {"default": {"locked": True}}}, {"spoken": "nixl", "strategy": "pd"}, None),
    ],
)
def test_profiles_count_before_flags_before_records(
    config: Any, more: dict[str, Any], wanted: tuple[str, bool] | None
) -> None:
    assert method(config, **more) == wanted


@pytest.mark.parametrize("spoken", ["", "unheard-of"])
def test_where_nobody_names_a_protocol_the_request_is_refused(spoken: str) -> None:
    with pytest.raises(GatewayError, match="neither --pd-disagg-protocol nor a config profile") as caught:
        method(strategy="pd", spoken=spoken)
    assert (caught.value.code, caught.value.param) == ("invalid_strategy", "routing-strategy")


def test_records_that_name_several_protocols_name_none() -> None:
    methods = Methods("", staged=False, table=table_of(a="nixl", b="kvt"))
    with pytest.raises(GatewayError, match="do not name one"):
        methods.of(ScheduleRequest("d", "r", "m", strategy="pd"))


@pytest.mark.parametrize(
    ("config", "protocol", "staged", "fault"),
    [
        (pd(protocol="vllm-nixl", mode="staged"), "", False, ""),
        (pd(protocol="sglang-mooncake", mode="batched"), "", True, ""),
        (pd(mode="off"), "sglang-mooncake", True, ""),
        (pd(protocol="nixl"), "", False, "protocol 'nixl' is unknown: one of vllm-kvt"),
        (pd(protocol="sglang-mooncake", mode="staged"), "", False, "staged is done by vllm-kvt"),
        (pd(protocol="sglang-mooncake"), "vllm-kvt", True, "staged is done by vllm-kvt"),
        (pd(mode="staged"), "sglang-mooncake", False, "staged is done by vllm-kvt"),
    ],
)
def test_what_a_protocol_cannot_do_is_a_fault_of_the_document(
    config: Any, protocol: str, staged: bool, fault: str
) -> None:
    methods = Methods(protocol, staged=staged, table=table_of())
    found = methods.fault(read_document(config))
    assert fault in found
    assert found.startswith("profiles.default.disaggregation: " if fault else "")
    assert bool(found) is bool(fault)
