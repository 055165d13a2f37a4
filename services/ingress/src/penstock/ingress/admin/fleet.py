"""Instances as administrators see them: listed, with the reason why one takes no requests; drained."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel, Field

from penstock.common.config_keeping import ConfigWriter
from penstock.common.instances import InstanceTable
from penstock.common.live_config import DRAIN, LiveConfig
from penstock.common.model import Instance, InstanceState
from penstock.common.orders import DRAINED_BY, MAX_REASON
from penstock.ingress.admin.documents import ORIGIN, ROOT
from penstock.ingress.admin.operations import Answer, Call, Operation, Strict
from penstock.ingress.failures import GatewayError


class DrainIn(Strict):
    """Why, in words for whoever looks at the instance."""

    reason: str = Field("", max_length=MAX_REASON)


class DrainOut(BaseModel):
    """An administrator's order to take no new requests."""

    by: str
    changed_at: str
    reason: str


class InstanceOut(BaseModel):
    """An instance of the registry. `reason` says why it takes no requests, or why that is in doubt; `drain`
    is there while an administrator drains it, which `state` follows within a second."""

    id: str
    endpoint: str
    models: list[str]
    lora_adapters: list[str]
    owners: dict[str, str]
    role: str
    engine: str
    group: str
    source: str
    state: str
    takes_requests: bool
    reason: str
    drain: DrainOut | None = None


class InstancesOut(BaseModel):
    """All instances, by id."""

    instances: list[InstanceOut]
    total: int
    taking_requests: int


class Fleet:
    """The operations on instances."""

    def __init__(self, table: InstanceTable, config: LiveConfig, writer: ConfigWriter) -> None:
        self._table, self._config, self._writer = table, config, writer

    def operations(self) -> Iterator[Operation]:
        """What can be asked."""
        root = f"{ROOT}/instances"
        one = f"{root}/{{instance}}"
        yield Operation(
            "GET",
            root,
            "List instances, with the reason why one takes no requests",
            self._list,
            {200: InstancesOut},
        )
        yield Operation("GET", one, "Show an instance", self._get, {200: InstanceOut}, faults=(404,))
        yield Operation(
            "POST",
            f"{one}/drain",
            "Give an instance no new requests; running ones finish",
            self._drain,
            {200: InstanceOut},
            body=DrainIn,
            body_required=False,
            faults=(404, 409),
        )
        yield Operation(
            "POST",
            f"{one}/undrain",
            "Take a drain back",
            self._undrain,
            {200: InstanceOut},
            faults=(404, 409),
        )

    async def _list(self, call: Call) -> Answer:
        held = sorted(self._table.instances(), key=lambda instance: instance.id)
        listed = [self._shown(instance) for instance in held]
        taking = sum(instance.takes_requests for instance in listed)
        return Answer(200, InstancesOut(instances=listed, total=len(listed), taking_requests=taking))

    async def _get(self, call: Call) -> Answer:
        return Answer(200, self._shown(self._held(call)))

    async def _drain(self, call: Call) -> Answer:
        instance = self._held(call)
        value = {"reason": call.body.reason} if call.body and call.body.reason else {}
        await self._writer.put(DRAIN, instance.id, value, call.by, ORIGIN)
        return Answer(200, self._shown(instance))

    async def _undrain(self, call: Call) -> Answer:
        # Of one that is gone the order may stand, and has to be taken back all the same.
        name = call.params["instance"]
        instance = self._table.get(name)
        if not await self._writer.delete(DRAIN, name, call.by, ORIGIN):
            self._held(call)
            text = f"instance {name!r} is not drained by an administrator"
            if instance is not None and instance.state is InstanceState.DRAINING:
                text += f"; it drains because {instance.reason or 'its source says so'}"
            raise GatewayError("version_conflict", text, param="instance")
        if instance is None:
            return Answer(200, {"id": name, "drain": None})
        return Answer(200, self._shown(instance))

    def _held(self, call: Call) -> Instance:
        name = call.params["instance"]
        instance = self._table.get(name)
        if instance is None:
            raise GatewayError("not_found", f"there is no instance {name[:200]!r}", param="instance")
        return instance

    def _shown(self, instance: Instance) -> InstanceOut:
        document = self._config.get(DRAIN, instance.id)
        drain = None
        if document is not None:
            said = document.value.get("reason", "") if isinstance(document.value, dict) else ""
            drain = DrainOut(by=document.by, changed_at=document.changed_at, reason=str(said))
        state, reason, takes = instance.state, instance.reason, instance.takes_work
        if drain is not None and takes:
            # The order is older than the record by the moment that discovery takes to carry it out.
            takes, reason = False, f"{DRAINED_BY}{drain.by}, not carried out yet"
        return InstanceOut(
            id=instance.id,
            endpoint=instance.endpoint.url,
            models=list(instance.models),
            lora_adapters=list(instance.lora_adapters),
            owners={model: instance.owned_by(model) for model in (*instance.models, *instance.lora_adapters)},
            role=str(instance.role),
            engine=instance.engine,
            group=instance.group,
            source=instance.source,
            state=str(state),
            takes_requests=takes,
            reason=reason,
            drain=drain,
        )
