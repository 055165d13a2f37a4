"""A described Kubernetes object, by the rules, as instances: or the reason why it is none."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from penstock.common.codec import DecodeError, decode_record, encode_record
from penstock.common.model import Endpoint, Instance, InstanceState, Role
from penstock.discovery.allowed import AllowedHosts
from penstock.discovery.kubernetes_objects import Described, Place, Port, describe
from penstock.discovery.kubernetes_rules import MAX_PORTS, Kind, Rules, parse_ports

MAX_LABELS = 64
MAX_VALUE_CHARACTERS = 512
MAX_CONFIG_CHARACTERS = 4 * 1024
# Of the 64 KiB of a record, 56 are for the names that probes find.
MAX_RECORD_BYTES = 7 * 1024
# Names of ports that serve requests where several are declared.
SERVING_PORTS = ("http", "https")
_YES, _NO = frozenset({"true", "1", "yes"}), frozenset({"", "false", "0", "no"})


@dataclass(frozen=True)
class Found:
    """What an object is: some instances, or none because of `skipped`, or none without fault."""

    instances: tuple[Instance, ...] = ()
    skipped: str = ""


def find(kind: Kind, data: bytes, rules: Rules, allowed: AllowedHosts) -> Found:
    """The instances of one object of the API; never raises for what the object says."""
    try:
        described = describe(kind, data)
        if not described.places or not _is_head(described, rules):
            return Found()
        values = _values(described, rules)
        found = [i for place in described.places for i in _instances(place, described, values, rules)]
        refused = next((why for i in found if (why := allowed.refusal(i.endpoint.host))), "")
        return Found(skipped=refused) if refused else Found(tuple(map(_checked, found)))
    except DecodeError as exc:
        return Found(skipped=f"it cannot be read as one of {kind}: {exc.__cause__}")
    except ValueError as exc:
        return Found(skipped=str(exc))


def _is_head(described: Described, rules: Rules) -> bool:
    labels = described.meta.labels or {}
    return all(key not in labels or pattern.fullmatch(labels[key]) for key, pattern in rules.heads.items())


def _values(described: Described, rules: Rules) -> dict[str, str]:
    """Every field that the object names, with its text."""
    held: dict[str, Mapping[str, str]] = {
        "label": described.meta.labels or {},
        "annotation": described.meta.annotations or {},
        "env": described.variables,
    }
    values = {}
    for name, places in rules.places.items():
        for place in places:
            where, _, key = place.partition(":")
            if text := held[where].get(key, "").strip():
                values[name] = _bounded(name, text)
                break
    return values


def _bounded(name: str, text: str) -> str:
    bound = MAX_CONFIG_CHARACTERS if name == "config" else MAX_VALUE_CHARACTERS
    if len(text) > bound:
        raise ValueError(f"its {name} has {len(text)} characters, over {bound}")
    return text


def _instances(place: Place, described: Described, values: Mapping[str, str], rules: Rules) -> list[Instance]:
    """One instance, or one per data-parallel rank where several ports serve."""
    ports, size = _serving(place, values, rules), _number("dp_size", values, 1, 2**20) or 1
    rank = _number("dp_rank", values, 0, 2**20)
    if rank is None and len(ports) == 1 and size > 1:
        ports = _following(ports[0], size)
    if rank is not None and (len(ports) > 1 or rank >= size):
        raise ValueError(f"its dp_rank {rank} does not fit {len(ports)} ports and a dp_size of {size}")
    if 1 < len(ports) != size > 1:
        raise ValueError(f"its dp_size is {size}, but {len(ports)} ports are chosen")
    base = _base(place, described, values, rules)
    if len(ports) == 1:
        endpoint = _endpoint(place, ports[0], values)
        whole = msgspec.structs.replace(base, endpoint=endpoint, dp_rank=rank or 0, dp_size=size)
        return [whole]
    return [
        msgspec.structs.replace(
            base,
            id=f"{place.id}_dp{i}",
            endpoint=_endpoint(place, port, values),
            dp_rank=i,
            dp_size=len(ports),
        )
        for i, port in enumerate(ports)
    ]


def _following(port: Port, size: int) -> list[Port]:
    if size > MAX_PORTS or port.number + size - 1 > 65535:
        raise ValueError(f"its dp_size {size} from port {port.number} on is over {MAX_PORTS} ports or 65535")
    return [Port(port.number + i, port.name, port.https) for i in range(size)]


def _base(place: Place, described: Described, values: Mapping[str, str], rules: Rules) -> Instance:
    state, reason = place.state, place.reason
    if _yes("drain", values) and state is not InstanceState.DRAINING:
        state, reason = InstanceState.DRAINING, "it is marked to be drained"
    engine = values.get("engine", "")
    bootstrap_port = _number("bootstrap_port", values, 1, 65535)
    return Instance(
        id=place.id,
        endpoint=Endpoint(place.host, 1),
        models=_names("model", values),
        lora_adapters=_names("lora", values),
        owner=values.get("owner", ""),
        role=_role(values.get("role", ""), rules),
        engine=engine,
        group=values.get("group", ""),
        kv_address=_kv_address(place.host, values.get("kv_address", "")),
        bootstrap_port=bootstrap_port or rules.bootstrap_ports.get(engine.lower(), 0),
        labels=_labels(described),
        weight=_weight(values.get("weight", "")),
        config=values.get("config", ""),
        state=state,
        reason=reason,
    )


def _serving(place: Place, values: Mapping[str, str], rules: Rules) -> list[Port]:
    """The ports by label, else by rule, else the one that is declared."""
    wanted = values.get("port") or rules.port
    if wanted:
        numbers = parse_ports(wanted)
        if numbers is not None:
            declared = {port.number: port for port in place.ports}
            return [declared.get(number, Port(number)) for number in numbers]
        named = [port for port in place.ports if port.name == wanted]
    else:
        distinct = list({port.number: port for port in place.ports}.values())
        named = distinct if len(distinct) == 1 else [p for p in distinct if p.name in SERVING_PORTS]
    if len(named) == 1:
        return named
    declared_text = ", ".join(f"{p.number}{f' ({p.name})' if p.name else ''}" for p in place.ports[:16])
    raise ValueError(
        f"which port serves is not known: it declares {declared_text or 'none'}"
        f"{f', and {wanted!r} is wanted' if wanted else ''}; --discovery-kubernetes-port or a label can say"
    )


def _endpoint(place: Place, port: Port, values: Mapping[str, str]) -> Endpoint:
    scheme = values.get("scheme", "https" if port.https else "http").lower()
    if scheme not in ("http", "https"):
        raise ValueError(f"its scheme {scheme!r} is neither http nor https")
    return Endpoint(place.host, port.number, scheme)


def _kv_address(host: str, text: str) -> str:
    """A port alone is one of the instance's own host."""
    if not text.isdigit():
        return text
    return f"[{host}]:{text}" if ":" in host else f"{host}:{text}"


