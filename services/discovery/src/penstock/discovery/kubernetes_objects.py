"""Kubernetes API JSON, reduced to what discovery reads: where an object can be reached, and how it is.

Unknown fields are passed over. Shapes: Kubernetes API v1 and discovery.k8s.io/v1.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec import Raw, Struct
from msgspec import field as json

from penstock.common.codec import decode_record
from penstock.common.model import InstanceState
from penstock.discovery.kubernetes_rules import Kind

# What kubelets and API servers bound already, once more: hostile objects must not cost more.
MAX_ENDPOINTS = 1000
_WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_DNS_NAME = re.compile(
    r"(?=.{1,253}\Z)(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)(?:\.[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)*"
)


class Meta(Struct, rename="camel"):
    """`metadata` of any object."""

    name: str = ""
    namespace: str = ""
    resource_version: str = ""
    deletion_timestamp: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class Head(Struct):
    """Any object, for its name and version."""

    metadata: Meta


class ListMeta(Struct, rename="camel"):
    """`metadata` of a page: where the next one starts, and the version that a watch goes on from."""

    resource_version: str = ""
    next: str | None = json(name="continue", default=None)


class Page(Struct):
    """One page of a listing; its objects are decoded one by one, so that one bad object stays one."""

    metadata: ListMeta
    items: list[Raw] | None = None


class Event(Struct):
    """One line of a watch."""

    type: str
    object: Raw


class Status(Struct):
    """What the API answers instead of an object."""

    message: str = ""
    reason: str = ""
    code: int = 0


class _Port(Struct, rename="camel"):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None
    container_port: int | None = None
    target_port: int | str | None = None
    app_protocol: str | None = None


class _Variable(Struct):
    name: str = ""
    value: str | None = None


class _Container(Struct, rename="camel"):
    ports: list[_Port] | None = None
    env: list[_Variable] | None = None
    restart_policy: str | None = None


class _Condition(Struct):
    type: str = ""
    status: str = ""
    reason: str | None = None


class _PodSpec(Struct, rename="camel"):
    containers: list[_Container] | None = None
    init_containers: list[_Container] | None = None


class _PodStatus(Struct):
    phase: str = ""
    ip: str = json(name="podIP", default="")
    conditions: list[_Condition] | None = None


class _Pod(Struct):
    metadata: Meta
    spec: _PodSpec = json(default_factory=_PodSpec)
    status: _PodStatus = json(default_factory=_PodStatus)


class _ServiceSpec(Struct, rename="camel"):
    type: str = ""
    cluster_ip: str = json(name="clusterIP", default="")
    external_name: str = ""
    ports: list[_Port] | None = None


class _Service(Struct):
    metadata: Meta
    spec: _ServiceSpec = json(default_factory=_ServiceSpec)


class _Conditions(Struct):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _Target(Struct):
    kind: str = ""
    name: str = ""


class _Endpoint(Struct, rename="camel"):
    addresses: list[str] | None = None
    conditions: _Conditions | None = None
    target_ref: _Target | None = None


class _EndpointSlice(Struct):
    metadata: Meta
    endpoints: list[_Endpoint] | None = None
    ports: list[_Port] | None = None


@dataclass(frozen=True)
class Port:
    """A declared TCP port."""

    number: int
    name: str = ""
    https: bool = False


@dataclass(frozen=True)
class Place:
    """Something reachable: its id, host, declared ports, and whether it takes work."""

    id: str
    host: str
    ports: tuple[Port, ...]
    state: InstanceState = InstanceState.READY
    reason: str = ""


@dataclass(frozen=True)
class Described:
    """An object: its metadata, where it is (nowhere without an address), its containers' variables."""

    meta: Meta
    places: tuple[Place, ...]
    variables: dict[str, str] = field(default_factory=dict)


def describe(kind: Kind, data: bytes) -> Described:
    """One object of the API.

    Raises:
        DecodeError: it is not a `kind`.
        ValueError: what it says cannot be an address.
    """
    if kind == "pods":
        return _pod(decode_record(_Pod, data))
    if kind == "services":
        return _service(decode_record(_Service, data))
    return _slice(decode_record(_EndpointSlice, data))


def full_name(meta: Meta) -> str:
    """`name.namespace`, as in cluster DNS: unique within a kind, as a namespace holds no dot."""
    return f"{meta.name}.{meta.namespace}"


