"""The record formats: what is written is read, worked bytes, and RecordError alone for anything else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.common.model import Endpoint, Instance, InstanceState, Role
from penstock.common.protobuf import read_fields, write_field
from penstock.common.records import (
    FORMATS,
    LLUMNIX,
    MAX_INSTANCES,
    MAX_RECORD_BYTES,
    PENSTOCK,
    Record,
    RecordError,
    etcd_prefix,
    parse_record,
    redis_prefix,
    write_record,
)

NOW_MS = 1_700_000_000_000
KEY = "llumnix:discovery:pod-1"

# PodDiscoveryInfo{pod_name: "pod-1", timestamp_ms: 1700000000000, instances: [
#   {instance_type: "prefill", entrypoint_ip: "10.0.0.7", entrypoint_port: 8000, kv_transfer_ip: "10.0.0.8",
#    kv_transfer_port: 20000, dp_rank: 1, dp_size: 2, model: "m", version: 3}]}
WORKED = bytes.fromhex(
    "0a05706f642d31"  # 1: "pod-1"
    "1880d095ffbc31"  # 3: 1700000000000
    "222d"  # 4: 45 bytes
    "0a0770726566696c6c"  # 1: "prefill"
    "120831302e302e302e37"  # 2: "10.0.0.7"
    "18c03e"  # 3: 8000
    "220831302e302e302e38"  # 4: "10.0.0.8"
    "28a09c01"  # 5: 20000
    "3001"  # 6: 1
    "3802"  # 7: 2
    "42016d"  # 8: "m"
    "4803"  # 9: 3
)
MEANT = Instance(
    id="pod-1_dp1",
    endpoint=Endpoint("10.0.0.7", 8000),
    models=("m",),
    role=Role.PREFILL,
    dp_rank=1,
    dp_size=2,
    kv_address="10.0.0.8:20000",
    labels={"version": "3"},
)


def one(**fields: Any) -> Instance:
    made = Instance(id="a", endpoint=Endpoint("10.0.0.1", 8000))
    return msgspec.structs.replace(made, **fields)


def said(*instances: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"instances": instances, **fields}).encode()


def plain(**fields: Any) -> dict[str, Any]:
    return {"id": "a", "endpoint": {"host": "10.0.0.1", "port": 8000}, **fields}


def pod(*instances: bytes, name: str = "pod-1", timestamp_ms: int = NOW_MS, more: bytes = b"") -> bytes:
    head = write_field(1, name) + write_field(3, timestamp_ms)
    return head + b"".join(write_field(4, part) for part in instances) + more


def part(role: str = "neutral", port: int = 8000, more: bytes = b"") -> bytes:
    return write_field(1, role) + write_field(2, "10.0.0.7") + write_field(3, port) + more


def test_keys_are_where_each_system_has_them() -> None:
    assert redis_prefix(PENSTOCK) == b"penstock:discovery:"
    assert redis_prefix(LLUMNIX) == b"llumnix:discovery:"
    assert etcd_prefix(PENSTOCK) == b"penstock/discovery/"
    assert etcd_prefix(LLUMNIX) == b"llumnix/discovery/"


def test_worked_bytes_of_llumnix_are_read_and_written() -> None:
    assert parse_record(KEY, WORKED, LLUMNIX) == Record((MEANT,), NOW_MS)
    assert write_record((MEANT,), NOW_MS, LLUMNIX) == WORKED


def test_a_pod_of_several_ranks_gives_an_instance_for_each() -> None:
    value = pod(*(part(port=8000 + rank, more=write_field(6, rank)) for rank in range(4)))
    record = parse_record(KEY, value, LLUMNIX)
    assert [(i.id, i.endpoint.port) for i in record.instances] == [
        (f"pod-1_dp{rank}", 8000 + rank) for rank in range(4)
    ]


def test_fields_that_later_versions_of_llumnix_may_add_are_passed_over() -> None:
    later = write_field(15, "x") + write_field(16, 7) + bytes([17 << 3 & 0x7F | 5 | 0x80, 1]) + b"1234"
    assert parse_record(KEY, pod(part(more=later), more=later), LLUMNIX).instances[0].id == "pod-1_dp0"


def test_a_record_in_json_says_every_field() -> None:
    full = one(
        models=("m", "n"),
        lora_adapters=("l",),
        owner="vllm",
        role=Role.DECODE,
        engine="vllm",
        group="g",
        dp_rank=1,
        dp_size=2,
        kv_address="h:1",
        bootstrap_port=8998,
        labels={"zone": "z"},
        config="{}",
        weight=2.0,
        state=InstanceState.DRAINING,
    )
    value = write_record((full, one(id="b")), NOW_MS, PENSTOCK)
    assert parse_record("k", value, PENSTOCK) == Record((full, one(id="b")), NOW_MS)


def test_the_example_of_the_guide_is_a_record() -> None:
    guide = Path(__file__).parents[3] / "docs" / "guide" / "records.md"
    example = guide.read_text(encoding="utf-8").split("```json")[1].split("```")[0]
    record = parse_record("k", example.encode(), PENSTOCK)
    assert [i.id for i in record.instances] == ["engine-0"]


def test_what_is_so_by_default_is_left_out() -> None:
    value = write_record((one(),), 5, PENSTOCK)
    assert json.loads(value) == {
        "timestamp_ms": 5,
        "instances": [{"id": "a", "endpoint": {"host": "10.0.0.1", "port": 8000, "scheme": "http"}}],
    }


def test_what_discovery_finds_out_is_neither_written_nor_read() -> None:
    marked = one(source="redis", reason="probe", state=InstanceState.UNHEALTHY)
    assert write_record((marked,), 0, PENSTOCK) == write_record((one(),), 0, PENSTOCK)
    record = parse_record("k", said(plain(source="other", reason="r")), PENSTOCK)
    assert record.instances == (one(),)


def test_a_record_without_a_timestamp_and_with_unknown_fields_is_read() -> None:
    assert parse_record("k", said(plain(later=1), later=2), PENSTOCK) == Record((one(),), 0)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "truncated"),
        (b"\x00\xff{", "malformed"),
        (b"{}", "instances"),
        (said(plain(role="encode")), "encode"),
        (said(plain(state="unhealthy")), "unhealthy"),
        (said(plain(state="gone")), "gone"),
        (said(plain(id="")), "empty"),
        (said(plain(), plain()), "twice"),
        (said(plain(id="a\nb")), "printed"),
        (said(plain(models=["\u0000"])), "printed"),
        (said(plain(kv_address="h\r\n")), "printed"),
        (said(plain(endpoint={"host": "a b", "port": 1})), "host"),
        (said(plain(endpoint={"host": "a", "port": 0})), "port"),
        (said(plain(endpoint={"host": "a", "port": 1, "scheme": "ftp"})), "scheme"),
        (said(plain(weight=1e300)), "weight"),
        (said(plain(), timestamp_ms=-1), "timestamp_ms"),
        (said(*(plain(id=str(n)) for n in range(MAX_INSTANCES + 1))), "instances"),
        (b'{"later":' + b"[" * 10_000, "recursion"),
        (b" " * (MAX_RECORD_BYTES + 1), "bytes"),
    ],
)
def test_json_that_cannot_be_used_is_refused_with_the_reason(value: bytes, reason: str) -> None:
    with pytest.raises(RecordError) as refused:
        parse_record("k", value, PENSTOCK)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "pod_name"),
        (pod(part(), name="other"), "pod_name"),
        (pod(part(), timestamp_ms=0), "timestamp_ms"),
        (pod(part(), timestamp_ms=-5), "timestamp_ms"),
        (pod(part(), timestamp_ms=2**62), "timestamp_ms"),
        (pod(part(role="")), "instance_type"),
        (pod(part(role="encode")), "'encode' is none of neutral, prefill, decode"),
        (pod(part(port=0)), "port"),
        (pod(part(port=70_000)), "port"),
        (pod(part(port=2**32 + 8000)), "32 bits"),
        (pod(part(more=write_field(6, -1))), "dp_rank"),
        (pod(part(more=write_field(4, "10.0.0.8") + write_field(5, 70_000))), "port"),
        (pod(part(), part()), "twice"),
        (pod(*[part()] * (MAX_INSTANCES + 1)), "instances"),
        (pod(part(more=write_field(2, b"\xff"))), "decode"),
        (pod(part(more=write_field(2, 5))), "number stands where text"),
        (pod(part(more=write_field(3, "x"))), "text stands where a number"),
        (WORKED[:-1], "past the end"),
        (pod(part()) + b"\x0b", "wire type 3"),
        (pod(part()) + b"\x02\x00", "number 0"),
        (pod(part()) + b"\x80", "does not end"),
        (pod(part()) + b"\x28" + b"\xff" * 10, "does not end"),
        (pod(part()) + b"\x28" + b"\xff" * 9 + b"\x7f", "64 bits"),
    ],
)
def test_llumnix_bytes_that_cannot_be_used_are_refused_with_the_reason(value: bytes, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        parse_record(KEY, value, LLUMNIX)


def test_what_llumnix_cannot_say_is_refused_when_it_is_written() -> None:
    for instances in (
        (one(), one(id="b")),
        (one(endpoint=Endpoint("a", 1, "https")),),
    ):
        with pytest.raises(RecordError, match="Llumnix's format"):
            write_record(instances, NOW_MS, LLUMNIX)


def test_a_record_that_nobody_would_read_is_not_written() -> None:
    with pytest.raises(RecordError, match="bytes"):
        write_record((one(models=tuple(f"{n:0500}" for n in range(200))),), NOW_MS, PENSTOCK)


def test_the_name_of_the_key_becomes_the_name_of_the_pod() -> None:
    pair = (one(id="x-0"), one(id="x-1", dp_rank=1, dp_size=2))
    record = parse_record(KEY, write_record(pair, NOW_MS, LLUMNIX, name="pod-1"), LLUMNIX)
    assert [i.id for i in record.instances] == ["pod-1_dp0", "pod-1_dp1"]


texts = st.text(st.characters(exclude_categories=("C", "Z")), max_size=20)
ports = st.integers(1, 65535)
hosts = st.sampled_from(["10.0.0.1", "engine-0.fleet", "fd00::1"])
pods = st.builds(
    Instance,
    id=st.just("pod-1_dp0"),
    endpoint=st.builds(Endpoint, hosts, ports),
    models=st.lists(texts.filter(bool), max_size=1).map(tuple),
    role=st.sampled_from(Role),
    dp_size=st.integers(1, 2**31 - 1),
    kv_address=st.one_of(st.just(""), st.builds(Endpoint, hosts, ports).map(str)),
    labels=st.integers(0, 2**63 - 1).map(lambda version: {"version": str(version)} if version else {}),
)


@given(pods, st.integers(1, 2**53), st.sampled_from(FORMATS))
def test_what_is_written_is_read(instance: Instance, timestamp_ms: int, record_format: str) -> None:
    value = write_record((instance,), timestamp_ms, record_format)
    assert parse_record(KEY, value, record_format) == Record((instance,), timestamp_ms)


mutations = st.tuples(st.integers(0, len(WORKED) - 1), st.binary(max_size=3), st.integers(0, 3))


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """Noise, or a good record of one of the formats that was cut, overwritten and filled up at places."""
    value = draw(st.sampled_from([WORKED, said(plain(), timestamp_ms=5)]) | st.binary(max_size=200))
    for at, patch, cut in draw(st.lists(mutations, max_size=4)):
        value = value[:at] + patch + value[at + cut :]
    return value


@given(hostile(), st.sampled_from(FORMATS), st.text(max_size=10))
def test_nothing_but_a_record_error_comes_of_any_bytes(value: bytes, record_format: str, key: str) -> None:
    with contextlib.suppress(RecordError):
        assert all(instance.id for instance in parse_record(key, value, record_format).instances)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.sampled_from([*plain(**dict.fromkeys(Instance.__struct_fields__))]), json_values)
def test_any_value_of_any_field_is_read_or_refused(field: str, value: object) -> None:
    try:
        record = parse_record("k", said(plain(**{field: value})), PENSTOCK)
    except RecordError:
        return
    assert parse_record("k", write_record(record.instances, 0, PENSTOCK), PENSTOCK) == record


@given(st.lists(st.tuples(st.integers(1, 2**29 - 1), st.integers(-(2**63), 2**63 - 1) | st.binary())))
def test_fields_of_any_number_and_value_are_read_as_written(fields: list[tuple[int, int | bytes]]) -> None:
    fields = [(number, value) for number, value in fields if value]
    assert [*read_fields(b"".join(write_field(*field) for field in fields))] == fields
