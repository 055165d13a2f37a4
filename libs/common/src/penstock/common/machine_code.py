"""A service's modules as machine code, where they have been compiled: `make compile`, decisions 0032, 0050.

`python -m penstock.common.machine_code PACKAGE MODULE ...` runs another module with that of a package. What
was compiled from other sources than those that stand here, or for another Python, is not used.
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

FOLDER, MANIFEST = "compiled", "manifest.json"
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


def missing(folder: Path, modules: Sequence[str] = ()) -> str:
    """Why what starts from here on does not run the machine code in a folder; "" if it does. `modules` are
    those that it has to be of, if there are any."""
    try:
        sources, library = _manifest(folder)
        changed = [name for name, digest in sources.items() if digest != digest_of(name)]
    except FileNotFoundError:
        return "it has not been compiled"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as exc:
        return f"{folder / MANIFEST} cannot be read: {exc}"
    if changed:
        return f"it was compiled from other sources than these ({changed[0]}): compile it again"
    if modules and set(modules) != set(sources):
        return "it was compiled of other modules: compile it again"
    if not all((folder / f"{name}{EXTENSION_SUFFIXES[0]}").is_file() for name in (*sources, library)):
        return "it was compiled for another Python: compile it again"
    return ""


def use(folder: Path) -> str:
    """Have modules that are imported from here on come as machine code; why they do not, "" if they do."""
    if why := missing(folder):
        return why
    sources, library = _manifest(folder)
    if known := [name for name in sources if name in sys.modules]:
        # Classes of the one kind are not those of the other.
        return f"{known[0]} runs as Python already"
    sys.meta_path.insert(0, Finder(folder, (*sources, library)))
    return ""


def _manifest(folder: Path) -> tuple[Sources, str]:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    return manifest["sources"], manifest["library"]


def folder_of(package: str) -> Path:
    """Where the machine code of a package of ours is kept: in itself."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"no package {package}")
    return Path(found.submodule_search_locations[0]) / FOLDER


def source_of(name: str) -> Path:
    """The file of a module of ours, which is not imported by this."""
    penstock, of, *parts = name.split(".")
    return folder_of(f"{penstock}.{of}").parent.joinpath(*parts).with_suffix(".py")


def digest_of(name: str) -> str:
    """sha256 of the source of a module of ours."""
    return hashlib.sha256(source_of(name).read_bytes()).hexdigest()


def compiled() -> bool:
    """Whether this process runs machine code."""
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def main() -> int:
    """Run the `main` of the module that the second argument names, with the others and with the machine code
    of the package that the first one names, if there is any of use."""
    use(folder_of(sys.argv[1]))
    del sys.argv[:2]
    code: int = importlib.import_module(sys.argv[0]).main()
    return code


if __name__ == "__main__":
    # By its own name, so that there is one of it.
    raise SystemExit(importlib.import_module("penstock.common.machine_code").main())
