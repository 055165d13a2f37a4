"""Placement without a scheduler (DESIGN D5): sticky where it is cheap, least in-flight otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import xxhash

from penstock.common.model import Instance, InstanceId

# How many requests above the least loaded the preferred instance may hold: enough to keep a session or
# prefix together in normal traffic, too few to pile a hot one up while nobody sees the whole fleet.
SLACK_REQUESTS = 4


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
    if affinity:
        preferred = max(range(len(loads)), key=lambda i: _weight(affinity, candidates[i].id))
        if loads[preferred] <= least + SLACK_REQUESTS:
            return candidates[preferred]
    key = affinity or decision_id.encode()
    idle = [instance for instance, load in zip(candidates, loads, strict=True) if load == least]
    return max(idle, key=lambda instance: _weight(key, instance.id))


def _weight(key: bytes, instance_id: InstanceId) -> int:
    return xxhash.xxh3_64_intdigest(instance_id.encode(), xxhash.xxh3_64_intdigest(key))
