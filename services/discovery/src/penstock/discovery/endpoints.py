"""The static endpoint list, as a person writes it: `[role@]host:port`, comma-separated."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator

from penstock.common.model import Endpoint, Instance, Role, Scheme

_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_BRACKETED = re.compile(r"\[([^\[\]]+)\](?::(.*))?")
MAX_HOST_CHARACTERS = 253


def listed_file(text: str) -> str:
    """Path of the file that a setting such as `@/etc/engines.txt` names; empty if it is a list."""
    stripped = text.strip()
    return stripped[1:].strip() if stripped.startswith("@") else ""


def parse_endpoints(text: str) -> tuple[Instance, ...]:
    """The instances of a list such as `127.0.0.1:8000,prefill@http://engine-a:8000,[::1]:8001`.

    An instance's id is its `host:port`; empty entries are skipped.

    Raises:
        ValueError: naming every faulty entry.
    """
    instances: dict[str, Instance] = {}
    faults = []
    for entry in _entries(text):
        try:
            instance = _instance(entry)
        except ValueError as exc:
            faults.append(f"{entry!r}: {exc}")
            continue
        if instance.id in instances:
            faults.append(f"{entry!r}: {instance.id} is listed twice")
        instances[instance.id] = instance
    if faults:
        raise ValueError("; ".join(faults))
    return tuple(instances.values())


def parse_listing(
    text: str, parse_record: Callable[[bytes], tuple[Instance, ...]]
) -> tuple[dict[str, Instance], dict[str, str]]:
    """(instances by id, fault by line) of a file that lists engines.

    A line holds endpoints as `parse_endpoints` takes them, or one record as a JSON object, which
    `parse_record` reads (raising ValueError); `#` begins a comment. A faulty line costs itself only.
    """
    instances: dict[str, Instance] = {}
    faults: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        try:
            found = parse_record(line.encode()) if line[:1] == "{" else parse_endpoints(line.split("#")[0])
        except ValueError as exc:
            faults[f"line {number}"] = str(exc)
            continue
        for instance in found:
            if instance.id in instances:
                faults[f"line {number}"] = f"{instance.id} is listed twice"
            else:
                instances[instance.id] = instance
    return instances, faults


def _entries(text: str) -> Iterator[str]:
    return (entry for part in text.split(",") if (entry := part.strip()))


def _instance(entry: str) -> Instance:
    role_text, at, address = entry.rpartition("@")
    role = _role(role_text) if at else Role.NEUTRAL
    scheme, rest = _scheme(address)
    host, port = _split(rest)
    endpoint = Endpoint(_host(host), _port(port), scheme)
    return Instance(id=str(endpoint), endpoint=endpoint, role=role)


def _role(text: str) -> Role:
    try:
        return Role(text.lower())
    except ValueError:
        raise ValueError(f"role {text!r} is none of {', '.join(Role)}") from None


def _scheme(address: str) -> tuple[Scheme, str]:
    name, mark, rest = address.rpartition("://")
    scheme: Scheme = "https" if name.lower() == "https" else "http"
    if mark and scheme != name.lower():
        raise ValueError(f"scheme {name!r} is neither http nor https")
    rest = rest.removesuffix("/")
    if "/" in rest:
        raise ValueError("a path is not part of an endpoint, host:port is")
    return scheme, rest


def _split(address: str) -> tuple[str, str]:
    bracketed = _BRACKETED.fullmatch(address)
    if bracketed:
        return bracketed[1], bracketed[2] or ""
    host, colon, port = address.rpartition(":")
    if not colon:
        return address, ""
    if ":" in host:
        raise ValueError("an IPv6 address goes in brackets, as in [::1]:8000")
    return host, port


def _host(text: str) -> str:
    if ":" in text:
        return _ipv6(text)
    labels = text.lower().removesuffix(".").split(".")
    if labels[-1].isdigit():
        try:
            return str(ipaddress.IPv4Address(text))
        except ValueError:
            raise ValueError(f"{text!r} is not an IPv4 address") from None
    if len(text) > MAX_HOST_CHARACTERS or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{text!r} is not a host name" if text else "the host is missing")
    return ".".join(labels)


def _ipv6(text: str) -> str:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise ValueError(f"{text!r} is not an IPv6 address") from None
    if address.scope_id:
        raise ValueError("an IPv6 zone cannot be part of an endpoint")
    return str(address)


def _port(text: str) -> int:
    if not text:
        raise ValueError("the port is missing")
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise ValueError(f"port {text!r} is not a number from 1 to 65535")
    return int(text)
