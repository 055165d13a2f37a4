"""Compiles modules of a service in place of its installed sources: `make compile`, decisions 0032 and 0050.

mypyc (a part of mypy) translates the modules, a C compiler does the rest. Processes use the result from their
next start on, for as long as the sources are those that it was made from (`machine_code`). Each service names
its modules in `services/*/compile.py`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from penstock.common.machine_code import MANIFEST, digest_of, folder_of, missing, source_of

_SETUP = """
import os
os.environ |= {environ!r}
from setuptools import setup
from mypyc.build import mypycify
modules = mypycify({arguments!r}, opt_level="3", target_dir={target!r})
setup(name="penstock-compiled", packages=[], ext_modules=modules)
"""
_CONFIG = "[mypy]\nfollow_imports = silent\nignore_missing_imports = True\n"


def compile_package(package: str, modules: Sequence[str], argv: Sequence[str]) -> int:
    """Compile `modules`, and put the result where processes of `package` look for it, unless it is there.
    `argv` may name another folder, and other modules. 1, and why on stderr, if it cannot be done here."""
    folder, modules = (Path(argv[0]), argv[1:]) if len(argv) > 1 else (folder_of(package), modules)
    if not missing(folder, modules):
        return 0
    if shutil.which("cc") is None:
        sys.stderr.write(
            f"no C compiler: {package} runs as Python (apt-get install gcc, then make compile)\n"
        )
        return 1
    # Before they are read: who edits one meanwhile gets Python.
    sources = {name: digest_of(name) for name in modules}
    with tempfile.TemporaryDirectory() as scratch:
        built = _build(Path(scratch), modules)
        if not built:
            return 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, file in built.items():
            shutil.copy2(file, folder / f"{name}{EXTENSION_SUFFIXES[0]}")
    library = next(name for name in built if name.endswith("__mypyc"))
    (folder / MANIFEST).write_text(json.dumps({"library": library, "sources": sources}, indent=1))
    return 0


def _build(scratch: Path, names: Sequence[str]) -> dict[str, Path]:
    """The files by name of module, the shared library among them; empty if the compiler failed, which says
    why."""
    (scratch / "mypy.ini").write_text(_CONFIG)
    files = [str(source_of(name)) for name in names]
    roots = {str(Path(file).parents[name.count(".")]): "" for file, name in zip(files, names, strict=True)}
    # Floats come out as numpy has them: no fused multiply and add, which some processors' compilers prefer.
    environ = {"MYPYPATH": os.pathsep.join(roots), "CFLAGS": "-g0 -w -ffp-contract=off"}
    options = ["--namespace-packages", "--explicit-package-bases", f"--config-file={scratch / 'mypy.ini'}"]
    (scratch / "setup.py").write_text(
        _SETUP.format(arguments=[*options, *files], environ=environ, target=str(scratch / "c"))
    )
    command = [sys.executable, str(scratch / "setup.py"), "-q", "build_ext", f"--build-lib={scratch / 'lib'}"]
    command += [f"--build-temp={scratch / 'temp'}"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
    suffix = EXTENSION_SUFFIXES[0]
    built = {
        ".".join(file.relative_to(scratch / "lib").parts).removesuffix(suffix): file
        for file in (scratch / "lib").rglob(f"*{suffix}")
    }
    if done.returncode or len(built) != len(names) + 1:
        sys.stderr.write(f"it could not be compiled:\n{done.stdout[-4000:]}{done.stderr[-4000:]}\n")
        return {}
    return built
