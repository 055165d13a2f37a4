"""Kubernetes objects for tests, shaped like those of real clusters."""

from __future__ import annotations

from typing import Any

from penstock.common.model import Instance

Object = dict[str, Any]


def pod(
    name: str,
    ip: str = "10.244.1.7",
    *,
    ports: dict[str, int] | None = None,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    ready: bool = True,
    **meta: Any,
) -> Object:
    """A running pod with one container; `ports` by name."""
    declared = [{"name": key, "containerPort": n, "protocol": "TCP"} for key, n in (ports or {}).items()]
    conditions = [
        {"type": "PodScheduled", "status": "True"},
        {"type": "ContainersReady", "status": "True" if ready else "False"},
        {"type": "Ready", "status": "True"}
        if ready
        else {"type": "Ready", "status": "False", "reason": "ContainersNotReady", "message": "containers"},
    ]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": f"uid-{name}",
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": labels or {},
            "annotations": annotations or {},
            **meta,
        },
        "spec": {"nodeName": "node-1", "containers": [{"name": "engine", "image": "x", "ports": declared}]},
        "status": {
            "phase": "Running",
            "podIP": ip,
            "podIPs": [{"ip": ip}],
            "hostIP": "192.168.0.4",
            "conditions": conditions,
        },
    }


def pod_of(instance: Instance) -> Object:
    """A pod that says what the instance is, with Penstock's own annotations."""
    said = {
        "model": ",".join(instance.models),
        "lora": ",".join(instance.lora_adapters),
        "owner": instance.owner,
        "role": str(instance.role),
        "engine": instance.engine,
        "group": instance.group,
        "dp_rank": str(instance.dp_rank) if instance.dp_size > 1 else "",
        "dp_size": str(instance.dp_size),
        "kv_address": instance.kv_address,
        "bootstrap_port": str(instance.bootstrap_port or ""),
        "weight": str(instance.weight),
    }
    return pod(
        instance.id,
        instance.endpoint.host,
        ports={"http": instance.endpoint.port},
        labels=instance.labels,
        annotations={f"penstock/{key}": value for key, value in said.items() if value},
    )


def service(name: str, cluster_ip: str = "10.96.0.9", **spec: Any) -> Object:
    """A Service with one port, 8000."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "labels": {}},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": cluster_ip,
            "ports": [{"port": 8000, "protocol": "TCP", "targetPort": 8200}],
            **spec,
        },
    }


def endpoint(ip: str, name: str = "", **conditions: bool) -> Object:
    """One endpoint of a slice, of the pod `name`."""
    made: Object = {"addresses": [ip], "conditions": {"ready": True, **conditions}}
    if name:
        made["targetRef"] = {"kind": "Pod", "name": name, "namespace": "default"}
    return made


def endpoint_slice(name: str, *endpoints: Object, service: str = "svc", port: int = 8000) -> Object:
    """A slice of a Service's endpoints."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4",
        "endpoints": list(endpoints),
        "ports": [{"name": "", "port": port, "protocol": "TCP"}],
    }
