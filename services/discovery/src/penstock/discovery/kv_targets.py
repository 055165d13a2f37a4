"""Where an instance's KV-cache events are published: labels of its record, else ports for all instances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from penstock.common.model import Instance

# `tcp://host:port`, `host:port` or a port of the instance's own host.
EVENTS_LABEL, REPLAY_LABEL = "penstock/kv-events", "penstock/kv-events-replay"
# AIBrix's: "true" on a pod whose engine publishes at these ports.
AIBRIX_LABEL = "model.aibrix.ai/kv-events-enabled"
AIBRIX_PORTS = 5557, 5558


@dataclass(frozen=True)
class KvTarget:
    """One publisher: `events` is its PUB socket, `replay` its ROUTER socket or None, as (host, port).
    `models` are the names that prompts of the base model come under."""

    events: tuple[str, int]
    replay: tuple[str, int] | None
    models: tuple[str, ...]
    dp_rank: int | None = None


def target_of(instance: Instance, ports: tuple[int, int] = (0, 0)) -> KvTarget | None:
    """The publisher of an instance, None if it is not known to have one. `ports` (events, replay; 0: none)
    are those of instances whose record names none; of several dp ranks, each takes the next port, as in vLLM.

    Raises:
        ValueError: a label that is no address.
    """
    labels, host = instance.labels, instance.endpoint.host
    events = _labelled(labels, EVENTS_LABEL, host)
    replay = _labelled(labels, REPLAY_LABEL, host)
    if events is None:
        if labels.get(AIBRIX_LABEL) == "true":
            ports = AIBRIX_PORTS
        if not ports[0]:
            return None
        events = _shifted(host, ports[0], instance.dp_rank)
        replay = replay or (_shifted(host, ports[1], instance.dp_rank) if ports[1] else None)
    rank = instance.dp_rank if instance.dp_size > 1 else None
    return KvTarget(events, replay, instance.models, rank)


def _labelled(labels: Mapping[str, str], name: str, host: str) -> tuple[str, int] | None:
    text = labels.get(name, "").strip()
    if not text:
        return None
    scheme, mark, rest = text.rpartition("://")
    if mark and scheme != "tcp":
        raise ValueError(f"label {name}: {scheme[:32]}:// is not tcp://")
    before, colon, port = rest.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and 1 <= int(port) <= 65535):
        raise ValueError(f"label {name} is neither tcp://host:port nor a port")
    named = before.removeprefix("[").removesuffix("]")
    if colon and (not named or "*" in named or "/" in named):
        raise ValueError(f"label {name} names no host that can be connected to")
    return named or host, int(port)


def _shifted(host: str, port: int, rank: int) -> tuple[str, int]:
    if port + rank > 65535:
        raise ValueError(f"port {port} + dp rank {rank} is over 65535")
    return host, port + rank
