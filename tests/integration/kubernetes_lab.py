"""The Kubernetes stub as a store of the source contract, with credentials as files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from integration.kubernetes_objects_made import pod, pod_of
from integration.kubernetes_stub import KubernetesStub
from penstock.common.model import Instance
from penstock.discovery.adapters.kubernetes_api import Load, credentials_of, in_cluster
from penstock.discovery.adapters.kubernetes_resource import Bounds
from penstock.discovery.adapters.kubernetes_source import KubernetesSource
from penstock.discovery.allowed import AllowedHosts
from penstock.discovery.kubernetes_settings import KubernetesSettings
from penstock.discovery.ports import Source

# Every pod is wanted; its labels stay free for what a test puts there.
EVERYTHING = "!penstock/hidden"


def settings(**changed: Any) -> KubernetesSettings:
    """With short times."""
    quick = {
        "discovery_kubernetes_selector": EVERYTHING,
        "discovery_kubernetes_timeout": 0.5,
        "discovery_kubernetes_silence_sec": 0.3,
        "discovery_kubernetes_namespace": "default",
    }
    return KubernetesSettings(**{**quick, **{f"discovery_kubernetes_{k}": v for k, v in changed.items()}})


def kubeconfig(folder: Path, url: str, *, token: str = "", namespace: str = "", **cluster: str) -> Path:
    """A kubeconfig file."""
    context = {"cluster": "c", "user": "u", **({"namespace": namespace} if namespace else {})}
    made = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": url, **cluster}}],
        "users": [{"name": "u", "user": {"token": token} if token else {}}],
        "contexts": [
            {"name": "here", "context": context},
            {"name": "there", "context": {**context, "namespace": "there"}},
        ],
    }
    path = folder / "kubeconfig"
    # JSON is YAML.
    path.write_bytes(msgspec.json.encode(made))
    return path


def service_account(folder: Path, stub: KubernetesStub, *, token: str, ca: bytes, namespace: str) -> Load:
    """The credentials of a pod, whose files are in `folder`."""
    (folder / "token").write_text(f"{token}\n")
    (folder / "ca.crt").write_bytes(ca)
    (folder / "namespace").write_text(namespace)
    environ = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(stub.port)}

    async def load() -> Any:
        return await in_cluster(folder, environ)

    return load


def source_of(load: Load, **changed: Any) -> Source:
    """A source with other credentials than those that settings can name."""
    return KubernetesSource(settings(**changed), AllowedHosts(), load, Bounds(retry_s=0.4))


class KubernetesLab:
    """Fulfils `StoreLab`."""

    outages: Sequence[str] = ("stopped", "frozen", "failing")
    grace = False
    carries = frozenset(
        {"models", "lora_adapters", "owner", "role", "engine", "group", "dp_rank", "dp_size"}
        | {"kv_address", "bootstrap_port", "labels", "weight"}
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stub = KubernetesStub(token="first")
        self.bounds = Bounds(retry_s=0.4)

    def id_of(self, name: str) -> str:
        return f"{name}.default"

    def source(self, **changed: Any) -> Source:
        path = kubeconfig(self.folder, self.stub.url, token=self.stub.token, namespace="default")
        return self.source_with(path, **changed)

    def source_with(self, path: Path, **changed: Any) -> Source:
        """A source that reads this kubeconfig."""
        flags = settings(kubeconfig=path, **changed)
        load = credentials_of(path, flags.discovery_kubernetes_context)
        return KubernetesSource(flags, AllowedHosts(), load, self.bounds)

    async def put(self, *instances: Instance) -> None:
        await self.stub.put("pods", *map(pod_of, instances))

    async def delete(self, instance_id: str) -> None:
        await self.stub.delete("pods", instance_id)

    async def put_garbage(self) -> str:
        garbage = pod("garbage")
        garbage["spec"] = ["no", "spec"]
        await self.stub.put("pods", garbage)
        return "pods/default/garbage"

    async def delete_garbage(self) -> None:
        await self.stub.delete("pods", "garbage")

    async def away(self, how: str) -> None:
        if how == "stopped":
            await self.stub.stop()
        elif how == "frozen":
            self.stub.faults.frozen = True
        else:
            self.stub.faults.status = 500

    async def back(self) -> None:
        self.stub.faults.frozen, self.stub.faults.status = False, 0
        await self.stub.stop()
        await self.stub.start()

    async def lose_data(self) -> None:
        await self.stub.reset()

    async def close(self) -> None:
        await self.stub.stop()
