"""Machine code is used while it is that of the sources and nothing of it runs as Python already."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from penstock.common.compiling import compile_package
from penstock.common.machine_code import FOLDER, MANIFEST, Finder, digest_of, folder_of, source_of, use

# Of a package that other tests do not import.
NAME, LIBRARY = "penstock.sample.one", "sample__mypyc"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the machine code of a package of one module is."""
    package = tmp_path / "penstock" / "sample"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "one.py").write_text("x = 1")
    namespace = importlib.import_module("penstock")
    monkeypatch.setattr(namespace, "__path__", [*namespace.__path__, str(tmp_path / "penstock")])
    folder = package / FOLDER
    folder.mkdir()
    for name in (NAME, LIBRARY):
        (folder / f"{name}{EXTENSION_SUFFIXES[0]}").touch()
    (folder / MANIFEST).write_text(json.dumps({"library": LIBRARY, "sources": {NAME: digest_of(NAME)}}))
    before = list(sys.meta_path)
    yield folder
    sys.meta_path[:] = before
    for name in (NAME, "penstock.sample"):
        sys.modules.pop(name, None)


def tried(folder: Path) -> str:
    """Why it is not used."""
    count = len(sys.meta_path)
    why = use(folder)
    assert len(sys.meta_path) - count == (not why)
    return why


def test_what_was_compiled_is_found_in_the_place_of_its_source(folder: Path) -> None:
    assert folder_of("penstock.sample") == folder
    assert tried(folder) == ""
    finder = sys.meta_path[0]
    assert isinstance(finder, Finder)
    for name in (NAME, LIBRARY):
        spec = finder.find_spec(name, None)
        assert spec is not None
        assert spec.origin == str(folder / f"{name}{EXTENSION_SUFFIXES[0]}")
    assert finder.find_spec("penstock.sample.other", None) is None


def test_a_source_that_was_edited_runs_as_it_stands(folder: Path) -> None:
    source_of(NAME).write_text("x = 2")
    assert NAME in tried(folder)


def test_a_source_that_is_gone_is_not_brought_back(folder: Path) -> None:
    source_of(NAME).unlink()
    assert tried(folder) == "it has not been compiled"


def test_another_pythons_machine_code_is_left_alone(folder: Path) -> None:
    (folder / f"{LIBRARY}{EXTENSION_SUFFIXES[0]}").unlink()
    assert "another Python" in tried(folder)


def test_what_runs_as_python_already_stays_python(folder: Path) -> None:
    importlib.import_module(NAME)
    assert tried(folder) == f"{NAME} runs as Python already"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "7", '{"sources": {"penstock": "x"}, "library": "x"}', "\xff"]
)
def test_a_manifest_that_makes_no_sense_is_as_none(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    assert tried(folder)


def test_without_a_manifest_the_sources_run(tmp_path: Path) -> None:
    assert tried(tmp_path) == "it has not been compiled"


def test_what_is_there_of_these_sources_is_not_compiled_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    assert compile_package("penstock.sample", (NAME,), ()) == 0
    assert compile_package("penstock.sample", (NAME, "penstock.sample.two"), ()) == 1
    source_of(NAME).write_text("x = 2")
    assert compile_package("penstock.sample", (NAME,), ()) == 1
    assert capsys.readouterr().err.count("no C compiler") == 2


RUN = """
import sys
from pathlib import Path
from penstock.common.compiling import compile_package
from penstock.common.machine_code import use
print(use(Path(sys.argv[1])))
from penstock.common import cells
print(cells.__file__)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.timeout(300)
def test_what_the_compiler_makes_is_what_runs(tmp_path: Path) -> None:
    # One small module, in 7 s of CPU: all of them take a minute, `make compiled`.
    folder = tmp_path / FOLDER
    assert compile_package("penstock.common", (), (str(folder), "penstock.common.cells")) == 0
    done = subprocess.run(
        [sys.executable, "-c", RUN, folder], capture_output=True, text=True, timeout=60, check=True
    )
    assert Path(done.stdout.strip()).parent == folder
