"""The Dockerfile, without Docker: what its stages do, done for each SERVICE, and what linters ask of it.

The packages come from the shell code of the file itself, run with a `pip` that notes what it is told. They
and all they require are linked into a fresh environment, and the entry point is started there. With
PENSTOCK_SOAK_SECONDS (`make soak`) the code runs with the real pip.
"""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

TREE = Path(__file__).resolve().parents[2]
DOCKERFILE = TREE / "deploy" / "Dockerfile"
IMAGES = ("ingress", "scheduler", "discovery", "mirror", "sim", "cli")
# Distributions that build, test or check; none may be needed by a service.
TOOLS = {"pip", "setuptools", "wheel", "pytest", "mypy", "ruff", "hypothesis", "import-linter", "coverage"}


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str


def instructions() -> list[Instruction]:
    """Those of the file, continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not re.match(r"\s*(#|$)", line)]
    joined = re.sub(r"\\\n", " ", "\n".join(lines)).splitlines()
    return [Instruction(*line.split(None, 1)) for line in joined]


def stages() -> list[list[Instruction]]:
    """What stands before the first FROM, then the stages."""
    parts: list[list[Instruction]] = [[]]
    for one in instructions():
        if one.name == "FROM":
            parts.append([])
        parts[-1].append(one)
    return parts


BEFORE, BUILD, FINAL = stages()


def of(stage: list[Instruction], name: str) -> list[str]:
    return [one.text for one in stage if one.name == name]


def environment(stage: list[Instruction]) -> dict[str, str]:
    return dict(pair.split("=", 1) for text in of(stage, "ENV") for pair in text.split())


def build_code(folder: Path) -> str:
    """The shell code that installs, with the image's folders elsewhere."""
    code = next(text for text in of(BUILD, "RUN") if "pip install" in text)
    return code.replace("/penstock/", f"{folder}/").replace("./${package}", f"{TREE}/${{package}}")


def compile_code(folder: Path, tools: Path, source: Path) -> str:
    """The shell code that compiles, with the image's folders elsewhere, and those of the packages."""
    code = next(text for text in of(BUILD, "RUN") if "compile.py" in text)
    return f"cd {source}; " + code.replace("/penstock/bin", f"{folder}/bin").replace("/tools", str(tools))


def told_pip(service: str, folder: Path, extras: str = "") -> list[list[str]]:
    """What the code tells pip, call by call."""
    for program in ("pip", "python"):
        stub = folder / "bin" / program
        stub.parent.mkdir(exist_ok=True)
        stub.write_text(f'#!/bin/sh\necho "{program}" "$@" >> {folder}/calls\n')
        stub.chmod(0o755)
    subprocess.run(
        ["sh", "-c", build_code(folder)],
        env={**os.environ, "SERVICE": service, "EXTRAS": extras},
        check=True,
        timeout=30,
    )
    calls = (folder / "calls").read_text().splitlines()
    return [call.split()[1:] for call in calls if call.startswith("pip ")]


def required(package: Path) -> Iterator[str]:
    """Names of the distributions of a package of ours and of all that it requires."""
    waiting, known = [str(tomllib.loads((package / "pyproject.toml").read_text())["project"]["name"])], set()
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in known:
            continue
        known.add(name)
        yield name
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
            if requirement.marker is None or any(requirement.marker.evaluate(one) for one in extras):
                waiting.append(requirement.name)


