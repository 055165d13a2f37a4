"""Compiles what decides in place of the scheduler's installed sources: `make compile`, decision 0050.

mypyc (a part of mypy) translates the modules, a C compiler does the rest, in about a minute. Schedulers use
the result from their next start on, for as long as the sources are those that it was made from.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from penstock.common.machine_code import MANIFEST, digest_of, folder_of, source_of

# What requests, and reports on them, pass through. Not here: modules with classes of msgspec or pydantic,
# which read annotations that machine code has no more, and the policies' own arithmetic, which numpy does.
MODULES = (
    "penstock.common.adapters.nats_wire",
    "penstock.scheduler.candidates",
    "penstock.scheduler.draws",
    "penstock.scheduler.echo",
    "penstock.scheduler.explaining",
    "penstock.scheduler.feed",
    "penstock.scheduler.instruments",
    "penstock.scheduler.ledger",
    "penstock.scheduler.loads",
    "penstock.scheduler.policies.filters",
    "penstock.scheduler.policies.pickers",
    "penstock.scheduler.prefix_index",
    "penstock.scheduler.recording",
    "penstock.scheduler.replica",
    "penstock.scheduler.scheduler",
    "penstock.scheduler.service",
    "penstock.scheduler.sums",
    "penstock.scheduler.telling",
    "penstock.scheduler.view",
)
_SETUP = """
import os
os.environ |= {environ!r}
from setuptools import setup
from mypyc.build import mypycify
modules = mypycify({arguments!r}, opt_level="3", target_dir={target!r})
setup(name="penstock-compiled", packages=[], ext_modules=modules)
"""
_CONFIG = "[mypy]\nfollow_imports = silent\nignore_missing_imports = True\n"


def main() -> int:
    """Compile, and put the result where schedulers look for it. 1 if it cannot be done here."""
    if shutil.which("cc") is None:
        sys.stderr.write(
            "no C compiler: the scheduler runs as Python (apt-get install gcc, then make compile)\n"
        )
        return 1
    folder = folder_of("penstock.scheduler")
    # Before they are read: who edits one meanwhile gets Python.
    sources = {name: digest_of(name) for name in MODULES}
    with tempfile.TemporaryDirectory() as scratch:
        built = _build(Path(scratch))
        if not built:
            return 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, file in built.items():
            shutil.copy2(file, folder / f"{name}{EXTENSION_SUFFIXES[0]}")
    library = next(name for name in built if name.endswith("__mypyc"))
    (folder / MANIFEST).write_text(json.dumps({"library": library, "sources": sources}, indent=1))
    return 0


def _build(scratch: Path) -> dict[str, Path]:
    """The files by name of module, the shared library among them; empty if the compiler failed, which says
    why."""
    (scratch / "mypy.ini").write_text(_CONFIG)
    files = [str(source_of(name)) for name in MODULES]
    roots = dict.fromkeys(str(folder_of(f"penstock.{of}").parents[2]) for of in ("common", "scheduler"))
    environ = {"MYPYPATH": os.pathsep.join(roots), "CFLAGS": "-g0 -w"}
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
    if done.returncode or len(built) != len(MODULES) + 1:
        sys.stderr.write(
            f"the scheduler could not be compiled:\n{done.stdout[-4000:]}{done.stderr[-4000:]}\n"
        )
        return {}
    return built


if __name__ == "__main__":
    sys.exit(main())
