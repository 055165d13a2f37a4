"""Settings of the etcd source: names, defaults, and what stops the start."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from penstock.common.settings import SettingsError, load
from penstock.discovery.etcd_settings import EtcdSettings


def read(*argv: str) -> EtcdSettings:
    return load(EtcdSettings, argv, prog="penstock discovery", environ={})


def test_the_flags_have_the_names_and_defaults_that_users_know() -> None:
    settings = read()
    assert settings.discovery_etcd_endpoints == "etcd:2379"
    assert settings.discovery_etcd_username == ""
    assert settings.discovery_etcd_password.get_secret_value() == ""
    assert settings.discovery_etcd_dial_timeout == 5.0
    assert settings.discovery_etcd_lease_ttl == 60
    assert settings.discovery_etcd_refresh_interval_sec == 3600


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("etcd:2379", ("http://etcd:2379",)),
        (" etcd-0 , etcd-1:9, ,etcd-0:2379", ("http://etcd-0:2379", "http://etcd-1:9")),
        ("https://a:1/,http://b", ("https://a:1", "http://b:2379")),
        ("[::1]:2379", ("http://[::1]:2379",)),
        ("10.0.0.1", ("http://10.0.0.1:2379",)),
    ],
)
def test_members_are_listed_with_scheme_and_port(text: str, members: tuple[str, ...]) -> None:
    assert read("--discovery-etcd-endpoints", text).etcd_members() == members


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (" , ", "names no member"),
        ("ftp://a", "'ftp://a' has a scheme other than"),
        ("a:0", "'a:0' has a port that is not"),
        ("a:70000", "'a:70000' has a port that is not"),
        ("a:x", "'a:x' has a port that is not"),
        ("::1", "'::1' has"),
        ("[::1", "'[::1' "),
        ("a/b", "'a/b' holds more than host and port"),
        ("a b:1", "'a b:1' has no valid host"),
        ("http://u:s3cret@a:1", "holds credentials"),
    ],
)
def test_a_faulty_member_stops_the_start_and_shows_no_password(text: str, fault: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read("--discovery-etcd-endpoints", text)
    assert fault in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (("--discovery-etcd-username", "u"), "go together"),
        (("--discovery-etcd-password", "s3cret"), "go together"),
        (("--discovery-etcd-tls-key", "k.pem"), "needs --discovery-etcd-tls-cert"),
        (("--discovery-etcd-tls-ca", "/nowhere/ca.pem"), "/nowhere/ca.pem: No such file"),
        (("--discovery-etcd-tls-cert", "/nowhere/c.pem"), "/nowhere/c.pem with"),
        (("--discovery-etcd-dial-timeout", "0"), "--discovery-etcd-dial-timeout"),
        (("--discovery-etcd-dial-timeout", "nan"), "--discovery-etcd-dial-timeout"),
        (("--discovery-etcd-lease-ttl", "0"), "--discovery-etcd-lease-ttl"),
        (("--discovery-etcd-refresh-interval-sec", "0"), "--discovery-etcd-refresh-interval-sec"),
    ],
)
def test_a_fault_stops_the_start(argv: tuple[str, ...], fault: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(*argv)
    assert fault in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_all_faults_are_told_together() -> None:
    with pytest.raises(SettingsError) as caught:
        read("--discovery-etcd-endpoints", "a:0,b:x", "--discovery-etcd-username", "u")
    for part in ("'a:0'", "'b:x'", "go together"):
        assert part in str(caught.value)


def test_with_tls_files_members_are_reached_by_https_only(tmp_path: Path) -> None:
    authority, ca = trustme.CA(), tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    files = ("--discovery-etcd-tls-ca", str(ca))
    assert read(*files, "--discovery-etcd-endpoints", "a").etcd_members() == ("https://a:2379",)
    with pytest.raises(SettingsError, match="'http://a' is plain http"):
        read(*files, "--discovery-etcd-endpoints", "http://a")


def test_files_that_are_not_certificates_stop_the_start(tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    for flag in ("--discovery-etcd-tls-ca", "--discovery-etcd-tls-cert"):
        with pytest.raises(SettingsError, match=flag):
            read(flag, str(text))
