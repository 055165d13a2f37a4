"""Settings of discovery: which source runs, and what stops the start."""

import pytest

from penstock.common.settings import SettingsError, load
from penstock.discovery.settings import DiscoverySettings


def read(*argv: str) -> DiscoverySettings:
    return load(DiscoverySettings, argv, prog="penstock discovery", environ={})


@pytest.mark.parametrize("argv", [(), ("--llm-backend-discovery=endpoints",)])
def test_a_list_of_endpoints_alone_says_where_instances_are_found(argv: tuple[str, ...]) -> None:
    settings = read("--llm-backend-endpoints", "a:1", *argv)
    assert (settings.sources, settings.admin_port) == (("endpoints",), 8083)


def test_redis_is_the_default_and_several_sources_keep_their_order() -> None:
    assert read().sources == ("redis",)
    argv = ("--llm-backend-discovery", "etcd, Endpoints", "--llm-backend-endpoints", "a:1")
    assert read(*argv).sources == ("etcd", "endpoints")


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (("--llm-backend-discovery", "consul"), "'consul' is none of redis, etcd, endpoints"),
        (("--llm-backend-discovery", "redis,redis"), "redis is named twice"),
        (("--llm-backend-discovery", ","), "name at least one of redis"),
        (
            ("--llm-backend-discovery", "redis", "--llm-backend-endpoints", "a:1"),
            "--llm-backend-discovery redis does not name endpoints",
        ),
        (("--discovery-allow-cidr", "10.0.0.1/8"), "'10.0.0.1/8' is not a network such as 10.0.0.0/8"),
        (("--llm-backend-endpoints", "169.254.169.254:80"), "is a link-local or metadata address"),
        (
            ("--llm-backend-endpoints", "10.1.1.1:1", "--discovery-allow-cidr", "10.2.0.0/16"),
            "10.1.1.1 is in no network of --discovery-allow-cidr",
        ),
        (("--llm-backend-discovery", "endpoints"), "endpoints needs --llm-backend-endpoints"),
        (("--llm-backend-endpoints", " , "), "endpoints needs --llm-backend-endpoints"),
        (("--llm-backend-endpoints", "a:1", "--probe-fall", "0"), "--probe-fall"),
        (("--llm-backend-endpoints", "a:1", "--probe-interval", "nan"), "--probe-interval"),
        (("--llm-backend-endpoints", "a:1", "--probe-timeout", "inf"), "--probe-timeout"),
    ],
)
def test_a_fault_stops_the_start(argv: tuple[str, ...], fault: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(*argv)
    assert fault in str(caught.value)


def test_every_faulty_endpoint_is_named_beside_other_faults() -> None:
    with pytest.raises(SettingsError) as caught:
        read("--llm-backend-endpoints", "a,b:0", "--probe-rise", "0")
    text = str(caught.value)
    assert "'a': the port is missing" in text
    assert "'b:0': port '0'" in text
    assert "--probe-rise" in text


def test_a_key_that_cannot_be_a_header_is_refused_and_not_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        read("--llm-backend-endpoints", "a:1", "--engine-api-key", "k3y\r\nx: y")
    assert "--engine-api-key" in str(caught.value)
    assert "k3y" not in str(caught.value)
