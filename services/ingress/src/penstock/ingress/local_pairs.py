"""Placement of divided requests without a scheduler: pairs of one group, each part by the local policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.common.messages import Mode, Placement, ScheduleRequest, Stage
from penstock.common.model import Instance, InstanceId, Role
from penstock.ingress.local_policy import place_locally

LOCAL = "local"
Group = tuple[str, str]
InFlightOn = Callable[[InstanceId], int]


def place_pair_locally(
    usable: Sequence[Instance], in_flight: InFlightOn, affinity: bytes, request: ScheduleRequest
) -> Placement | None:
    """Where a request with a mode goes, as a scheduler would say it; None if it can go nowhere. Without a
    pair it goes undivided to one instance."""
    name = request.decision_id
    decodes = [one for one in usable if one.role is Role.DECODE]
    if request.stage is Stage.DECODE:
        groups = {kv_group(one) for one in usable if one.id == request.prefill_instance}
        group = next(iter(groups), (request.prefill_group, ""))
        decode = _of_group(decodes, group, in_flight, name)
        return None if decode is None else Placement(name, decode.id, request.prefill_instance, LOCAL)
    groups = {kv_group(one) for one in decodes}
    prefills = [one for one in usable if one.role is Role.PREFILL and kv_group(one) in groups]
    prefill = place_locally(prefills, in_flight, affinity, name)
    if prefill is None:
        whole = place_locally(able_alone(usable), in_flight, affinity, name)
        return None if whole is None else Placement(name, whole.id, policy=LOCAL)
    if request.mode is Mode.PD_STAGED:
        return Placement(name, prefill.id, prefill.id, LOCAL)
    decode = _of_group(decodes, kv_group(prefill), in_flight, name)
    return None if decode is None else Placement(name, decode.id, prefill.id, LOCAL)


def able_alone(usable: Sequence[Instance]) -> list[Instance]:
    """Who does all of a request: neutral instances; where there is none, those that decode, which compute
    prompts too if they must."""
    neutral = [one for one in usable if one.role is Role.NEUTRAL]
    return neutral or [one for one in usable if one.role is Role.DECODE]


def kv_group(instance: Instance) -> Group:
    """Among whom KV can be exchanged: instances of the same `group`, or, without one, of the same engine."""
    return (instance.group, "") if instance.group else ("", instance.engine)


def _of_group(decodes: Sequence[Instance], group: Group, in_flight: InFlightOn, name: str) -> Instance | None:
    """`group` is ("", "") where nothing is known of it."""
    partners = [one for one in decodes if group == ("", "") or kv_group(one) == group]
    return place_locally(partners, in_flight, b"", name)
