"""The bench from its command line: real processes, nothing left behind, an exit code to rely on."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest

ENVIRON = {key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")}


def bench(*flags: str, **more: str) -> "subprocess.CompletedProcess[str]":
    words = [sys.executable, "-m", "penstock.cli.bench", *flags]
    return subprocess.run(
        words, capture_output=True, text=True, timeout=120, check=False, env=ENVIRON | {"PEERS": "0"} | more
    )


def test_a_run_measures_prints_writes_and_cleans_up(tmp_path: Path) -> None:
    file, temporary = tmp_path / "figures.json", tmp_path / "temporary"
    temporary.mkdir()
    done = bench(
        *("--ways=direct", "--measures=chat-1k,fast", "--seconds=0.1", "--rounds=2", "--seed=5"),
        f"--json={file}",
        TMPDIR=str(temporary),
    )
    assert done.returncode == 0, done.stderr
    assert "1 KB chats, 64 connections" in done.stdout
    assert "--seed 5" in done.stdout
    assert "0 wrong or missing answers" in done.stdout
    figures = msgspec.json.decode(file.read_bytes())["figures"]
    assert [len(figures[name]["direct"]["rate"]) for name in ("chat-1k", "fast")] == [2, 2]
    assert list(temporary.iterdir()) == []
    left = [p for p in psutil.process_iter(["environ"]) if str(temporary) in str(p.info["environ"])]
    assert left == []


@pytest.mark.parametrize("flags", [["--rounds=0"], ["--ways=nothing"], ["--measures=nothing"], ["--unknown"]])
def test_bad_settings_end_it_before_anything_starts(flags: list[str]) -> None:
    done = bench(*flags)
    assert done.returncode == 2
    assert "bad settings" in done.stderr
