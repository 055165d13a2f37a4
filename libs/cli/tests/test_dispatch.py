"""The `penstock` command finds its sub-commands, and imports no other."""

import subprocess
import sys
from importlib.metadata import version

import pytest

from penstock.cli.__main__ import COMMANDS, main


@pytest.mark.parametrize("flag", ["--help", "-h", "help"])
def test_help_lists_every_command(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([flag]) == 0
    text = capsys.readouterr().out
    assert all(f"penstock {name} " in text for name in COMMANDS)


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"penstock {version('penstock-cli')}\n"


@pytest.mark.parametrize("argv", [["upp"], ["--port", "1"], []])
def test_an_unknown_command_is_answered_with_the_list(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert all(f"penstock {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_of_its_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"usage: penstock {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_bad_flag_leaves_with_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--no-such-flag"])
    assert caught.value.code == 2
    assert "--no-such-flag: unknown flag" in capsys.readouterr().err


def test_the_dispatcher_alone_imports_no_command() -> None:
    code = "import sys, penstock.cli.__main__; print(*(m for m in sys.modules if m.startswith('penstock.')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == {"penstock.cli", "penstock.cli.__main__"}
