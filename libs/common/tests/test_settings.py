"""Settings come from flags, environment and file; every fault is named at once."""

from pathlib import Path

import pytest
from pydantic import Field, SecretStr

from penstock.common.settings import ServiceSettings, SettingsError, load, load_or_exit, unknown_variables


class Sample(ServiceSettings):
    """A service of the tests."""

    workers: int = Field(1, ge=1, le=64, description="processes")
    connect_timeout: float = Field(6.0, gt=0, description="seconds")
    expose_headers: bool = Field(True, description="show them")
    api_key: SecretStr = Field(SecretStr(""), description="a secret")


def read(*argv: str, environ: dict[str, str] | None = None) -> Sample:
    return load(Sample, argv, prog="sample", environ=environ or {})


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("workers: 2\nconnect-timeout: 2\nadmin-port: 7\n")
    settings = read(
        "--config",
        str(file),
        "--workers",
        "4",
        environ={"PENSTOCK_WORKERS": "3", "PENSTOCK_CONNECT_TIMEOUT": "3"},
    )
    assert (settings.workers, settings.connect_timeout, settings.admin_port) == (4, 3.0, 7)


@pytest.mark.parametrize(
    ("argv", "value"),
    [((), True), (("--expose-headers=false",), False), (("--expose-headers",), True)],
)
def test_a_boolean_flag_takes_a_value_or_stands_alone(argv: tuple[str, ...], value: bool) -> None:
    assert read(*argv).expose_headers is value


def test_all_faults_are_reported_together_with_their_source(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("wrokers: 2\nadmin-port: 70000\n")
    with pytest.raises(SettingsError) as caught:
        read(
            "--config",
            str(file),
            "--workers",
            "0",
            "--no-such-flag",
            "x",
            environ={"PENSTOCK_LOG_LEVEL": "loud"},
        )
    text = "\n".join(caught.value.faults)
    assert len(caught.value.faults) == 5
    for part in (
        "--no-such-flag: unknown flag",
        "wrokers: unknown key",
        "--workers: Input should be greater than or equal to 1, got '0'",
        "admin_port",
        "PENSTOCK_LOG_LEVEL",
    ):
        assert part in text


def test_contradictory_settings_stop_the_start() -> None:
    with pytest.raises(SettingsError, match="--nats-tls-cert and --nats-tls-key go together"):
        read("--nats-tls-cert", "/tmp/c.pem")


def test_contradictions_are_told_beside_wrong_values() -> None:
    with pytest.raises(SettingsError) as caught:
        read("--workers", "0", "--nats-tls-key", "/tmp/k.pem")
    assert len(caught.value.faults) == 2


def test_a_wrong_secret_is_never_repeated() -> None:
    with pytest.raises(SettingsError) as caught:
        load(Sample, ["--nats-password", "hunter2"], prog="sample", environ={})
    assert "hunter2" not in str(caught.value)


def test_bad_settings_leave_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_or_exit(Sample, ["--workers", "none"], prog="sample")
    assert caught.value.code == 2
    assert "--workers" in capsys.readouterr().err


def test_variables_nobody_reads_are_listed() -> None:
    environ = {"PENSTOCK_PORT_8080_TCP": "tcp://", "PENSTOCK_WORKERS": "1", "HOME": "/"}
    assert unknown_variables([Sample], environ) == ["PENSTOCK_PORT_8080_TCP"]


def test_a_field_with_two_faults_counts_as_two() -> None:
    assert SettingsError(["--a: one\n--a: two", "--b: three"]).faults == (
        "--a: one",
        "--a: two",
        "--b: three",
    )
