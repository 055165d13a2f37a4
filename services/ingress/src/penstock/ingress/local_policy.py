"""Placement without a scheduler (DESIGN D5): sticky where it is cheap, least in-flight otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import xxhash

from penstock.common.model import Instance, InstanceId

# How many requests above the least loaded the preferred instance may hold: enough to keep a session or
# prefix together in normal traffic, too few to pile a hot one up while nobody sees the whole fleet.
SLACK_REQUESTS: Final = 4
_digest_of: Final = xxhash.xxh3_64_intdigest


def place_locally(
    candidates: Sequence[Instance],
    in_flight: Callable[[InstanceId], int],
    affinity: bytes,
    decision_id: str,
) -> Instance | None:
    """Choose by rendezvous of (session or first block hash; instance), bounded by load.

    `affinity` is empty for a request with nothing to keep together; equal loads are then spread by
    the decision id. None without candidates.
    """
    if not candidates:
        return None
    loads = [in_flight(instance.id) for instance in candidates]
    least = min(loads)
    seed = xxhash.xxh3_64_intdigest(affinity or decision_id.encode())
    if affinity:
        weights = _weights(candidates, seed)
        preferred = weights.index(max(weights))
        if loads[preferred] <= least + SLACK_REQUESTS:
            return candidates[preferred]
    idle = [instance for instance, load in zip(candidates, loads, strict=True) if load == least]
    weights = _weights(idle, seed)
    return idle[weights.index(max(weights))]


def _weights(instances: Sequence[Instance], seed: int) -> list[int]:
    return [_digest_of(instance.id.encode(), seed) for instance in instances]
