"""Compiles the ingress's data path in place of its installed sources: `make compile`, decision 0032.

mypyc (a part of mypy) translates the modules, a C compiler does the rest, in about a minute. Workers use the
result from their next start on, for as long as the sources are those that it was made from.

`compile.py FOLDER MODULE ...` compiles these modules alone, into another folder.
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

from penstock.ingress.machine_code import FOLDER, MANIFEST, PACKAGE, digest_of, source_of

# What requests pass through. Not here: modules with classes of msgspec or pydantic, which read annotations
# that machine code has no more.
MODULES = (
    "penstock.common.block_hash",
    "penstock.common.cells",
    "penstock.common.event_log",
    "penstock.common.event_packing",
    "penstock.common.instances",
    "penstock.common.response_tail",
    "penstock.ingress.access_log",
    "penstock.ingress.adapters.client_connection",
    "penstock.ingress.adapters.engine_client",
    "penstock.ingress.adapters.engine_connection",
    "penstock.ingress.adapters.external_client",
    "penstock.ingress.adapters.pool",
    "penstock.ingress.attempt",
    "penstock.ingress.block_hash",
    "penstock.ingress.breaker",
    "penstock.ingress.chunked_body",
    "penstock.ingress.exchange",
    "penstock.ingress.gateway",
    "penstock.ingress.http_wire",
    "penstock.ingress.ids",
    "penstock.ingress.in_flight",
    "penstock.ingress.local_placing",
    "penstock.ingress.local_policy",
    "penstock.ingress.openai",
    "penstock.ingress.outcomes",
    "penstock.ingress.placing",
    "penstock.ingress.ports",
    "penstock.ingress.relay",
    "penstock.ingress.responses",
    "penstock.ingress.speeds",
    "penstock.ingress.standing",
    "penstock.ingress.waiting_room",
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
    """Compile, and put the result where workers look for it. 1 if it cannot be done here."""
    if shutil.which("cc") is None:
        sys.stderr.write(
            "no C compiler: the ingress runs as Python (apt-get install gcc, then make compile)\n"
        )
        return 1
    # Before they are read: who edits one meanwhile gets Python.
    folder, modules = (Path(sys.argv[1]), tuple(sys.argv[2:])) if len(sys.argv) > 2 else (FOLDER, MODULES)
    sources = {name: digest_of(PACKAGE, name) for name in modules}
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
    files = [str(source_of(PACKAGE, name)) for name in names]
    roots = {str(Path(file).parents[name.count(".")]): "" for file, name in zip(files, names, strict=True)}
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
    if done.returncode or len(built) != len(names) + 1:
        sys.stderr.write(
            f"the data path could not be compiled:\n{done.stdout[-4000:]}{done.stderr[-4000:]}\n"
        )
        return {}
    return built


if __name__ == "__main__":
    sys.exit(main())
