"""Machine code is used while it is that of the sources, and Python otherwise."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from penstock.ingress.machine_code import FOLDER, MANIFEST, Finder, digest_of, use

NAME, LIBRARY = "penstock.ingress.sample", "sample__mypyc"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of one module, which has been compiled."""
    (tmp_path / "sample.py").write_text("x = 1")
    folder = tmp_path / FOLDER.name
    folder.mkdir()
    for name in (NAME, LIBRARY):
        (folder / f"{name}{EXTENSION_SUFFIXES[0]}").touch()
    manifest = {"library": LIBRARY, "sources": {NAME: digest_of(tmp_path, NAME)}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return tmp_path


@pytest.fixture(autouse=True)
def finders() -> Iterator[None]:
    """What finds modules is as before."""
    before = list(sys.meta_path)
    yield
    sys.meta_path[:] = before


def tried(package: Path) -> str:
    """Why it is not used."""
    count = len(sys.meta_path)
    why = use(package / FOLDER.name, package)
    assert len(sys.meta_path) - count == (not why)
    return why


def test_what_was_compiled_is_found_in_the_place_of_its_source(package: Path) -> None:
    assert tried(package) == ""
    finder = sys.meta_path[0]
    assert isinstance(finder, Finder)
    for name in (NAME, LIBRARY):
        spec = finder.find_spec(name, None)
        assert spec is not None
        assert spec.origin == str(package / FOLDER.name / f"{name}{EXTENSION_SUFFIXES[0]}")
    assert finder.find_spec("penstock.ingress.other", None) is None


def test_a_source_that_was_edited_runs_as_it_stands(package: Path) -> None:
    (package / "sample.py").write_text("x = 2")
    assert NAME in tried(package)


def test_a_source_that_is_gone_is_not_brought_back(package: Path) -> None:
    (package / "sample.py").unlink()
    assert tried(package) == "it has not been compiled"


def test_another_pythons_machine_code_is_left_alone(package: Path) -> None:
    (package / FOLDER.name / f"{LIBRARY}{EXTENSION_SUFFIXES[0]}").unlink()
    assert "another Python" in tried(package)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "7", '{"sources": {"penstock": "x"}, "library": "x"}', "\xff"]
)
def test_a_manifest_that_makes_no_sense_is_as_none(package: Path, text: str) -> None:
    (package / FOLDER.name / MANIFEST).write_text(text, encoding="latin-1")
    assert tried(package)


def test_without_a_manifest_the_sources_run(tmp_path: Path) -> None:
    assert tried(tmp_path) == "it has not been compiled"


RUN = """
import sys
from pathlib import Path
from penstock.ingress import machine_code
print(machine_code.use(Path(sys.argv[1])))
from penstock.ingress import ids
print(ids.__file__, ids.Ids("x").next())
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.timeout(300)
def test_what_the_compiler_makes_is_what_runs(tmp_path: Path) -> None:
    # One small module, in 7 s of CPU: all of them take a minute, `make compiled`.
    folder = tmp_path / FOLDER.name
    compiler = Path(__file__).parents[1] / "compile.py"
    subprocess.run([sys.executable, compiler, folder, "penstock.ingress.ids"], check=True, timeout=240)
    done = subprocess.run(
        [sys.executable, "-c", RUN, folder], capture_output=True, text=True, timeout=60, check=True
    )
    file, first = done.stdout.split()
    assert Path(file).parent == folder
    assert first == "x1"