def _role(text: str, rules: Rules) -> Role:
    try:
        return Role(text.lower() or Role.NEUTRAL)
    except ValueError:
        if rules.role_otherwise:
            return Role(rules.role_otherwise)
    raise ValueError(f"its role {text!r} is none of {', '.join(Role)}")


def _names(name: str, values: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, map(str.strip, values.get(name, "").split(",")))))


def _number(name: str, values: Mapping[str, str], low: int, high: int) -> int | None:
    text = values.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and low <= int(text) <= high):
        raise ValueError(f"its {name} {text!r} is not a number from {low} to {high}")
    return int(text)


def _weight(text: str) -> float:
    try:
        weight = float(text or 1)
    except ValueError:
        weight = math.nan
    if not 0 < weight <= 1e6:
        raise ValueError(f"its weight {text!r} is not a number above 0 and up to a million")
    return weight


def _yes(name: str, values: Mapping[str, str]) -> bool:
    text = values.get(name, "").lower()
    if text in _YES:
        return True
    if text in _NO:
        return False
    raise ValueError(f"its {name} {text!r} is neither true nor false")


def _labels(described: Described) -> dict[str, str]:
    labels = described.meta.labels or {}
    return {key: labels[key] for key in sorted(labels)[:MAX_LABELS]}


def _checked(instance: Instance) -> Instance:
    """The instance, as every reader of its record decodes it."""
    record = encode_record(instance)
    if len(record) > MAX_RECORD_BYTES:
        raise ValueError(f"its record would have {len(record)} bytes, over {MAX_RECORD_BYTES}")
    return decode_record(Instance, record)