def _pod(pod: _Pod) -> Described:
    containers = [*(pod.spec.containers or ())]
    # An init container that always restarts is a sidecar: it runs, and may own the port of the pod.
    containers += [c for c in pod.spec.init_containers or () if c.restart_policy == "Always"]
    ports = tuple(port for container in containers for port in _ports(container.ports))
    variables = {v.name: v.value for c in reversed(containers) for v in c.env or () if v.value is not None}
    if not pod.status.ip or pod.status.phase in ("Succeeded", "Failed"):
        return Described(pod.metadata, ())
    state, reason = _pod_state(pod)
    place = Place(full_name(pod.metadata), _address(pod.status.ip), ports, state, reason)
    return Described(pod.metadata, (place,), variables)


def _pod_state(pod: _Pod) -> tuple[InstanceState, str]:
    """Readiness gates count: the kubelet sets Ready only when they are all true."""
    if pod.metadata.deletion_timestamp:
        return InstanceState.DRAINING, "its pod is being terminated"
    ready = next((c for c in pod.status.conditions or () if c.type == "Ready"), _Condition())
    if ready.status == "True":
        return InstanceState.READY, ""
    word = ready.reason if ready.reason and _WORD.fullmatch(ready.reason) else ""
    return InstanceState.UNHEALTHY, f"its pod is not ready{f' ({word})' if word else ''}"


def _service(service: _Service) -> Described:
    meta, spec = service.metadata, service.spec
    terminating = bool(meta.deletion_timestamp)
    place = Place(
        full_name(meta),
        _service_host(meta, spec),
        tuple(_ports(spec.ports, headless=spec.cluster_ip == "None")),
        InstanceState.DRAINING if terminating else InstanceState.READY,
        "its service is being deleted" if terminating else "",
    )
    return Described(meta, (place,))


def _service_host(meta: Meta, spec: _ServiceSpec) -> str:
    if spec.type == "ExternalName":
        return _dns_name(spec.external_name.lower().removesuffix("."))
    if spec.cluster_ip and spec.cluster_ip != "None":
        return _address(spec.cluster_ip)
    return _dns_name(f"{full_name(meta)}.svc")


def _slice(piece: _EndpointSlice) -> Described:
    endpoints = piece.endpoints or []
    if len(endpoints) > MAX_ENDPOINTS:
        raise ValueError(f"it has {len(endpoints)} endpoints, over {MAX_ENDPOINTS}")
    ports = tuple(_ports(piece.ports))
    places = tuple(place for e in endpoints if (place := _endpoint(piece.metadata, e, ports)))
    return Described(piece.metadata, places)


def _endpoint(meta: Meta, endpoint: _Endpoint, ports: tuple[Port, ...]) -> Place | None:
    """Only the first address is the endpoint's: consumers are told to use no other."""
    if not endpoint.addresses:
        return None
    host = endpoint.addresses[0]
    host = _address(host) if _is_address(host) else _dns_name(host)
    target, conditions = endpoint.target_ref, endpoint.conditions or _Conditions()
    service = (meta.labels or {}).get("kubernetes.io/service-name") or meta.name
    pod = target.name if target and target.kind == "Pod" else ""
    name = f"{pod}.{meta.namespace}" if pod else f"{service}.{meta.namespace}_{host}"
    if conditions.terminating:
        # One that does not serve either has stopped.
        gone = conditions.serving is False
        return None if gone else Place(name, host, ports, InstanceState.DRAINING, "it is being terminated")
    if conditions.ready is False:
        return Place(name, host, ports, InstanceState.UNHEALTHY, "its endpoint is not ready")
    return Place(name, host, ports)


def _ports(ports: list[_Port] | None, *, headless: bool = False) -> Iterator[Port]:
    for port in ports or ():
        # Nothing translates ports of a headless service: what its pods listen on counts.
        inner = port.target_port if headless and isinstance(port.target_port, int) else None
        number = inner or port.port or port.container_port
        if number and 1 <= number <= 65535 and port.protocol in (None, "", "TCP"):
            name = port.name or ""
            yield Port(number, name, "https" in (name, (port.app_protocol or "").lower()))


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _address(text: str) -> str:
    if not _is_address(text) or "%" in text:
        raise ValueError(f"{text[:64]!r} is not an IP address")
    return str(ipaddress.ip_address(text))


def _dns_name(text: str) -> str:
    if not _DNS_NAME.fullmatch(text):
        raise ValueError(f"{text[:64]!r} is not a DNS name")
    return text
