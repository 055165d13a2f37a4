"""A way that a request can take from the load generator to an engine, and what it uses meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from penstock.cli.bench.clients import Address

DIRECT, NGINX, LOCAL = "direct", "nginx", "local"
LEAST_REQUEST, PREFIX_CACHE, CACHE_AWARE = "least-request", "prefix-cache", "cache-aware"
# Placed by a scheduler.
FULL = (LEAST_REQUEST, PREFIX_CACHE, CACHE_AWARE)
OWN = (LOCAL, *FULL)
WAYS = (DIRECT, NGINX, *OWN)
# Parts of a way, as they stand in its `parts`.
GATEWAY, SCHEDULER, NATS, REST = "gateway", "scheduler", "nats", "rest"


@dataclass(frozen=True)
class Way:
    """Where to connect, for streams too if that differs, and the processes that serve, by part.

    `headers` are lines for each request, `mark` is in the head of each answer that came this way.
    """

    name: str
    addresses: Sequence[Address]
    stream_addresses: Sequence[Address] = ()
    headers: str = ""
    mark: bytes = b""
    parts: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def for_streams(self) -> Sequence[Address]:
        """Where streams are asked for."""
        return self.stream_addresses or self.addresses
