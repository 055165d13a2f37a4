"""An overlay of `deploy/k8s` on this machine: its objects as processes, its pods in a stub of the API.

Taken from the manifests: which programs run, with which arguments, variables, secrets and labels. Changed: a
pod's address is one of loopback (its own, so that ports stay those of the manifest), names of Services
become addresses, the gateway's ports are free ones.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import importlib.util
import json
import random
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from integration.deployed_bus import K8S, DeployedBus, deployed_bus
from integration.kubernetes_lab import kubeconfig
from integration.kubernetes_objects_made import pod
from integration.kubernetes_stub import KubernetesStub
from integration.servers import Process, free_port
from integration.stack import Ingress, Stack

Manifest = dict[str, Any]
SERVICES = "ingress", "scheduler", "discovery", "mirror"
# Of each engine; two show all that four do.
MOST_REPLICAS = 2
WITHIN_S = 30.0


def scenarios() -> ModuleType:
    """`deploy/k8s/scenario.py`."""
    spec = importlib.util.spec_from_file_location("scenario", K8S / "scenario.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scenario"] = module
    spec.loader.exec_module(module)
    return module


def rendered(overlay: str) -> list[Manifest]:
    """What `kubectl apply -k` would send."""
    command = ["kubectl", "kustomize", str(K8S / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return list(yaml.safe_load_all(done.stdout))


class OverlayLab:
    """A running overlay; as a scenario's cluster, changed by scaling and by writing the mirror's file."""

    def __init__(self, overlay: str, bus: DeployedBus, api: KubernetesStub, folder: Path) -> None:
        self._objects, self._bus, self._api, self._folder = rendered(overlay), bus, api, folder
        self._loop = asyncio.get_running_loop()
        self._pods: dict[str, list[tuple[str, Process]]] = {}
        self._addresses: dict[str, str] = {}
        self._exits = contextlib.ExitStack()
        self.stack = Stack(bus.servers[0], exits=self._exits)
        (self.namespace,) = {one["metadata"]["namespace"] for one in self._of("Deployment")}

    def start(self) -> None:
        """Engines first, so that names of Services have addresses; then the four services."""
        for engine in (one for one in self._of("Deployment") if self._container(one)["name"] == "sim"):
            self._pods[engine["metadata"]["name"]] = []
            self.scale(engine["metadata"]["name"], min(MOST_REPLICAS, engine["spec"]["replicas"]))
        self.write_mirror(json.loads(self._config("penstock-mirror-config")["mirror.json"]))
        config = kubeconfig(self._folder, self._api.url, namespace=self.namespace)
        flags = {
            "discovery": ("--discovery-kubernetes-kubeconfig", str(config), "--probe-interval", "0.5"),
            "mirror": ("--mirror-config", str(self._folder / "mirror.json")),
        }
        for service in SERVICES:
            self._start(service, *flags.get(service, ()))

    def scale(self, deployment: str, replicas: int) -> None:
        pods = self._pods[deployment]
        while len(pods) < min(MOST_REPLICAS, replicas):
            pods.append(self._start_engine(deployment, len(pods)))
        while len(pods) > replicas:
            name, process = pods.pop()
            self._tell(self._api.delete("pods", name, self.namespace))
            process.terminate()
            process.wait()

    def write_mirror(self, config: Mapping[str, object]) -> None:
        (self._folder / "mirror.json").write_text(self._located(json.dumps(config)))

    def copies(self) -> int:
        with urllib.request.urlopen(f"http://{self._addresses['mirror-target']}:8000/sim/state") as answer:
            return int(json.load(answer)["requests_total"])

    def close(self) -> None:
        """End every process."""
        self._exits.close()

    def _start_engine(self, deployment: str, number: int) -> tuple[str, Process]:
        (workload,) = (one for one in self._of("Deployment") if one["metadata"]["name"] == deployment)
        # A pod's address of its own: ports are the manifest's.
        address = f"127.{random.randrange(1, 255)}.{random.randrange(256)}.{random.randrange(1, 255)}"
        container = self._container(workload)
        arguments = [*container["args"], "--host", address, "--speedup", "20"]
        process = self._exits.enter_context(Process.module("penstock.sim", *arguments))
        process.wait_for_line("listening on")
        labels = workload["spec"]["template"]["metadata"]["labels"]
        self._addresses.setdefault(self._service_of(labels), address)
        name = f"{deployment}-{number}-{random.getrandbits(24):06x}"
        if "penstock/discover" in labels:
            ports = {one["name"]: one["containerPort"] for one in container["ports"]}
            made = pod(name, address, ports=ports, labels=labels)
            made["metadata"]["namespace"] = self.namespace
            self._tell(self._api.put("pods", made))
        return name, process

    def _start(self, service: str, *flags: str) -> None:
        (workload,) = (
            one for one in self._of("Deployment") if one["metadata"]["name"] == f"penstock-{service}"
        )
        container, env = self._container(workload), dict[str, str]()
        for source in container["envFrom"]:
            env |= self._config(source["configMapRef"]["name"])
        for one in container["env"]:
            secret = one.get("valueFrom", {}).get("secretKeyRef")
            env[one["name"]] = self._secret(secret["key"]) if secret else one["value"]
        env = {name: self._located(value) for name, value in env.items()}
        started = {**env, "PENSTOCK_NATS_URL": self._bus.url()}
        port, admin_port = free_port(), free_port()
        arguments = ["--admin-port", str(admin_port), *flags]
        arguments += ["--port", str(port)] if service == "ingress" else []
        process = self._exits.enter_context(Process.module(f"penstock.{service}", *arguments, env=started))
        if service == "ingress":
            self.stack.ingresses.append(Ingress(process, port, admin_port))
        elif service == "scheduler":
            self.stack.schedulers.append(process)
            self.stack.scheduler_ports.append(admin_port)

    def _of(self, kind: str) -> list[Manifest]:
        return [one for one in self._objects if one["kind"] == kind]

    def _container(self, workload: Manifest) -> Manifest:
        container: Manifest = workload["spec"]["template"]["spec"]["containers"][0]
        return container

    def _config(self, name: str) -> dict[str, str]:
        (data,) = (one["data"] for one in self._of("ConfigMap") if one["metadata"]["name"] == name)
        return dict(data)

    def _secret(self, key: str) -> str:
        return base64.b64decode(self._of("Secret")[0]["data"][key]).decode()

    def _service_of(self, labels: Mapping[str, str]) -> str:
        selected = [
            one["metadata"]["name"]
            for one in self._of("Service")
            if one["spec"]["selector"].items() <= labels.items()
        ]
        return selected[0] if selected else ""

    def _located(self, text: str) -> str:
        """Names of Services in addresses become those of their pods."""
        for name, address in self._addresses.items():
            text = text.replace(f"//{name}:", f"//{address}:") if name else text
        return text

    def _tell(self, change: Coroutine[Any, Any, Any]) -> None:
        """The stub lives on the test's loop; this is called from a thread."""
        asyncio.run_coroutine_threadsafe(change, self._loop).result(WITHIN_S)


@asynccontextmanager
async def running_overlay(overlay: str, folder: Path) -> AsyncIterator[OverlayLab]:
    """The overlay with its bus, ready to be asked."""
    api = KubernetesStub()
    await api.start()
    with contextlib.ExitStack() as exits:
        bus = exits.enter_context(deployed_bus(1))
        lab = OverlayLab(overlay, bus, api, folder)
        exits.callback(lab.close)
        try:
            await asyncio.to_thread(lab.start)
            await lab.stack.ready()
            yield lab
        finally:
            await asyncio.to_thread(lab.close)
            await api.stop()
