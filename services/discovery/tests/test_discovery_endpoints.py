"""The endpoint list: what is understood, and that every fault is named."""

import pytest

from penstock.common.model import Endpoint, Role
from penstock.discovery.endpoints import parse_endpoints


@pytest.mark.parametrize(
    ("text", "instance_id", "endpoint", "role"),
    [
        ("127.0.0.1:8000", "127.0.0.1:8000", Endpoint("127.0.0.1", 8000), Role.NEUTRAL),
        (" engine-a:80 ", "engine-a:80", Endpoint("engine-a", 80), Role.NEUTRAL),
        ("Engine-A.Example.:80", "engine-a.example:80", Endpoint("engine-a.example", 80), Role.NEUTRAL),
        ("http://engine:9/", "engine:9", Endpoint("engine", 9), Role.NEUTRAL),
        ("prefill@engine:9", "engine:9", Endpoint("engine", 9), Role.PREFILL),
        ("Decode@http://engine:9", "engine:9", Endpoint("engine", 9), Role.DECODE),
        ("neutral@[::1]:65535", "[::1]:65535", Endpoint("::1", 65535), Role.NEUTRAL),
        ("http://[0:0::1]:1", "[::1]:1", Endpoint("::1", 1), Role.NEUTRAL),
        ("prefill@https://Engine:9", "engine:9", Endpoint("engine", 9, "https"), Role.PREFILL),
        ("pod_1.svc:8000", "pod_1.svc:8000", Endpoint("pod_1.svc", 8000), Role.NEUTRAL),
    ],
)
def test_an_entry_names_an_endpoint_and_a_role(
    text: str, instance_id: str, endpoint: Endpoint, role: Role
) -> None:
    (instance,) = parse_endpoints(text)
    assert (instance.id, instance.endpoint, instance.role) == (instance_id, endpoint, role)


def test_entries_keep_their_order_and_empty_ones_are_skipped() -> None:
    assert [i.id for i in parse_endpoints("b:2,,a:1, ,c:3,")] == ["b:2", "a:1", "c:3"]


def test_an_empty_list_is_empty() -> None:
    assert parse_endpoints("") == ()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("engine", "the port is missing"),
        ("engine:", "the port is missing"),
        ("[::1]", "the port is missing"),
        (":8000", "the host is missing"),
        ("engine:0", "port '0' is not a number from 1 to 65535"),
        ("engine:65536", "port '65536'"),
        ("engine:99999999999999999999", "port '99999999999999999999'"),
        ("engine:8o", "port '8o'"),
        ("engine:-1", "port '-1'"),
        ("engine:٨", "port '٨'"),
        ("boss@engine:1", "role 'boss' is none of neutral, prefill, decode"),
        ("@engine:1", "role ''"),
        ("ftp://engine:1", "scheme 'ftp' is neither http nor https"),
        ("http://engine:1/v1", "a path is not part of an endpoint"),
        ("::1:8000", "an IPv6 address goes in brackets"),
        ("[fe80::1%eth0]:1", "an IPv6 zone cannot"),
        ("[::g]:1", "'::g' is not an IPv6 address"),
        ("10.0.0.300:1", "'10.0.0.300' is not an IPv4 address"),
        ("10.1:1", "'10.1' is not an IPv4 address"),
        ("bad host:1", "'bad host' is not a host name"),
        ("-engine:1", "'-engine' is not a host name"),
        ("a..b:1", "'a..b' is not a host name"),
        ("x" * 64 + ":1", "is not a host name"),
        (".".join(["abc"] * 80) + ":1", "is not a host name"),
    ],
)
def test_a_faulty_entry_is_named_with_its_fault(text: str, fault: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_endpoints(text)
    assert repr(text) in str(caught.value)
    assert fault in str(caught.value)


def test_all_faulty_entries_are_reported_together() -> None:
    with pytest.raises(ValueError) as caught:
        parse_endpoints("a:1,b,boss@c:1,decode@a:1,HTTP://A:1,ok:2")
    assert str(caught.value).split("; ") == [
        "'b': the port is missing",
        "'boss@c:1': role 'boss' is none of neutral, prefill, decode",
        "'decode@a:1': a:1 is listed twice",
        "'HTTP://A:1': a:1 is listed twice",
    ]
