"""Where Redis is, by host and port or by URL; what is wrong is told at the start, without secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from penstock.common.settings import SettingsError, load
from penstock.discovery.redis_settings import CLUSTER, SENTINEL, STANDALONE, RedisAddress, RedisSettings


def settings(*argv: str) -> RedisSettings:
    return load(RedisSettings, argv, prog="test", environ={})


def faults(*argv: str) -> str:
    with pytest.raises(SettingsError) as refused:
        settings(*argv)
    return str(refused.value)


def test_names_and_defaults_are_those_of_the_reference() -> None:
    made = settings()
    assert made.redis_address() == RedisAddress(STANDALONE, False, (("redis", 6379),))
    assert (made.discovery_redis_username, made.discovery_redis_password.get_secret_value()) == ("", "")
    assert (made.discovery_redis_socket_timeout, made.discovery_redis_retry_times) == (1.0, 1)
    assert (made.discovery_redis_status_ttl_ms, made.discovery_redis_refresh_interval_ms) == (60_000, 1000)
    assert made.discovery_record_format == "penstock"


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", RedisAddress(STANDALONE, False, (("h", 6379),))),
        ("rediss://h:1/3", RedisAddress(STANDALONE, True, (("h", 1),), db=3)),
        ("redis://[fd00::1]:7", RedisAddress(STANDALONE, False, (("fd00::1", 7),))),
        ("redis+sentinel://a,b:7/m", RedisAddress(SENTINEL, False, (("a", 26379), ("b", 7)), "m")),
        ("rediss+sentinel://a/m/2", RedisAddress(SENTINEL, True, (("a", 26379),), "m", 2)),
        ("redis+cluster://a:1,b,a:1", RedisAddress(CLUSTER, False, (("a", 1), ("b", 6379)))),
        ("rediss+cluster://a/", RedisAddress(CLUSTER, True, (("a", 6379),))),
    ],
)
def test_a_url_names_a_server_sentinels_or_a_cluster(url: str, address: RedisAddress) -> None:
    assert settings("--discovery-redis-url", url).redis_address() == address


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--discovery-redis-url", "http://h"), "scheme"),
        (("--discovery-redis-url", "redis+other://h"), "scheme"),
        (("--discovery-redis-url", "redis://"), "names 0 hosts"),
        (("--discovery-redis-url", "redis://a,b"), "names 2 hosts"),
        (("--discovery-redis-url", "redis://h:0"), "not a host with a port"),
        (("--discovery-redis-url", "redis://h:x"), "not a host with a port"),
        (("--discovery-redis-url", "redis://h h"), "not a host with a port"),
        (("--discovery-redis-url", "redis://h/x"), "database"),
        (("--discovery-redis-url", "redis://h/1/2"), "database"),
        (("--discovery-redis-url", "redis+cluster://h/1"), "database"),
        (("--discovery-redis-url", "redis+sentinel://h"), "no master"),
        (("--discovery-redis-url", "redis://h?x=1"), "more than"),
        (("--discovery-redis-url", "redis://h", "--discovery-redis-port", "1"), "exclude each other"),
        (("--discovery-redis-host", "a/b"), "--discovery-redis-host"),
        (("--discovery-redis-port", "0"), "--discovery-redis-port"),
        (("--discovery-redis-username", "u"), "needs --discovery-redis-password"),
        (("--discovery-redis-sentinel-password", "p"), "redis+sentinel://"),
        (("--discovery-redis-tls-ca", "/nowhere/ca.pem"), "/nowhere/ca.pem"),
        (("--discovery-redis-tls-cert", "/nowhere/c.pem"), "go together"),
        (("--discovery-record-format", "xml"), "--discovery-record-format"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(argv: tuple[str, ...], reason: str) -> None:
    assert reason in faults(*argv)


def test_files_of_tls_without_tls_are_a_fault(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    trustme.CA().cert_pem.write_to_path(ca)
    assert "rediss://" in faults("--discovery-redis-tls-ca", str(ca))
    settings("--discovery-redis-tls-ca", str(ca), "--discovery-redis-url", "rediss://h")


def test_a_url_with_credentials_is_refused_without_repeating_them() -> None:
    told = faults("--discovery-redis-url", "redis://user:hunter2@h", "--discovery-redis-password", "hunter3")
    assert "--discovery-redis-username" in told
    assert "hunter" not in told
    assert "hunter" not in repr(settings("--discovery-redis-password", "hunter3"))
