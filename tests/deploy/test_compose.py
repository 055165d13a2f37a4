"""The compose file is valid, hardened, and names only what exists."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.cli.nats_accounts import variable_of
from penstock.cli.up_settings import SERVICES
from penstock.common.permissions import GRANTS
from penstock.common.settings import Settings, describe
from penstock.discovery.register.settings import RegisterSettings
from penstock.sim.settings import SimSettings

COMPOSE = Path(__file__).resolve().parents[2] / "deploy" / "compose"
STACK: dict[str, dict[str, Any]] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]
PROGRAMS: dict[str, type[Settings]] = {
    **SERVICES,
    "sim": SimSettings,
    "register-redis": RegisterSettings,
    "register-etcd": RegisterSettings,
}
ADMIN_PORTS = {name: cls.model_fields["admin_port"].default for name, cls in SERVICES.items()}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_variable_is_a_setting_of_its_program(program: str) -> None:
    known = {variable for _, variable, *_ in describe(PROGRAMS[program])}
    assert STACK[program]["environment"].keys() <= known


@pytest.mark.parametrize("service", ADMIN_PORTS)
def test_a_service_is_healthy_when_its_own_probe_says_so(service: str) -> None:
    probe = " ".join(STACK[service]["healthcheck"]["test"])
    assert f"http://127.0.0.1:{ADMIN_PORTS[service]}/readyz" in probe
    assert STACK[service]["depends_on"]["nats"] == {"condition": "service_healthy"}


@pytest.mark.parametrize("name", STACK)
def test_containers_have_limits_and_no_rights(name: str) -> None:
    container = STACK[name]
    assert container["deploy"]["resources"]["limits"].keys() == {"cpus", "memory"}
    assert container["cap_drop"] == ["ALL"]
    if name != "nats-store-owner":
        assert container["read_only"] is True
        assert container["security_opt"] == ["no-new-privileges:true"]


def test_the_bus_gets_the_password_of_each_user_and_its_services_use_them() -> None:
    given = STACK["nats"]["environment"]
    assert {variable_of(user) for user in GRANTS} == {name for name in given if "PASSWORD" in name}
    for service in SERVICES:
        password = given[variable_of(service)]
        assert STACK[service]["environment"]["PENSTOCK_NATS_URL"] == f"nats://{service}:{password}@nats:4222"


def test_each_variable_is_in_the_example_with_the_default_of_the_file() -> None:
    used = dict(re.findall(r"\$\{(\w+):?-([^}]*)\}", (COMPOSE / "compose.yaml").read_text()))
    shown = dict(re.findall(r"^#(\w+)=(.*)$", (COMPOSE / "env.example").read_text(), re.MULTILINE))
    shown.pop("COMPOSE_PROFILES")
    assert shown.keys() == used.keys()
    # The example shows the store's value where the file's is the list.
    assert {name: value for name, value in shown.items() if name != "LLM_BACKEND_DISCOVERY"} == {
        name: value for name, value in used.items() if name != "LLM_BACKEND_DISCOVERY"
    }


@pytest.mark.parametrize("name", STACK)
def test_every_image_is_pinned_to_a_release_or_built_here(name: str) -> None:
    image = re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", STACK[name]["image"])
    assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-[a-z]+)?|penstock/\w+:dev", image)


def test_the_mirror_file_has_the_six_fields() -> None:
    fields = json.loads((COMPOSE / "mirror" / "mirror.json").read_text())
    assert set(fields) == {"Enable", "Target", "Ratio", "Timeout", "Authorization", "EnableLog"}


@pytest.mark.skipif(not shutil.which("docker-compose"), reason="needs docker-compose: apt-get install it")
@pytest.mark.parametrize("profiles", [(), ("redis",), ("etcd",), ("redis", "etcd")])
def test_the_file_is_valid(profiles: tuple[str, ...]) -> None:
    flags = list(_flags(profiles))
    done = subprocess.run(
        ["docker-compose", "-f", str(COMPOSE / "compose.yaml"), *flags, "config", "--quiet"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _flags(profiles: tuple[str, ...]) -> Iterator[str]:
    for profile in profiles:
        yield from ("--profile", profile)
