"""The data path as machine code, where it has been compiled: `make compile`, decision 0032.

`python -m penstock.ingress.machine_code MODULE ...` runs another module with it. What was compiled from other
sources than those that stand here, or for another Python, is not used.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    # Not before they are looked for in the right place.
    from penstock.common.telemetry import Metrics

PACKAGE = Path(__file__).parent
FOLDER, MANIFEST = PACKAGE / "compiled", "manifest.json"
# Module -> sha256 of the source that it was compiled from.
Sources = Mapping[str, str]


class Finder(MetaPathFinder):
    """Finds compiled modules, and the library that they share, in one folder."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._files = {name: folder / f"{name}{EXTENSION_SUFFIXES[0]}" for name in names}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See importlib; a file is named as its module, dots and all."""
        file = self._files.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


def use(folder: Path = FOLDER, package: Path = PACKAGE) -> str:
    """Have modules that are imported from here on come as machine code; why they do not, "" if they do."""
    fault = missing(folder, package)
    if not fault:
        sys.meta_path.insert(0, Finder(folder, _names(folder)))
    return fault


def _names(folder: Path) -> list[str]:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    return [*manifest["sources"], manifest["library"]]


def missing(folder: Path = FOLDER, package: Path = PACKAGE) -> str:
    """Why workers that start from here on do not run machine code; "" if they do."""
    try:
        names = _names(folder)
        sources: Sources = json.loads((folder / MANIFEST).read_bytes())["sources"]
        changed = [name for name, digest in sources.items() if digest != digest_of(package, name)]
    except FileNotFoundError:
        return "it has not been compiled"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        return f"{folder / MANIFEST} cannot be read: {exc}"
    if changed:
        return f"it was compiled from other sources than these ({changed[0]}): compile it again"
    if not all((folder / f"{name}{EXTENSION_SUFFIXES[0]}").is_file() for name in names):
        return "it was compiled for another Python: compile it again"
    return ""


def digest_of(package: Path, name: str) -> str:
    """sha256 of the source of a module."""
    return hashlib.sha256(source_of(package, name).read_bytes()).hexdigest()


def source_of(package: Path, name: str) -> Path:
    """The file of a module of penstock.ingress, which is `package`, or of another package of ours."""
    _, of, *parts = name.split(".")
    if of != "ingress":
        found = find_spec(f"penstock.{of}")
        package = Path((found.submodule_search_locations or ("",))[0]) if found is not None else Path()
    return package.joinpath(*parts).with_suffix(".py")


def compiled() -> bool:
    """Whether this process runs machine code."""
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def main() -> int:
    """Run the `main` of the module that the first argument names, with the others."""
    use()
    del sys.argv[0]
    code: int = importlib.import_module(sys.argv[0]).main()
    return code


if __name__ == "__main__":
    # By its own name, so that there is one of it.
    raise SystemExit(importlib.import_module("penstock.ingress.machine_code").main())


def expose(metrics: Metrics) -> None:
    """Its gauge."""
    metrics.gauge(
        "penstock_ingress_machine_code", "Workers whose data path is compiled", lambda: float(compiled())
    )
