"""What the flags of `penstock register` make of the engines, and which faults they find."""

from __future__ import annotations

import pytest

from penstock.common.model import Endpoint, Role
from penstock.common.records import LLUMNIX, parse_record
from penstock.common.settings import SettingsError, load
from penstock.discovery.register.settings import RegisterSettings


def read(*argv: str) -> RegisterSettings:
    return load(RegisterSettings, argv, prog="penstock register", environ={})


def faults(*argv: str) -> str:
    with pytest.raises(SettingsError) as caught:
        read(*argv)
    return "\n".join(caught.value.faults)


def test_one_engine_is_named_by_its_address() -> None:
    settings = read("--engine", "http://127.0.0.1:8000")
    (engine,) = settings.engines()
    assert (engine.base.id, settings.key_name) == ("127.0.0.1:8000", "127.0.0.1:8000")
    assert engine.probe == engine.base.endpoint == Endpoint("127.0.0.1", 8000)
    assert (engine.role_known, engine.size_known) == (False, False)


def test_others_reach_an_engine_at_another_host_than_the_sidecar_does() -> None:
    (engine,) = read("--engine", "https://127.0.0.1:8000", "--advertise-host", "10.0.0.7").engines()
    assert engine.probe == Endpoint("127.0.0.1", 8000, "https")
    assert engine.base.endpoint == Endpoint("10.0.0.7", 8000, "https")
    assert engine.base.id == "10.0.0.7:8000"


@pytest.mark.parametrize(
    ("argv", "local"),
    [
        (("--engine", "127.0.0.1:1"), True),
        (("--engine", "localhost:1"), True),
        (("--engine", "10.0.0.7:1,[::1]:2"), True),
        (("--engine", "10.0.0.7:1"), False),
        (("--engine", "127.0.0.1:1", "--advertise-host", "10.0.0.7"), False),
    ],
)
def test_an_address_for_this_machine_alone_is_noticed(argv: tuple[str, ...], local: bool) -> None:
    assert read(*argv).only_local is local


def test_a_name_is_the_id_of_one_engine_and_is_numbered_for_several() -> None:
    assert [one.base.id for one in read("--engine", "h:1", "--name", "pod").engines()] == ["pod"]
    settings = read("--engine", "h:1,h:2", "--name", "pod")
    assert [one.base.id for one in settings.engines()] == ["pod-0", "pod-1"]
    assert settings.key_name == "pod"


def test_ranks_stand_for_ports_from_that_of_the_engine_upwards() -> None:
    engines = read(
        "--engine", "h:8000", "--dp-ranks", "2", "--dp-start-rank", "4", "--dp-size", "8"
    ).engines()
    assert [(one.probe.port, one.base.dp_rank, one.base.dp_size) for one in engines] == [
        (8000, 4, 8),
        (8001, 5, 8),
    ]
    assert all(one.size_known for one in engines)


@pytest.mark.parametrize(
    ("engine", "role", "roles", "known"),
    [
        ("h:1", "", [Role.NEUTRAL], [False]),
        ("h:1", "decode", [Role.DECODE], [True]),
        ("prefill@h:1,h:2", "", [Role.PREFILL, Role.NEUTRAL], [True, False]),
        ("neutral@h:1,h:2", "decode", [Role.NEUTRAL, Role.DECODE], [True, True]),
    ],
)
def test_a_role_is_that_of_the_entry_else_that_of_the_flag_else_asked_for(
    engine: str, role: str, roles: list[Role], known: list[bool]
) -> None:
    engines = read("--engine", engine, "--role", role).engines()
    assert [one.base.role for one in engines] == roles
    assert [one.role_known for one in engines] == known


def test_everything_else_that_flags_say_stands_in_the_record() -> None:
    (engine,) = read(
        *("--engine", "h:1", "--model", "m, n", "--lora-adapters", "l", "--owned-by", "me"),
        *("--engine-kind", "vllm", "--group", "g", "--kv-address", "10.0.0.7:20000"),
        *("--bootstrap-port", "8998", "--labels", "zone=a, rack = b=c", "--weight", "2.5"),
    ).engines()
    base = engine.base
    assert (base.models, base.lora_adapters, base.owner, base.engine) == (("m", "n"), ("l",), "me", "vllm")
    assert (base.group, base.kv_address, base.bootstrap_port) == ("g", "10.0.0.7:20000", 8998)
    assert (base.labels, base.weight) == ({"zone": "a", "rack": "b=c"}, 2.5)


def test_a_llumnix_record_names_the_pod_of_its_key() -> None:
    settings = read(
        *("--engine", "10.0.0.7:8000", "--dp-ranks", "2", "--name", "pod", "--model", "m"),
        *("--discovery-record-format", "llumnix", "--kv-address", "10.0.0.7:20000"),
    )
    value = settings.encode(tuple(engine.base for engine in settings.engines()), 1_000)
    record = parse_record("llumnix:discovery:pod", value, LLUMNIX)
    assert record.timestamp_ms == 1_000
    assert [one.id for one in record.instances] == ["pod_dp0", "pod_dp1"]
    assert {one.kv_address for one in record.instances} == {"10.0.0.7:20000"}


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ((), ("--engine is needed",)),
        (("--engine", ","), ("--engine: name at least one",)),
        (("--engine", "h:99999"), ("--engine:", "port '99999'")),
        (("--engine", "h:1,h:1"), ("listed twice",)),
        (("--engine", "h:1,h:2", "--dp-ranks", "2"), ("names an address twice",)),
        (("--engine", "h:65535", "--dp-ranks", "2"), ("goes past port 65535",)),
        (("--engine", "h:1", "--dp-size", "1", "--dp-start-rank", "1"), ("--dp-size 1 is too small",)),
        (("--engine", "h:1", "--heartbeat-interval", "30"), ("--heartbeat-interval 30 is over a third",)),
        (("--engine", "h:1", "--labels", "zone"), ("--labels:", "is not name=value")),
        (("--engine", "h:1", "--advertise-host", "a b"), ("--advertise-host:",)),
        (("--engine", "h:1", "--engine-api-key", "a\nb"), ("--engine-api-key: a key holds printable",)),
        (("--engine", "h:1", "--name", "a\nb"), ("cannot be printed",)),
        (("--engine", "h:1", "--store", "nats", "--discovery-record-format", "llumnix"), ("penstock only",)),
        (("--engine", "h:1,h:2", "--discovery-record-format", "llumnix"), ("dp rank",)),
        (
            ("--weight", "0", "--store", "mysql", "--bogus", "1"),
            ("--engine is needed", "--weight:", "--store:", "--bogus: unknown flag"),
        ),
    ],
)  # fmt: skip
def test_every_fault_is_told_at_once(argv: tuple[str, ...], parts: tuple[str, ...]) -> None:
    text = faults(*argv)
    for part in parts:
        assert part in text