def linked(packages: list[Path], folder: Path) -> Path:
    """A fresh environment that holds these packages and what they require; its Python."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for name in {name for package in packages for name in required(package)}:
        assert name not in TOOLS, f"{[str(p) for p in packages]} need {name}"
        if not name.startswith("penstock-"):
            link(metadata.distribution(name), site)
    for package in packages:
        for source in (package / "src" / "penstock").iterdir():
            (site / "penstock").mkdir(exist_ok=True)
            (site / "penstock" / source.name).symlink_to(source)
        name = tomllib.loads((package / "pyproject.toml").read_text())["project"]["name"]
        info = metadata.distribution(name)._path  # type: ignore[attr-defined]  # where its metadata is
        (site / Path(info).name).symlink_to(info)
    return folder / "bin" / "python"


def link(distribution: metadata.Distribution, site: Path) -> None:
    for file in distribution.files or ():
        top = file.parts[0]
        if top != ".." and top != "__pycache__" and not (site / top).exists():
            (site / top).symlink_to(str(distribution.locate_file(top)))


def started(python: Path, service: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The image's entry point, in an environment like the image's."""
    command = json.loads(of(FINAL, "ENTRYPOINT")[0])
    env = {"PATH": f"{python.parent}:/usr/bin:/bin", "SERVICE": service, "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [*command, *arguments], env=env, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("service", IMAGES)
def test_what_is_installed_starts_and_brings_nothing_of_other_services(service: str, tmp_path: Path) -> None:
    installed, removed = told_pip(service, tmp_path)
    assert installed[0] == "install"
    assert removed == ["uninstall", "--yes", "pip", "setuptools"]
    # Whoever makes spans can export them; what an extra brings is tried with the real pip.
    extras = [argument for argument in installed[1:] if argument.endswith("[otlp]")]
    assert bool(extras) == (service in ("ingress", "scheduler", "cli"))
    packages = [Path(argument.removesuffix("[otlp]")) for argument in installed[1:]]
    folders = {str(package.relative_to(TREE)) for package in packages}
    if service == "cli":
        assert len(folders) == len(list(TREE.glob("*/*/pyproject.toml")))
    else:
        assert folders == {"libs/common", f"{'libs' if service == 'sim' else 'services'}/{service}"}
    python = linked(packages, tmp_path / "image")
    done = started(python, service, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    others = {"ingress", "scheduler", "discovery", "mirror", "sim", "cli"} - {
        f.split("/")[1] for f in folders
    }
    for other in others:
        assert started(python, other, "--help").returncode != 0, other


def test_an_image_of_the_ingress_can_bring_its_tokenizer(tmp_path: Path) -> None:
    installed, _ = told_pip("ingress", tmp_path, "tokenizer")
    assert installed == ["install", f"{TREE}/libs/common[otlp]", f"{TREE}/services/ingress[tokenizer]"]
    extras = tomllib.loads((TREE / "services/ingress/pyproject.toml").read_text())["project"]
    pinned = (TREE / "constraints.txt").read_text()
    for name in extras["optional-dependencies"]["tokenizer"]:
        assert re.search(rf"^{name}==", pinned, re.MULTILINE | re.IGNORECASE), name


def test_the_image_of_discovery_brings_the_sidecar(tmp_path: Path) -> None:
    packages = [TREE / "libs" / "common", TREE / "services" / "discovery"]
    python = linked(packages, tmp_path / "image")
    command = [str(python), "-m", "penstock.discovery.register", "--help"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def test_another_service_is_refused(tmp_path: Path) -> None:
    env = {**os.environ, "SERVICE": "gateway"}
    done = subprocess.run(
        ["sh", "-c", build_code(tmp_path)], env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 1
    assert "SERVICE is 'gateway'" in done.stderr


@pytest.mark.parametrize(("service", "compiled"), [("ingress", True), ("cli", True), ("discovery", False)])
def test_what_can_be_compiled_is_compiled_where_the_compiler_is(
    service: str, compiled: bool, tmp_path: Path
) -> None:
    image, tools, site = tmp_path / "image", tmp_path / "tools", tmp_path / "site"
    made = tmp_path / "services" / "ingress" / "src" / "penstock" / "ingress" / "compiled"
    for folder in (image / "bin", tools / "bin", site / "penstock" / "ingress", made):
        folder.mkdir(parents=True)
    (tmp_path / "services" / "ingress" / "compile.py").touch()
    (made / "made").touch()
    for python, line in ((image, f"echo {site}"), (tools, f'echo "$1" >> {tmp_path}/calls')):
        (python / "bin" / "python").write_text(f"#!/bin/sh\n{line}\n")
        (python / "bin" / "python").chmod(0o755)
    code = compile_code(image, tools, tmp_path)
    subprocess.run(["sh", "-c", code], env={**os.environ, "SERVICE": service}, check=True, timeout=30)
    # By the tools' Python, and into the image, which gets nothing of the tools.
    assert (tmp_path / "calls").exists() == compiled
    assert (site / "penstock" / "ingress" / "compiled" / "made").exists() == compiled


@pytest.mark.skipif("PENSTOCK_SOAK_SECONDS" not in os.environ, reason="downloads packages: make soak")
def test_the_ingress_of_an_image_runs_machine_code(tmp_path: Path) -> None:
    image, tools = tmp_path / "image", tmp_path / "tools"
    source = shutil.copytree(
        TREE, tmp_path / "src", ignore=shutil.ignore_patterns(".*", "tests", "*.egg-info", "compiled")
    )
    venv.create(image, with_pip=True)
    env = {**os.environ, "SERVICE": "ingress", "PIP_CONSTRAINT": str(source / "constraints.txt")}
    install = build_code(image).replace(str(TREE), str(source))
    for code in (install, compile_code(image, tools, source)):
        subprocess.run(["sh", "-c", code], env=env, check=True, timeout=900)
    shutil.rmtree(source)
    shutil.rmtree(tools)
    run = (
        "from penstock.common.machine_code import folder_of, use; print(use(folder_of('penstock.ingress')));"
        "from penstock.ingress import exchange; print(exchange.__file__)"
    )
    done = subprocess.run(
        [image / "bin" / "python", "-c", run], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines()[0] == "", done.stdout
    assert done.stdout.strip().endswith(".so")


# A minute each: the smallest, the one with most libraries, and the one that holds all packages.
@pytest.mark.skipif("PENSTOCK_SOAK_SECONDS" not in os.environ, reason="downloads packages: make soak")
@pytest.mark.parametrize("service", ["scheduler", "discovery", "cli"])
def test_the_build_stage_with_the_real_pip(service: str, tmp_path: Path) -> None:
    image = tmp_path / "image"
    venv.create(image, with_pip=True)
    # Copies, as in the image: building writes beside the source.
    source = shutil.copytree(
        TREE, tmp_path / "src", ignore=shutil.ignore_patterns(".*", "tests", "*.egg-info")
    )
    code = build_code(image).replace(str(TREE), str(source))
    env = {**os.environ, "SERVICE": service, "PIP_CONSTRAINT": str(source / "constraints.txt")}
    subprocess.run(["sh", "-c", code], env=env, check=True, timeout=900)
    done = started(image / "bin" / "python", service, "--help")
    assert (done.returncode, "usage:" in done.stdout) == (0, True), done.stderr
    names = {path.name.split("-")[0].lower() for path in image.glob("lib/*/site-packages/*.dist-info")}
    assert not names & {name.replace("-", "_") for name in TOOLS}
    assert {"penstock_common"} <= names


def test_the_final_stage_is_small_and_has_no_rights() -> None:
    assert of(FINAL, "COPY") == ["--from=build /penstock /penstock"]
    # Making the user is all that is run: no package manager, no compiler.
    (run,) = of(FINAL, "RUN")
    assert re.fullmatch(r"groupadd [^;&|]* && useradd [^;&|]*", run)
    user, group = of(FINAL, "USER")[-1].split(":")
    assert int(user) > 0
    assert int(group) > 0
    names = [one.name for one in FINAL]
    assert names.index("USER") < names.index("ENTRYPOINT")
    assert of(FINAL, "STOPSIGNAL") == ["SIGTERM"]


def test_the_file_is_as_linters_want_it() -> None:
    everything = instructions()
    assert not {"ADD", "MAINTAINER"} & {one.name for one in everything}
    bases = [one.text.split()[0] for one in everything if one.name == "FROM"]
    assert bases == ["${BUILD_IMAGE}", "${PYTHON_IMAGE}"]
    tags = dict(text.split("=python:") for text in of(BEFORE, "ARG") if "=" in text)
    # One Python on one system; that of the first stage has a compiler.
    version, slim, system = tags["PYTHON_IMAGE"].split("-")
    assert slim == "slim"
    assert version.count(".") == 2
    assert tags["BUILD_IMAGE"] == f"{version}-{system}"
    assert all(one.text.startswith("/") for one in everything if one.name == "WORKDIR")
    for run in (one.text for one in everything if one.name == "RUN"):
        assert not re.search(r"\b(sudo|curl|wget|apt-get|apt|ssh)\b|(^|\s)cd\s", run), run
    for entry in of(FINAL, "ENTRYPOINT") + of(FINAL, "CMD"):
        assert isinstance(json.loads(entry), list)
    # Constraints pin every version; nothing of the index is in the file, nor any secret.
    assert environment(BUILD)["PIP_CONSTRAINT"].endswith("constraints.txt")
    assert environment(BUILD)["PIP_NO_CACHE_DIR"] == "1"
    assert not re.search(r"(?i)password|token|secret|index-url", DOCKERFILE.read_text())


def test_images_say_what_they_are() -> None:
    (label,) = of(FINAL, "LABEL")
    for name in ("title", "version", "description"):
        assert f"org.opencontainers.image.{name}=" in label


def test_only_packages_are_sent_to_the_builder() -> None:
    lines = (TREE / ".dockerignore").read_text().split()
    assert "*" in lines
    assert {line for line in lines if line.startswith("!")} == {"!libs", "!services", "!constraints.txt"}
    # What was compiled elsewhere may be for another system.
    assert "**/compiled" in lines
    copied = {text.split()[0] for text in of(BUILD, "COPY")}
    assert copied == {"constraints.txt", "libs", "services"}


def test_every_image_that_is_named_is_one_that_is_made() -> None:
    own = re.compile(r"(?:image: |\{name: )(?:\$\{PENSTOCK_REGISTRY:-penstock\}|penstock)/(\w+)")
    named = {name for path in (TREE / "deploy").rglob("*.yaml") for name in own.findall(path.read_text())}
    assert named == set(IMAGES) - {"cli"}
