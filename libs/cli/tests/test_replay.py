"""Replays of an excerpt of a public trace, through the scheduler's own code."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from penstock.cli.__main__ import main
from penstock.cli.replay.references import REFERENCES
from penstock.cli.replay.settings import PROG, ReplaySettings
from penstock.cli.replay.setups import Setup, setups
from penstock.common.settings import SettingsError, load
from penstock.scheduler.policies.table import STRATEGIES

EXCERPT = Path(__file__).parent / "data" / "mooncake_excerpt.jsonl"
EVERYBODY = ",".join(
    [*STRATEGIES, "prefix-cache:6+least-request:1", "oracle", "oracle:prefix-cache", *REFERENCES]
)


def replay(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["replay", "--trace", str(EXCERPT), *flags]) == 0
    return capsys.readouterr().out


def runs(capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(replay(capsys, *flags, "--json"))["runs"]
    return found


def test_every_policy_oracle_and_reference_serves_every_request(capsys: pytest.CaptureFixture[str]) -> None:
    found = runs(capsys, "--policy", EVERYBODY, "--limit", "80", "--instances", "4")
    assert [run["policy"] for run in found] == EVERYBODY.split(",")
    assert {(run["requests"], run["refused"]) for run in found} == {(80, 0)}


def test_placement_by_prefix_beats_chance(capsys: pytest.CaptureFixture[str]) -> None:
    aware, chance, oracle = runs(capsys, "--policy", "cache-aware,random,oracle")
    assert aware["hit_ratio"] > 1.5 * chance["hit_ratio"]
    assert aware["ttft_mean_s"] < chance["ttft_mean_s"]
    assert aware["hit_ratio_to_oracle"] == pytest.approx(aware["hit_ratio"] / oracle["hit_ratio"])
    assert chance["hit_ratio_to_oracle"] is None


def test_on_a_mixed_fleet_the_default_sends_work_where_it_is_done_sooner(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--policy", "cache-aware,least-request", "--slow-ratio", "0.5", "--slow-speed", "0.3")
    aware, fewest = runs(capsys, *flags)
    even, _ = runs(capsys, *flags[:2])
    assert aware["ttft_mean_s"] < 0.8 * fewest["ttft_mean_s"]
    assert even["ttft_mean_s"] < aware["ttft_mean_s"]
    assert "50% of them at 0.3 x speed" in replay(capsys, *flags, "--limit", "2")


SEEDED = (
    *("--policy", "cache-aware,random,ref:aibrix-prefix-cache", "--limit", "100"),
    *("--replicas", "2", "--ingresses", "3", "--json"),
)


def test_another_seed_gives_another_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert replay(capsys, *SEEDED, "--seed", "1") != replay(capsys, *SEEDED)


def test_the_same_seed_gives_the_same_output_in_every_process(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "penstock.cli", "replay", "--trace", str(EXCERPT), *SEEDED]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == replay(capsys, *SEEDED)


def test_several_seeds_are_a_line_with_their_mean_and_range(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ("--policy", "cache-aware,oracle", "--limit", "30", "--ingresses", "3", "--replicas", "2")
    plot = tmp_path / "plot.svg"
    out = replay(capsys, *flags, "--seed", "1,2,3", "--plot", str(plot))
    lines = out.split("\n\n")[1].splitlines()[1:]
    assert "seeds 1,2,3" in out
    assert [line.split()[:2] for line in lines] == [
        ["cache-aware", "1"],
        ["cache-aware", "2"],
        ["oracle", "1"],
    ]
    assert plot.read_text().count(">oracle, 1 repl<") == 6
    found = runs(capsys, *flags, "--seed", "1,2,3")
    several = [run["ttft_mean_s"] for run in found if run["replicas"] == 2]
    assert len(several) == len(set(several)) == 3
    mean, low, high = sum(several) / 3, min(several), max(several)
    assert f"{mean:.2f} ({low:.2f}..{high:.2f})" in lines[1]
    alone = [run["hit_ratio_to_one_replica"] for run in found if run["replicas"] == 2]
    assert None not in alone


def test_replicas_are_compared_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--policy", "cache-aware", "--limit", "150", "--replicas", "4", "--event-delay-ms", "5")
    alone, four = runs(capsys, *flags, "--ingresses", "4")
    assert (alone["replicas"], alone["herd_factor"], alone["hit_ratio_to_one_replica"]) == (1, None, None)
    assert four["replicas"] == 4
    assert four["herd_factor"] > 0
    assert four["hit_ratio_to_one_replica"] == pytest.approx(four["hit_ratio"] / alone["hit_ratio"])


def test_replicas_that_hear_of_each_other_late_know_less(capsys: pytest.CaptureFixture[str]) -> None:
    found = runs(
        capsys, "--replicas", "4", "--event-delay-ms", "0,10000", "--policy", "prefix-cache", "--spread"
    )
    told = {(run["replicas"], run["event_delay_ms"]): run["expected_hit_ratio"] for run in found}
    assert told[4, 10_000] < told[4, 0]


def test_requests_that_no_engine_can_hold_are_refused_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    (run,) = runs(capsys, "--policy", "least-request", "--limit", "50", "--kv-blocks", "20")
    assert 0 < run["refused"] < 50
    assert run["requests"] + run["refused"] == 50


def test_the_table_shows_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    out = replay(capsys, "--policy", "cache-aware,oracle", "--limit", "40", "--instances", "2,4")
    title, *_ = out.splitlines()
    head, *lines = out.split("\n\n")[1].splitlines()
    assert title.startswith("mooncake_excerpt.jsonl: 40 requests")
    assert head.split()[:3] == ["policy", "inst", "delay"]
    assert "repl" not in head
    assert [line.split()[:2] for line in lines] == [
        [policy, instances] for instances in "24" for policy in ("cache-aware", "oracle")
    ]


def test_the_plot_is_a_picture_that_names_every_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plot = tmp_path / "plot.svg"
    replay(capsys, "--policy", "cache-aware,random", "--limit", "30", "--plot", str(plot))
    texts = [element.text for element in ElementTree.parse(plot).iter() if element.tag.endswith("}text")]
    assert texts.count("cache-aware") == texts.count("random") == 6


def test_the_plot_says_in_what_runs_differ(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    replay(capsys, "--policy", "random", "--limit", "20", "--replicas", "2", "--plot", str(plot))
    text = plot.read_text()
    assert text.count("random, 1 repl<") == text.count("random, 2 repl<") == 6


def test_a_plot_that_cannot_be_written_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = ["--trace", str(EXCERPT), "--policy", "random", "--limit", "5", "--plot", str(tmp_path)]
    assert main(["replay", *flags]) == 1
    assert "--plot" in capsys.readouterr().err


def test_a_policy_of_ones_own_that_fails_ends_the_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = tmp_path / "mine.py"
    module.write_text("POLICIES = {'mine': lambda request, candidates: 1 / 0}\n")
    flags = ["--trace", str(EXCERPT), "--policy", "mine", "--policy-module", str(module), "--limit", "5"]
    assert main(["replay", *flags]) == 1
    assert "mine" in capsys.readouterr().err


def faults(*flags: str) -> str:
    with pytest.raises(SettingsError) as error:
        load(ReplaySettings, flags, prog=PROG, environ={})
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ((), "--trace is missing"),
        (("--policy", "nonsense"), "unknown routing strategy 'nonsense'"),
        (("--policy", "oracle:nonsense"), "unknown routing strategy 'nonsense'"),
        (("--policy", ","), "--policy names 1 to 32 policies"),
        (("--instances", "0"), "--instances is a list of numbers from 1 to 256"),
        (("--instances", "8,x"), "--instances is a list of numbers"),
        (("--replicas", "1.5"), "--replicas is a list of numbers"),
        (("--seed", "-1"), "--seed is a list of numbers from 0"),
        (("--seed", "0.5"), "--seed is a list of numbers"),
        (("--event-delay-ms", "nan"), "--event-delay-ms is a list of numbers from 0"),
        (("--max-batch", "4096"), "--step-token-budget is at least --max-batch"),
    ],
)
def test_bad_settings_are_named(flags: tuple[str, ...], complaint: str) -> None:
    assert complaint in faults(*flags)


def test_a_bad_trace_ends_with_the_code_of_bad_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["replay", "--trace", str(tmp_path / "none.jsonl")])
    assert ending.value.code == 2
    assert "none.jsonl: No such file" in capsys.readouterr().err


def test_every_combination_is_planned_once_and_one_replica_always() -> None:
    flags = ("--trace", "t", "--policy", "random,oracle,random", "--instances", "8,4", "--replicas", "4")
    settings = load(ReplaySettings, (*flags, "--event-delay-ms", "1,5"), prog=PROG, environ={})
    random = [Setup("random", 4, replicas, delay) for replicas in (1, 4) for delay in (1.0, 5.0)]
    assert list(setups(settings))[:5] == [*random, Setup("oracle", 4)]
    assert len(list(setups(settings))) == 10
