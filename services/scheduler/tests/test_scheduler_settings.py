"""Settings of the scheduler: what stops the start, and what each flag reaches."""

from __future__ import annotations

import pytest

from penstock.common.settings import SettingsError, load
from penstock.scheduler.policies.table import STRATEGIES
from penstock.scheduler.process import main
from penstock.scheduler.settings import SchedulerSettings


def read(*argv: str) -> SchedulerSettings:
    return load(SchedulerSettings, argv, prog="scheduler", environ={})


def test_the_defaults_are_those_of_the_guide() -> None:
    settings = read()
    assert (settings.admin_port, settings.default_routing_strategy) == (8082, "cache-aware")
    assert settings.prefix_index_blocks == 1_000_000
    assert (settings.thresholds.imbalance_requests, settings.thresholds.imbalance_ratio) == (16.0, 0.25)


@pytest.mark.parametrize("policy", STRATEGIES)
def test_every_policy_may_be_the_default(policy: str) -> None:
    assert read("--default-routing-strategy", policy).default_routing_strategy == policy


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (
            ("--default-routing-strategy", "fastest"),
            "unknown routing strategy 'fastest'; one of: cache-aware",
        ),
        (("--prefix-index-blocks", "10"), "--prefix-index-blocks"),
        (("--imbalance-requests", "0"), "--imbalance-requests"),
        (("--imbalance-ratio", "nan"), "--imbalance-ratio"),
        (("--scheduler-id", "x" * 65), "--scheduler-id"),
    ],
)
def test_a_bad_setting_stops_the_start(argv: tuple[str, ...], fault: str) -> None:
    with pytest.raises(SettingsError, match=fault):
        read(*argv)


def test_the_service_leaves_with_the_code_of_bad_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--default-routing-strategy", "fastest", "--no-such-flag"])
    assert left.value.code == 2
    assert "fastest" in capsys.readouterr().err
