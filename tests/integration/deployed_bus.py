"""NATS as `deploy/k8s` runs it, on this machine: its configuration files, its accounts, its environment.

What differs is what a pod has of its own: addresses, ports, the store's folder.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from integration.servers import NatsServer, Process, free_port
from integration.stack import Stack

K8S = Path(__file__).resolve().parents[2] / "deploy" / "k8s"
NATS = K8S / "base" / "nats"
CLUSTER = K8S / "components" / "nats-cluster"
CLUSTER_READY_S = 30.0
# The command line names each server's own.
STORE = "store_dir: /data"
INJECTED = "PENSTOCK_SERVICE_HOST"


def secrets() -> dict[str, str]:
    """What the component demo-secrets makes."""
    (made,) = _yaml(K8S / "components" / "demo-secrets" / "kustomization.yaml")[0]["secretGenerator"]
    return dict(literal.split("=", 1) for literal in made["literals"])


def container_env(manifest: Path, pod_name: str = "") -> dict[str, str]:
    """The environment of the first container of a workload, variables of its ConfigMap aside."""
    (workload,) = (one for one in _yaml(manifest) if one["kind"] in ("Deployment", "StatefulSet"))
    env = {}
    for one in workload["spec"]["template"]["spec"]["containers"][0]["env"]:
        source = one.get("valueFrom", {})
        if "secretKeyRef" in source:
            env[one["name"]] = secrets()[source["secretKeyRef"]["key"]]
        else:
            env[one["name"]] = pod_name if "fieldRef" in source else one["value"]
    return env


def config_literals(kustomization: Path, service: str) -> dict[str, str]:
    """What a ConfigMap of a service is made of there."""
    made = {one["name"]: one for one in _yaml(kustomization)[0]["configMapGenerator"]}
    return dict(literal.split("=", 1) for literal in made[f"penstock-{service}"]["literals"])


def _yaml(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


@dataclass
class DeployedBus:
    """One server, or the three of the component nats-cluster."""

    servers: list[NatsServer]
    monitors: list[int]
    clustered: bool

    def url(self, user: str = "") -> str:
        """All servers, for one user."""
        credentials = f"{user}:{secrets()[f'nats-{user}']}@" if user else ""
        return ",".join(f"nats://{credentials}127.0.0.1:{server.port}" for server in self.servers)

    def service_env(self, service: str) -> dict[str, str]:
        """What the manifests give the service; the servers' addresses are those of here."""
        given = config_literals(K8S / "base" / "kustomization.yaml", service)
        if self.clustered:
            given |= config_literals(CLUSTER / "kustomization.yaml", service)
        assert len(given["PENSTOCK_NATS_URL"].split(",")) == len(self.servers)
        own = container_env(K8S / "base" / f"{service}.yaml")
        return {**given, **own, "PENSTOCK_NATS_URL": self.url()}

    def leader_of(self, stream: str) -> int:
        """The server that leads a stream; AssertionError if none does, or a copy is not current."""
        for index, port in enumerate(self.monitors):
            for one in self._streams(port):
                cluster = one.get("cluster", {})
                if one["name"] == stream and cluster.get("leader") == f"penstock-nats-{index}":
                    copies = cluster.get("replicas", [])
                    assert len(copies) == len(self.servers) - 1, copies
                    assert all(copy["current"] and not copy.get("offline") for copy in copies), copies
                    return index
        raise AssertionError(f"nobody leads {stream}")

    def forbidden(self) -> list[str]:
        """Lines of the servers' logs about somebody who was refused something."""
        return [
            line for server in self.servers for line in server.process.lines if "iolation" in line.lower()
        ]

    def _streams(self, port: int) -> list[dict[str, Any]]:
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{port}/jsz?accounts=1&streams=1", timeout=2
            ) as answer:
                page = json.load(answer)
        except OSError:
            return []
        return [
            one for account in page.get("account_details", ()) for one in account.get("stream_detail", ())
        ]

    def ready(self) -> None:
        """Every server has JetStream, and in a cluster a leader of it."""
        for server, port in zip(self.servers, self.monitors, strict=True):
            server.process.wait_for_http(f"http://127.0.0.1:{port}/healthz", timeout_s=CLUSTER_READY_S)


@contextlib.contextmanager
def deployed_bus(servers: int) -> Iterator[DeployedBus]:
    """One server by nats.conf, or three by cluster.conf."""
    clustered = servers > 1
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as exits:
        for file in (NATS / "accounts.conf", CLUSTER / "cluster.conf"):
            shutil.copy(file, folder)
        general = (NATS / "nats.conf").read_text()
        assert general.count(STORE) == 1
        (Path(folder) / "nats.conf").write_text(general.replace(STORE, ""))
        peers = [free_port() for _ in range(servers)]
        bus = DeployedBus([], [free_port() for _ in range(servers)], clustered)
        for index in range(servers):
            own = ["--http_port", str(bus.monitors[index]), "--pid", f"{folder}/{index}.pid"]
            if clustered:
                own += ["--cluster", f"nats://127.0.0.1:{peers[index]}"]
                own += ["--routes", ",".join(f"nats://127.0.0.1:{port}" for port in peers)]
            config = Path(folder) / ("cluster.conf" if clustered else "nats.conf")
            env = container_env(NATS / "nats.yaml", f"penstock-nats-{index}")
            bus.servers.append(NatsServer("-c", str(config), *own, env=env))
        for server in bus.servers:
            exits.enter_context(server)
        bus.ready()
        yield bus


@dataclass
class DeployedStack(Stack):
    """Services as processes with the environment of the manifests."""

    bus: DeployedBus = field(kw_only=True)

    @property
    def events_url(self) -> str:
        return self.bus.url("auditor")

    def _service(self, name: str, *flags: str, admin_port: int = 0) -> Process:
        # What a Service named `penstock` would inject, for which no setting has a name.
        env = {**self.bus.service_env(name), INJECTED: "10.96.0.17"}
        process = Process.module(f"penstock.{name}", "--admin-port", str(admin_port), *flags, env=env)
        return self.exits.enter_context(process)


@contextlib.contextmanager
def deployed_stack(servers: int) -> Iterator[DeployedStack]:
    """The bus and nothing else yet; everything started on it ends with the block."""
    with deployed_bus(servers) as bus, contextlib.ExitStack() as exits:
        yield DeployedStack(bus.servers[0], exits=exits, bus=bus)
