"""Which service answers for a model and owner: found by discovery, or mapped by hand (seed 004)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, Field

from penstock.common.config_keeping import ConfigWriter
from penstock.common.instances import InstanceTable
from penstock.common.live_config import MAPPING, Document, LiveConfig
from penstock.common.model import Instance
from penstock.common.orders import SERVICE_LABEL, Mapping, mapping_name, mapping_of, named_by
from penstock.ingress.admin.documents import ORIGIN, ROOT
from penstock.ingress.admin.operations import Answer, Call, Operation, Strict
from penstock.ingress.failures import GatewayError

OWNER = r"[A-Za-z0-9][A-Za-z0-9._-]*"


class MappingIn(Strict):
    """`service_name` is a Kubernetes service, a group, an instance, or a registered endpoint."""

    model: str = Field(min_length=1, max_length=512)
    owned_by: str = Field(min_length=1, max_length=128, pattern=rf"^{OWNER}$")
    service_name: str = Field(min_length=1, max_length=512)


class Force(Strict):
    """Whether to map to a service that is not known yet."""

    force: bool = Field(False, description="map to a service that no instance is known of")


class MappingKey(Strict):
    """Which mapping."""

    model: str = Field(min_length=1, max_length=512)
    owned_by: str = Field(min_length=1, max_length=128)


class RouteOut(BaseModel):
    """Who answers for a model and owner. `ready`: some instance of it takes requests; `created_at` of a
    mapping by hand, null for what was found."""

    model: str
    owned_by: str
    service_name: str
    source: Literal["manual", "discovered"]
    endpoints: list[str]
    ready: bool
    created_at: str | None = None


class RoutesOut(BaseModel):
    """All of them, by model and owner."""

    routes: list[RouteOut]
    total: int


class MappingDeleted(BaseModel):
    """The mapping is gone; what discovery finds for the key counts again."""

    deleted: bool = True
    model: str
    owned_by: str


class Routing:
    """The operations of `/admin/api/routing`."""

    def __init__(self, table: InstanceTable, config: LiveConfig, writer: ConfigWriter) -> None:
        self._table, self._config, self._writer = table, config, writer

    def operations(self) -> Iterator[Operation]:
        """What can be asked."""
        path = f"{ROOT}/routing"
        yield Operation("GET", path, "List routing mappings", self._list, {200: RoutesOut})
        yield Operation(
            "POST",
            path,
            "Map a model and owner to a service",
            self._add,
            {200: RouteOut, 201: RouteOut},
            body=MappingIn,
            query=Force,
            faults=(404,),
        )
        yield Operation(
            "DELETE",
            path,
            "Delete a mapping made by hand",
            self._delete,
            {200: MappingDeleted},
            query=MappingKey,
            faults=(404,),
        )

    async def _list(self, call: Call) -> Answer:
        routes = self._discovered()
        for document in self._config.documents(MAPPING).values():
            mapping = mapping_of(document)
            if mapping is not None:
                routes[mapping.model, mapping.owned_by] = self._manual(mapping, document)
        listed = [routes[key] for key in sorted(routes)]
        return Answer(200, RoutesOut(routes=listed, total=len(listed)))

    async def _add(self, call: Call) -> Answer:
        body: MappingIn = call.body
        known = any(named_by(instance, body.service_name) for instance in self._table.instances())
        if not known and not call.query.force:
            wanted = "instance, group, endpoint or Kubernetes service"
            text = f"service not found: no {wanted} is named {body.service_name!r}"
            raise GatewayError("not_found", text, param="service_name")
        mapping = Mapping(body.model, body.owned_by, body.service_name)
        name = mapping_name(mapping.model, mapping.owned_by)
        before = self._config.get(MAPPING, name)
        document = await self._writer.put(MAPPING, name, body.model_dump(), call.by, ORIGIN)
        return Answer(200 if before else 201, self._manual(mapping, document))

    async def _delete(self, call: Call) -> Answer:
        model, owned_by = call.query.model, call.query.owned_by
        if not await self._writer.delete(MAPPING, mapping_name(model, owned_by), call.by, ORIGIN):
            text = f"there is no mapping by hand of model {model!r} and owner {owned_by!r}"
            raise GatewayError("not_found", text, param="model")
        return Answer(200, MappingDeleted(model=model, owned_by=owned_by))

    def _manual(self, mapping: Mapping, document: Document) -> RouteOut:
        named = [i for i in self._table.instances() if named_by(i, mapping.service_name)]
        serving = [instance for instance in named if instance.serves(mapping.model)]
        return RouteOut(
            model=mapping.model,
            owned_by=mapping.owned_by,
            service_name=mapping.service_name,
            source="manual",
            endpoints=sorted(instance.endpoint.url for instance in named),
            ready=any(instance.takes_work for instance in serving),
            created_at=document.changed_at,
        )

    def _discovered(self) -> dict[tuple[str, str], RouteOut]:
        found: dict[tuple[str, str], list[Instance]] = {}
        for instance in self._table.instances():
            for model in (*instance.models, *instance.lora_adapters):
                found.setdefault((model, instance.owned_by(model)), []).append(instance)
        return {
            (model, owner): RouteOut(
                model=model,
                owned_by=owner,
                service_name=", ".join(sorted({_service(instance) for instance in instances})[:8]),
                source="discovered",
                endpoints=sorted(instance.endpoint.url for instance in instances),
                ready=any(instance.takes_work for instance in instances),
            )
            for (model, owner), instances in found.items()
        }


def _service(instance: Instance) -> str:
    return instance.labels.get(SERVICE_LABEL) or instance.group or instance.id
