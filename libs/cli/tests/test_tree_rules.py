"""tests/check_tree.py finds what it is there for, and nothing in a tree that keeps the rules."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "tests" / "check_tree.py"
ADDRESS = "pypi" + ".org"
SUBJECT = "penstock" + ".v1"


def check(tree: Path, **files: str) -> tuple[int, str]:
    """Run the script on a tree of these files; `a__b` stands for a/b."""
    (tree / "tests").mkdir()
    shutil.copy(SCRIPT, tree / "tests")
    for name, text in files.items():
        path = tree / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".py").write_text(text)
    done = subprocess.run(
        [sys.executable, str(tree / "tests" / "check_tree.py")], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("libs__sim__src__penstock__x__y", f'subject = "{SUBJECT}.z"', "is named in"),
        ("deploy__script", f"--index-url https://{ADDRESS}/simple", f"names the package index {ADDRESS}"),
    ],
)
def test_a_broken_rule_names_the_file(tmp_path: Path, name: str, text: str, fault: str) -> None:
    code, errors = check(tmp_path, **{name: text})
    assert code == 1
    assert errors.startswith(name.replace("__", "/") + ".py: ")
    assert fault in errors


def test_a_package_file_in_the_namespace_is_found(tmp_path: Path) -> None:
    stray = tmp_path / "services" / "mirror" / "src" / "penstock" / "__init__.py"
    stray.parent.mkdir(parents=True)
    stray.write_text("")
    code, errors = check(tmp_path)
    assert code == 1
    assert "services/mirror/src/penstock/__init__.py: remove it" in errors


def test_a_tree_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    files = {
        "libs__common__src__penstock__common__subjects": f'ROOT = "{SUBJECT}"',
        "libs__common__tests__test_subjects": f'assert ROOT == "{SUBJECT}"',
        "services__mirror__src__penstock__mirror__service": '"""Nothing."""',
    }
    assert check(tmp_path, **files) == (0, "")
