"""The seven packages share one namespace and nothing else."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = {
    "libs/common": "penstock-common",
    "libs/sim": "penstock-sim",
    "libs/cli": "penstock-cli",
    "services/ingress": "penstock-ingress",
    "services/scheduler": "penstock-scheduler",
    "services/discovery": "penstock-discovery",
    "services/mirror": "penstock-mirror",
}


def project(folder: str) -> dict[str, object]:
    read: dict[str, object] = tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]
    return read


def test_these_are_all_packages() -> None:
    found = {
        str(p.parent.relative_to(ROOT))
        for part in ("libs", "services")
        for p in ROOT.glob(f"{part}/*/pyproject.toml")
    }
    assert found == set(PACKAGES)


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_init_file_hides_the_sibling_packages(folder: str) -> None:
    source = ROOT / folder / "src" / "penstock"
    assert [path.name for path in source.iterdir() if path.name != "__pycache__"] == [Path(folder).name]
    assert (source / Path(folder).name / "py.typed").is_file()


@pytest.mark.parametrize(("folder", "name"), PACKAGES.items())
def test_a_package_has_its_name_and_depends_on_the_common_one(folder: str, name: str) -> None:
    read = project(folder)
    assert read["name"] == name
    dependencies = read["dependencies"]
    assert isinstance(dependencies, list)
    assert ("penstock-common" in dependencies) == (name != "penstock-common")


@pytest.mark.parametrize("folder", [folder for folder in PACKAGES if folder != "libs/cli"])
def test_nothing_but_the_command_depends_on_a_service(folder: str) -> None:
    dependencies = project(folder)["dependencies"]
    assert isinstance(dependencies, list)
    services = {name for place, name in PACKAGES.items() if place.startswith("services/")}
    assert services.isdisjoint(dependencies)
