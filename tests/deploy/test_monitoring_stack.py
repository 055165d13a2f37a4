"""Prometheus, Grafana and the collector: in containers and in Kubernetes they get the same files. And the
component that no overlay has, on the demo."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from penstock.cli.up_settings import SERVICES

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())[
    "services"
]
WATCHERS = ("prometheus", "grafana", "otel-collector")
ADMIN_PORTS = {name: cls.model_fields["admin_port"].default for name, cls in SERVICES.items()}
needs_kubectl = pytest.mark.skipif(
    not shutil.which("kubectl"), reason="needs kubectl: apt-get install kubernetes-client"
)


def scraped(config: Path) -> dict[str, tuple[str, int]]:
    """Job to the name and port that are asked."""
    jobs = yaml.safe_load(config.read_text())["scrape_configs"]
    asked = [(job["job_name"], job["dns_sd_configs"][0]) for job in jobs if "dns_sd_configs" in job]
    return {name: (one["names"][0], one["port"]) for name, one in asked}


def test_compose_scrapes_every_replica_of_every_service_on_its_admin_port() -> None:
    asked = scraped(DEPLOY / "monitoring" / "prometheus.yaml")
    assert asked == {f"penstock-{name}": (name, port) for name, port in ADMIN_PORTS.items()}


def test_any_number_of_schedulers_can_run() -> None:
    """No fixed name, no fixed port of the machine."""
    assert all("container_name" not in one for one in COMPOSE.values())
    assert "ports" not in COMPOSE["scheduler"]


@pytest.mark.parametrize("name", WATCHERS)
def test_watchers_are_pinned_do_not_run_as_root_and_are_asked_how_they_are(name: str) -> None:
    container = COMPOSE[name]
    assert re.fullmatch(r"\$\{\w+:-[\w./-]+:v?\d+\.\d+\.\d+\}", container["image"])
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", container["user"])
    assert container["healthcheck"]["test"][0] == "CMD"
    assert all(port.startswith("127.0.0.1:") for port in container.get("ports", ()))
    for volume in container["volumes"]:
        source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
        assert not source.startswith(".") or (DEPLOY / "compose" / source).exists(), source


def test_services_send_traces_to_the_collector_that_is_there() -> None:
    receivers = yaml.safe_load((DEPLOY / "monitoring" / "otel-collector.yaml").read_text())["receivers"]
    port = receivers["otlp"]["protocols"]["http"]["endpoint"].rsplit(":", 1)[1]
    for service in ("ingress", "scheduler"):
        endpoint = COMPOSE[service]["environment"]["PENSTOCK_OTLP_ENDPOINT"]
        assert endpoint == f"${{OTLP_ENDPOINT-http://otel-collector:{port}}}"


@lru_cache
def demo_with(component: str) -> tuple[dict[str, Any], ...]:
    """The demo with a component more."""
    folder = DEPLOY / "k8s" / "overlays" / "lite-load-balance"
    # Not beside the overlays, which other tests list.
    overlay = yaml.safe_load((folder / "kustomization.yaml").read_text().replace("../../", "../"))
    overlay["components"].append(f"../components/{component}")
    scratch = DEPLOY / "k8s" / f".{component}-{os.getpid()}"
    shutil.copytree(folder, scratch)
    try:
        (scratch / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
        done = subprocess.run(
            ["kubectl", "kustomize", str(scratch)], capture_output=True, text=True, timeout=60, check=False
        )
    finally:
        shutil.rmtree(scratch)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def objects() -> tuple[dict[str, Any], ...]:
    """Those of the demo that is watched."""
    return demo_with("monitoring")


def test_every_component_is_part_of_an_overlay_but_the_one_that_is_tried_here() -> None:
    files = [path.read_text() for path in (DEPLOY / "k8s" / "overlays").glob("*/kustomization.yaml")]
    used = {name for text in files for name in re.findall(r"\.\./\.\./components/([\w-]+)", text)}
    assert {path.name for path in (DEPLOY / "k8s" / "components").iterdir()} - used == {"redis"}


@needs_kubectl
def test_redis_as_the_store_is_valid_hardened_and_what_discovery_reads() -> None:
    kinds: dict[str, dict[str, dict[str, Any]]] = {}
    for one in demo_with("redis"):
        kubernetes_validate.validate(one, "1.32", strict=True)
        kinds.setdefault(one["kind"], {})[one["metadata"]["name"]] = one
    spec = kinds["Deployment"]["penstock-redis"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["image"] == re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE["redis"]["image"])
    # As the compose stack's, whose file escapes the dollar.
    said = [argument.replace("$$", "$") for argument in COMPOSE["redis"]["command"]]
    assert container["args"][: len(said)] == said
    (discovery,) = (
        one["data"] for name, one in kinds["ConfigMap"].items() if name.startswith("penstock-discovery")
    )
    assert discovery["PENSTOCK_LLM_BACKEND_DISCOVERY"] == "redis"
    (port,) = kinds["Service"][discovery["PENSTOCK_DISCOVERY_REDIS_HOST"]]["spec"]["ports"]
    assert port["port"] == container["ports"][0]["containerPort"]


@needs_kubectl
def test_the_component_is_valid_and_hardened() -> None:
    names = {one["metadata"]["name"]: one for one in objects() if one["kind"] == "Deployment"}
    for one in objects():
        kubernetes_validate.validate(one, "1.32", strict=True)
        assert len(yaml.safe_dump(one)) < 262_144, "kubectl apply keeps a copy in an annotation"
    for name in ("penstock-prometheus", "penstock-grafana"):
        spec = names[name]["spec"]["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        (container,) = spec["containers"]
        assert container["image"] == re.sub(
            r"\$\{\w+:-([^}]*)\}", r"\1", COMPOSE[container["name"]]["image"]
        ), "the same release as in the compose stack"
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"].keys() == {"requests", "limits"}
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}


@needs_kubectl
def test_prometheus_finds_every_pod_of_every_service() -> None:
    services = {one["metadata"]["name"]: one["spec"] for one in objects() if one["kind"] == "Service"}
    deployments = {one["metadata"]["name"]: one["spec"] for one in objects() if one["kind"] == "Deployment"}
    asked = scraped(DEPLOY / "k8s" / "components" / "monitoring" / "prometheus.yaml")
    assert asked.keys() == {f"penstock-{name}" for name in SERVICES}
    for job, (name, port) in asked.items():
        service = services[name]
        assert service["clusterIP"] == "None"
        assert (
            [one["port"] for one in service["ports"]]
            == [port]
            == [ADMIN_PORTS[job.removeprefix("penstock-")]]
        )
        template = deployments[job]["template"]
        assert service["selector"].items() <= template["metadata"]["labels"].items()
        assert template["metadata"]["annotations"]["prometheus.io/port"] == str(port)
        ports = {one["name"]: one["containerPort"] for one in template["spec"]["containers"][0]["ports"]}
        assert ports["admin"] == port


@needs_kubectl
def test_rules_and_dashboards_are_the_files_of_the_compose_stack() -> None:
    maps = [one["data"] for one in objects() if one["kind"] == "ConfigMap"]
    for path in [
        DEPLOY / "monitoring" / "penstock.rules.yaml",
        *(DEPLOY / "monitoring" / "dashboards").glob("*.json"),
        *(DEPLOY / "monitoring" / "grafana").glob("*.yaml"),
    ]:
        assert path.read_text() in [data.get(path.name) for data in maps], path


@pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool: apt-get install prometheus")
def test_promtool_takes_the_configuration_for_kubernetes() -> None:
    path = DEPLOY / "k8s" / "components" / "monitoring" / "prometheus.yaml"
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
