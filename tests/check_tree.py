"""Rules of the tree that no linter knows; run by `make lint` from the root. Exit code 1 with every fault."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# Written in two parts, so that this file does not hold them.
INDEX_ADDRESSES = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("files", "pythonhosted", "org"),
        ("deb", "debian", "org"),
        ("registry", "npmjs", "org"),
    )
)
ROOT_SUBJECT = "penstock" + ".v1"
SUBJECTS_FILE = Path("libs/common/src/penstock/common/subjects.py")


def faults(root: Path, files: Sequence[Path]) -> Iterator[str]:
    """What is wrong with `files`, paths relative to `root`."""
    for path in files:
        if path.name == "__init__.py" and path.parent.parts[-2:] == ("src", "penstock"):
            yield f"{path}: remove it; penstock is a namespace package, this file hides its siblings"
        try:
            text = (root / path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            # Binary, a link into nowhere, or deleted and not yet committed so.
            continue
        if _is_source(path) and path != SUBJECTS_FILE and ROOT_SUBJECT in text:
            yield f"{path}: {ROOT_SUBJECT} is named in {SUBJECTS_FILE} only; take the subject from there"
        for address in INDEX_ADDRESSES:
            if address in text:
                yield f"{path}: names the package index {address}; whoever builds chooses the index"


def _is_source(path: Path) -> bool:
    return path.suffix == ".py" and path.parts[0] in ("libs", "services") and "tests" not in path.parts


def _committed(root: Path) -> list[Path]:
    """What is, or would be, in git; without git (a source archive), everything outside hidden folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
        return sorted(path for path in paths if not any(part.startswith(".") for part in path.parts))
    return sorted({Path(name.decode()) for name in listing.split(b"\0") if name})


def main() -> int:
    """Check the tree around this file."""
    root = Path(__file__).resolve().parent.parent
    found = list(faults(root, _committed(root)))
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
