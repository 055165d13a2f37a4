"""Settings of the Kubernetes source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from penstock.common.settings import Settings
from penstock.discovery.kubernetes_rules import (
    PRESETS,
    Kind,
    Rules,
    check_selector,
    parse_places,
    parse_ports,
)

ALL_NAMESPACES = "*"
MAX_NAMESPACES = 64
_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9](?:[a-z0-9-]{0,13}[a-z0-9])?")


class KubernetesSettings(Settings):
    """How instances are found in Kubernetes."""

    discovery_kubernetes_preset: Literal["none", "llm-d", "aibrix"] = Field(
        "none",
        description="whose labels are read: none for penstock/*, llm-d for decode Services, aibrix for pods",
    )
    discovery_kubernetes_kind: Literal["auto", "pods", "services", "endpointslices"] = Field(
        "auto", description="objects that are instances; auto for those of the preset"
    )
    discovery_kubernetes_namespace: str = Field(
        "",
        max_length=8192,
        description="namespaces, comma-separated; * for all, empty for the credentials' own",
    )
    discovery_kubernetes_selector: str = Field(
        "", max_length=1024, description="label selector of the objects; empty for that of the preset"
    )
    discovery_kubernetes_port: str = Field(
        "",
        max_length=512,
        description="port of objects whose labels name none: number, range (one port per data-parallel "
        "rank), or name of a port; empty for that of the preset or the only one declared",
    )
    discovery_kubernetes_map: str = Field(
        "",
        max_length=8192,
        description="fields read elsewhere than the preset reads them, comma-separated: "
        "field=label:KEY, field=annotation:KEY, alternatives joined with |",
    )
    discovery_kubernetes_kubeconfig: Path | None = Field(
        None, description="kubeconfig file; else the pod's service account, $KUBECONFIG or ~/.kube/config"
    )
    discovery_kubernetes_context: str = Field(
        "", max_length=512, description="context of the kubeconfig; empty for its current one"
    )
    discovery_kubernetes_timeout: float = Field(
        10.0, gt=0, le=300, description="seconds the API may take to answer a request"
    )
    discovery_kubernetes_silence_sec: float = Field(
        30.0,
        ge=0.1,
        le=3600,
        description="seconds without a word from a watch after which it is opened anew",
    )
    discovery_kubernetes_refresh_interval_sec: float = Field(
        600.0, ge=0.1, le=604800, description="seconds between two full listings (the watch is the main way)"
    )
    discovery_kubernetes_page_size: int = Field(
        500, ge=1, le=10000, description="objects asked for per page of a listing"
    )

    @field_validator("discovery_kubernetes_namespace")
    @classmethod
    def _namespaces(cls, text: str) -> str:
        names = _split(text)
        wrong = [name for name in names if name != ALL_NAMESPACES and not _NAMESPACE.fullmatch(name)]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not the name of a namespace")
        if ALL_NAMESPACES in names and len(names) > 1:
            raise ValueError("* stands for all namespaces: give it alone")
        if len(names) > MAX_NAMESPACES:
            raise ValueError(f"{len(names)} namespaces, over {MAX_NAMESPACES}: give * for all")
        return text

    @field_validator("discovery_kubernetes_selector")
    @classmethod
    def _selector(cls, text: str) -> str:
        return check_selector(text)

    @field_validator("discovery_kubernetes_port")
    @classmethod
    def _port(cls, text: str) -> str:
        if text and parse_ports(text) is None and not _PORT_NAME.fullmatch(text):
            raise ValueError("is neither a number, nor a range such as 8000-8003, nor the name of a port")
        return text

    @field_validator("discovery_kubernetes_map")
    @classmethod
    def _map(cls, text: str) -> str:
        parse_places(text)
        return text

    @field_validator("discovery_kubernetes_kubeconfig")
    @classmethod
    def _kubeconfig(cls, path: Path | None) -> Path | None:
        if path is not None and not path.is_file():
            raise ValueError("there is no such file")
        return path

    def kubernetes_kind(self) -> Kind:
        """What is watched."""
        kind = self.discovery_kubernetes_kind
        return PRESETS[self.discovery_kubernetes_preset].kind if kind == "auto" else kind

    def kubernetes_selector(self) -> str:
        """Which of them."""
        return self.discovery_kubernetes_selector or PRESETS[self.discovery_kubernetes_preset].selector

    def kubernetes_rules(self) -> Rules:
        """How they are read."""
        rules = PRESETS[self.discovery_kubernetes_preset].rules.with_port(self.discovery_kubernetes_port)
        return rules.with_places(parse_places(self.discovery_kubernetes_map))

    def kubernetes_namespaces(self) -> tuple[str, ...]:
        """Where; empty for the credentials' own, `*` for all."""
        return tuple(dict.fromkeys(_split(self.discovery_kubernetes_namespace)))


def _split(text: str) -> list[str]:
    return [name for part in text.split(",") if (name := part.strip())]
