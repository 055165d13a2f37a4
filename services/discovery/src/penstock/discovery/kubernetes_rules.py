"""How labels and annotations of Kubernetes objects become fields of an instance: presets and free rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal["pods", "services", "endpointslices"]

# Data-parallel ranks behind one address.
MAX_PORTS = 64

FIELDS = (
    "model", "lora", "owner", "role", "engine", "group", "port", "scheme", "dp_rank", "dp_size",
    "kv_address", "bootstrap_port", "weight", "drain", "config",
)  # fmt: skip

# Label keys as Kubernetes has them: an optional DNS prefix, a slash, a name of at most 63 characters.
_KEY = r"(?:[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?"
_VALUE = r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?)?"
_REQUIREMENT = (
    rf"\s*(?:!\s*{_KEY}|{_KEY}(?:\s*(?:==?|!=)\s*{_VALUE}|\s*[<>]\s*[0-9]{{1,18}}"
    rf"|\s+(?:not)?in\s*\(\s*{_VALUE}\s*(?:,\s*{_VALUE}\s*)*\))?)\s*"
)
_SELECTOR = re.compile(rf"{_REQUIREMENT}(?:,{_REQUIREMENT})*")
_PLACE = re.compile(rf"(?:label|annotation):{_KEY}|env:[A-Za-z0-9._-]{{1,128}}")


@dataclass(frozen=True)
class Rules:
    """Where each field is read: `label:KEY`, `annotation:KEY` or `env:NAME`, the first that is there.

    `port` chooses among ports where no label does: a number, a range, or a port's name. `role_otherwise`
    stands for a value that is no role. An object with a label of `heads` that does not match belongs to
    another object and serves nothing itself. `bootstrap_ports` are defaults by engine.
    """

    places: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    port: str = ""
    role_otherwise: str = ""
    heads: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    bootstrap_ports: Mapping[str, int] = field(default_factory=dict)

    def with_places(self, places: Mapping[str, tuple[str, ...]]) -> Rules:
        """The same with other places for some fields."""
        return replace(self, places={**self.places, **places})

    def with_port(self, port: str) -> Rules:
        """The same with another choice of port, unless it is empty."""
        return replace(self, port=port) if port else self


@dataclass(frozen=True)
class Preset:
    """What is watched and how it is read, unless a flag says otherwise."""

    kind: Kind
    selector: str
    rules: Rules


_OWN = {name: (f"label:penstock/{name}", f"annotation:penstock/{name}") for name in FIELDS}
_DRAIN = {"drain": _OWN["drain"]}

# AIBrix: constants of its gateway plugins; a label counts before the annotation of the same name.
_AIBRIX = {
    "model": ("label:model.aibrix.ai/name", "annotation:model.aibrix.ai/name"),
    "port": ("label:model.aibrix.ai/port", "annotation:model.aibrix.ai/port"),
    "engine": ("label:model.aibrix.ai/engine", "annotation:model.aibrix.ai/engine"),
    "role": ("label:role-name",),
    "group": ("label:roleset-name",),
    "dp_size": ("env:data-parallel-size",),
    "bootstrap_port": ("annotation:model.aibrix.ai/sglang-bootstrap-port",),
    "config": ("annotation:model.aibrix.ai/config",),
}

PRESETS: Mapping[str, Preset] = {
    "none": Preset("pods", "penstock/discover=true", Rules(_OWN)),
    # A decode Service takes whole requests (its sidecar calls prefill): neutral, whatever its role says.
    "llm-d": Preset(
        "services", "llm-d.ai/role=decode", Rules({**_DRAIN, "group": ("label:llm-d.ai/model",)})
    ),
    "aibrix": Preset(
        "pods",
        "model.aibrix.ai/name",
        Rules(
            {**_DRAIN, **_AIBRIX},
            port="8000",
            role_otherwise="neutral",
            heads={
                "ray.io/node-type": re.compile("(?!worker$).*"),
                "stormservice.orchestration.aibrix.ai/pod-group-index": re.compile("0"),
            },
            bootstrap_ports={"sglang": 8998},
        ),
    ),
}


def parse_places(text: str) -> dict[str, tuple[str, ...]]:
    """Rules as `model=label:app/model,role=label:a|annotation:b`; a field without a place is not read.

    Raises:
        ValueError: naming every faulty entry.
    """
    places: dict[str, tuple[str, ...]] = {}
    faults = []
    for entry in filter(None, map(str.strip, text.split(","))):
        name, equals, listed = entry.partition("=")
        name, options = name.strip().replace("-", "_"), tuple(filter(None, map(str.strip, listed.split("|"))))
        if not equals:
            faults.append(f"{entry!r} is not field=label:KEY")
        elif name not in FIELDS:
            faults.append(f"{name!r} is no field; fields are {', '.join(FIELDS)}")
        elif name in places:
            faults.append(f"{name!r} is given twice; alternatives are joined with |")
        else:
            wrong = [option for option in options if not _PLACE.fullmatch(option)]
            faults += [f"{option!r} is none of label:KEY, annotation:KEY, env:NAME" for option in wrong]
            places[name] = options
    if faults:
        raise ValueError("; ".join(faults))
    return places


def check_selector(text: str) -> str:
    """The label selector as given.

    Raises:
        ValueError: Kubernetes would refuse it.
    """
    if text and not _SELECTOR.fullmatch(text):
        raise ValueError(
            "is not a label selector such as app=vllm,tier in (a, b),!canary; see kubectl's --selector"
        )
    return text


def parse_ports(text: str) -> tuple[int, ...] | None:
    """Ports as `8000`, `8000-8003` or `8000,8001`; None if it is a name.

    Raises:
        ValueError: numbers that are no ports, or more of them than `MAX_PORTS`.
    """
    if not re.fullmatch(r"[0-9]{1,5}(?:\s*[-,]\s*[0-9]{1,5})*", text):
        return None
    ports: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if "-" in last:
            raise ValueError(f"{part!r} is not a range of ports such as 8000-8003")
        low, high = int(first), int(last or first)
        if not 1 <= low <= high <= 65535:
            raise ValueError(f"port {part.strip()!r} is not a number or range within 1 to 65535")
        if high - low >= MAX_PORTS or len(ports) + high - low >= MAX_PORTS:
            raise ValueError(f"{text!r} names more than {MAX_PORTS} ports")
        ports += range(low, high + 1)
    if len({*ports}) != len(ports):
        raise ValueError(f"{text!r} names a port twice")
    return tuple(ports)
