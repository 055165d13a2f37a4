"""The ingress's flags: names, defaults, bounds."""

import pytest

from penstock.common.settings import SettingsError, describe, load, reveal
from penstock.ingress.settings import IngressSettings


def read(*argv: str, **environ: str) -> IngressSettings:
    variables = {f"PENSTOCK_{name}": value for name, value in environ.items()}
    return load(IngressSettings, argv, prog="penstock ingress", environ=variables)


@pytest.mark.parametrize(
    ("flag", "default"),
    [
        ("--port", "8080"),
        ("--admin-port", "8081"),
        ("--admin-host", "127.0.0.1"),
        ("--workers", "1"),
        ("--request-timeout", "120.0"),
        ("--stream-idle-timeout", "300.0"),
        ("--connect-timeout", "6.0"),
        ("--schedule-timeout", "0.05"),
        ("--retry-max-count", "0"),
        ("--connection-limit", "1024"),
        ("--body-timeout", "60.0"),
        ("--engine-tls-ca", ""),
        ("--drain-timeout", "30.0"),
        ("--block-bytes", "256"),
        ("--expose-routing-headers", "true"),
    ],
)
def test_flags_have_the_defaults_of_the_design(flag: str, default: str) -> None:
    assert {row[0]: row[2] for row in describe(IngressSettings)}[flag] == default


def test_every_setting_is_described_and_has_a_variable() -> None:
    rows = list(describe(IngressSettings))
    assert len(rows) == len(IngressSettings.model_fields)
    for flag, variable, _, description in rows:
        assert variable == "PENSTOCK_" + flag.removeprefix("--").replace("-", "_").upper()
        assert description


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--port", "65536"),
        ("--port", "-1"),
        ("--workers", "0"),
        ("--request-timeout", "0"),
        ("--request-timeout", "nan"),
        ("--stream-idle-timeout", "-1"),
        ("--connect-timeout", "inf"),
        ("--schedule-timeout", "60"),
        ("--retry-max-count", "17"),
        ("--max-header-bytes", "10"),
        ("--buffer-limit", "4MB"),
        ("--backend-max-connections", "0"),
        ("--connection-limit", "0"),
        ("--body-timeout", "0"),
        ("--engine-tls-ca", "/no/such/file"),
        ("--engine-tls-ca", __file__),
        ("--block-bytes", "8"),
        ("--ingress-id", "x" * 65),
        ("--expose-routing-headers", "maybe"),
    ],
)
def test_a_value_out_of_bounds_is_a_fault_that_names_the_flag(flag: str, value: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read(f"{flag}={value}")
    (fault,) = caught.value.faults
    assert fault.startswith(f"{flag}: ")


def test_the_secret_of_the_block_hashes_is_not_shown_but_handed_to_workers() -> None:
    settings = read(BLOCK_HASH_SECRET="s3cret", RETRY_MAX_COUNT="2")
    assert settings.retry_max_count == 2
    assert "s3cret" not in repr(settings)
    assert IngressSettings.model_validate(reveal(settings)) == settings
