"""Every overlay builds, its objects are valid, hardened, and name only what exists."""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from penstock.cli.nats_accounts import variable_of
from penstock.cli.up_settings import SERVICES
from penstock.common.permissions import GRANTS
from penstock.common.settings import Settings, describe
from penstock.discovery.register.settings import RegisterSettings
from penstock.sim.settings import SimSettings

K8S = Path(__file__).resolve().parents[2] / "deploy" / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
PROGRAMS: dict[str, type[Settings]] = {**SERVICES, "register": RegisterSettings, "sim": SimSettings}
PORTS = {
    "3000", "4222", "6222", "8222", "8080", "9090", "2379", "2380", "2381", "6379", "8000", "8998", "20001",
    *(str(cls.model_fields["admin_port"].default) for cls in SERVICES.values()),
}  # fmt: skip

WATCHERS = "prometheus", "grafana"

pytestmark = pytest.mark.skipif(
    not shutil.which("kubectl"), reason="needs kubectl: apt-get install kubernetes-client"
)

Manifest = dict[str, Any]


@lru_cache
def objects(overlay: str) -> tuple[Manifest, ...]:
    """What the overlay builds."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(K8S / "overlays" / overlay)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    return [one for one in objects(overlay) if one["kind"] in kinds]


def pods(overlay: str) -> list[tuple[str, Manifest]]:
    """(name, pod specification) of what runs."""
    workloads = of_kind(overlay, "Deployment", "StatefulSet")
    return [(one["metadata"]["name"], one["spec"]["template"]["spec"]) for one in workloads]


def containers(overlay: str) -> list[tuple[str, Manifest]]:
    return [
        (name, container)
        for name, spec in pods(overlay)
        for container in (*spec.get("initContainers", ()), *spec["containers"])
    ]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(overlay: str) -> None:
    for one in objects(overlay):
        kubernetes_validate.validate(one, "1.32", strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_image_is_pinned_to_a_release(overlay: str) -> None:
    """Of others to that of the compose stack."""
    pinned = set(
        re.findall(r"\$\{\w+_IMAGE:-([^}]*)\}", (K8S.parent / "compose" / "compose.yaml").read_text())
    )
    for name, container in containers(overlay):
        image = container["image"]
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+(-[a-z]+)?", image), name
        assert image in pinned or image.startswith("penstock/"), name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_have_no_rights_and_no_service_variables(overlay: str) -> None:
    for name, spec in pods(overlay):
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        # A Service named penstock would put PENSTOCK_PORT into the environment.
        assert spec["enableServiceLinks"] is False, name
        assert spec.get("automountServiceAccountToken") is (name == "penstock-discovery"), name
    for name, container in containers(overlay):
        security = container["securityContext"]
        assert security["readOnlyRootFilesystem"] is True, name
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert container["resources"].keys() == {"requests", "limits"}, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_variable_is_a_setting_of_the_program_that_gets_it(overlay: str) -> None:
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(overlay, "ConfigMap")}
    for name, container in containers(overlay):
        program = container["name"]
        if program not in PROGRAMS:
            continue
        known = {variable for _, variable, *_ in describe(PROGRAMS[program])}
        given = {one["name"] for one in container.get("env", ())}
        for source in container.get("envFrom", ()):
            given |= maps[source["configMapRef"]["name"]].keys()
        assert given <= known, (name, given - known)
        flags = [argument for argument in container.get("args", ()) if argument.startswith("--")]
        assert set(flags) <= {flag for flag, *_ in describe(PROGRAMS[program])}, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_probes_ask_what_is_there_and_pods_live_longer_than_their_drain(overlay: str) -> None:
    for name, spec in pods(overlay):
        for container in spec["containers"]:
            ports = {str(port["name"]): str(port["containerPort"]) for port in container.get("ports", ())}
            assert set(ports.values()) <= PORTS
            if container["name"] not in SERVICES:
                continue
            assert (
                spec["terminationGracePeriodSeconds"]
                > SERVICES["ingress"].model_fields["drain_timeout"].default + 5
            )
            for probe, path in (("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
                assert container[probe]["httpGet"] == {"path": path, "port": "admin"}, name


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_secret_asked_for_is_made(overlay: str) -> None:
    """By the demo component, and by the script for all others."""
    asked = {
        one["valueFrom"]["secretKeyRef"]["key"]
        for _, container in containers(overlay)
        for one in container.get("env", ())
        if "secretKeyRef" in one.get("valueFrom", {})
    }
    made = subprocess.run(
        [str(K8S / "make-secrets.sh")], capture_output=True, text=True, check=True, timeout=10
    )
    (secret,) = yaml.safe_load_all(made.stdout)
    assert asked <= secret["stringData"].keys()
    assert all(value[0].isalpha() for value in secret["stringData"].values())
    assert {f"nats-{user}" for user in GRANTS} <= secret["stringData"].keys()
    if secrets := of_kind(overlay, "Secret"):
        assert asked <= secrets[0]["data"].keys()
    else:
        assert overlay == "production"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_bus_gets_the_password_of_each_user(overlay: str) -> None:
    nats = next(container for _, container in containers(overlay) if container["name"] == "nats")
    given = {one["name"] for one in nats["env"] if "PASSWORD" in one["name"]}
    assert given == {variable_of(user) for user in GRANTS}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_readme_says_how_to_apply_it_and_names_what_exists(overlay: str) -> None:
    text = (K8S / "overlays" / overlay / "README.md").read_text()
    assert f"kubectl apply -k deploy/k8s/overlays/{overlay}" in text
    (namespace,) = {one["metadata"]["namespace"] for one in of_kind(overlay, "Deployment")}
    assert set(re.findall(r"--namespace (\S+)", text)) == {namespace}
    names = {one["metadata"]["name"] for one in objects(overlay)}
    told = re.findall(r"(?:deployment|service|configmap|statefulset)[/ ]((?:penstock|demo)[\w-]*)", text)
    assert set(told) <= names
    for link in re.findall(r"\]\((\.\./[^)]+)\)", text):
        assert (K8S / "overlays" / overlay / link.partition("#")[0]).is_file(), link


def test_production_has_three_of_each_that_may_go_one_at_a_time() -> None:
    workloads = [
        one
        for one in of_kind("production", "Deployment", "StatefulSet")
        if one["metadata"]["labels"]["app.kubernetes.io/component"] not in WATCHERS
    ]
    assert {one["spec"]["replicas"] for one in workloads} == {3}
    budgets = {one["metadata"]["name"]: one["spec"] for one in of_kind("production", "PodDisruptionBudget")}
    assert budgets.keys() == {one["metadata"]["name"] for one in workloads}
    assert all(budget["maxUnavailable"] == 1 for budget in budgets.values())
    (config,) = (
        one["data"]
        for one in of_kind("production", "ConfigMap")
        if one["metadata"]["name"].startswith("penstock-discovery")
    )
    assert config["PENSTOCK_NATS_REPLICAS"] == "3"
    assert len(config["PENSTOCK_NATS_URL"].split(",")) == 3
    scaled = {
        one["spec"]["scaleTargetRef"]["name"]: one for one in of_kind("production", "HorizontalPodAutoscaler")
    }
    kinds = {one["metadata"]["name"]: one["kind"] for one in workloads}
    assert {name: one["spec"]["scaleTargetRef"]["kind"] for name, one in scaled.items()} == {
        name: kinds[name] for name in ("penstock-ingress", "penstock-scheduler")
    }
    for one in workloads:
        spread = one["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert {rule["topologyKey"] for rule in spread} == {
            "topology.kubernetes.io/zone",
            "kubernetes.io/hostname",
        }


def test_production_keeps_events_on_disk_until_they_are_stored() -> None:
    """With room for all that their processes may keep; of what decides and what ends requests in claims,
    which outlive the pod, under a name that its successor has."""
    workloads = {
        one["metadata"]["name"].removeprefix("penstock-"): one
        for one in of_kind("production", "Deployment", "StatefulSet")
    }
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind("production", "ConfigMap")}
    each = SERVICES["ingress"].model_fields["audit_spool_mib"].default
    for service in SERVICES:
        spec = workloads[service]["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        given = maps[container["envFrom"][0]["configMapRef"]["name"]]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volume = mounts[given["PENSTOCK_AUDIT_SPOOL"]]
        needed = each * (int(given.get("PENSTOCK_WORKERS", 1)) + 1)
        claims = {
            one["metadata"]["name"]: one["spec"]
            for one in workloads[service]["spec"].get("volumeClaimTemplates", ())
        }
        if service in ("ingress", "scheduler"):
            assert mebibytes(claims[volume]["resources"]["requests"]["storage"]) >= needed
            assert spec["securityContext"]["fsGroup"] == 10001
            named = {one["name"]: one.get("valueFrom", {}).get("fieldRef") for one in container["env"]}
            assert named[f"PENSTOCK_{service.upper()}_ID"]["fieldPath"] == "metadata.name"
        else:
            volumes = {one["name"]: one for one in spec["volumes"]}
            assert mebibytes(volumes[volume]["emptyDir"]["sizeLimit"]) >= needed


def mebibytes(quantity: str) -> int:
    return int(quantity[:-2]) * {"Mi": 1, "Gi": 1024}[quantity[-2:]]


def test_production_is_watched() -> None:
    """Prometheus may reach every admin port, and every pod says where its metrics are."""
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind("production", "NetworkPolicy")}
    names = {one["metadata"]["name"]: one for one in of_kind("production", "Deployment", "StatefulSet")}
    prometheus = names["penstock-prometheus"]["spec"]["template"]["metadata"]["labels"]
    for service, cls in SERVICES.items():
        template = names[f"penstock-{service}"]["spec"]["template"]
        port = cls.model_fields["admin_port"].default
        assert template["metadata"]["annotations"]["prometheus.io/port"] == str(port)
        (rule,) = (
            one for one in policies[f"penstock-{service}"]["ingress"] if {"port": port} in one["ports"]
        )
        (peer,) = (one["podSelector"]["matchLabels"] for one in rule["from"] if "podSelector" in one)
        assert peer.items() <= prometheus.items()
        (scrapes,) = (
            one for one in policies["penstock-prometheus"]["egress"] if {"port": port} in one["ports"]
        )
        (pods_,) = (one["podSelector"]["matchLabels"] for one in scrapes["to"])
        assert pods_.items() <= template["metadata"]["labels"].items()


def test_production_lets_nothing_through_but_the_flows_of_the_architecture() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind("production", "NetworkPolicy")}
    assert policies.pop("penstock-deny") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}

    def open_ports(rules: list[Manifest]) -> set[int]:
        return {port["port"] for rule in rules for port in rule.get("ports", ())}

    came_in = {name.removeprefix("penstock-"): open_ports(spec["ingress"]) for name, spec in policies.items()}
    assert came_in == {
        "ingress": {8080, 8081},
        "scheduler": {8082},
        "discovery": {8083},
        "mirror": {8084},
        "nats": {4222, 6222, 8222},
        "prometheus": {9090},
        "grafana": {3000},
    }
    # A scheduler talks to the bus and to nobody else.
    assert open_ports(policies["penstock-scheduler"]["egress"]) == {53, 4222}
    assert all("ports" in rule for rule in policies["penstock-scheduler"]["egress"])


@pytest.mark.parametrize("script", sorted(K8S.rglob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_shell_that_can_be_run(script: Path) -> None:
    assert script.stat().st_mode & 0o111
    done = subprocess.run(["sh", "-n", str(script)], capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 0, done.stderr
    named = set(re.findall(r"(?:deployment|statefulset)[/ ]([a-z][\w-]*)", script.read_text()))
    overlay = script.parent.name if script.parent.parent.name == "overlays" else "production"
    assert named <= {one["metadata"]["name"] for one in objects(overlay)}
