"""The admin API of one ingress: a bus client of its own, what it follows, and the operations on it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

from penstock.common.adapters.memory_bus import MemoryBroker, MemoryBus
from penstock.common.bus import Bus
from penstock.common.config_keeping import ConfigWriter, follow_config
from penstock.common.event_log import EventWriter
from penstock.common.instances import InstanceTable
from penstock.common.live_config import PROFILE, LiveConfig
from penstock.common.messages import ScheduleRequest
from penstock.common.profile_sources import ProfileSources
from penstock.common.subjects import INSTANCES
from penstock.common.user_hashes import UserHashes
from penstock.ingress.admin.access import Access
from penstock.ingress.admin.discovering import Discovering
from penstock.ingress.admin.documents import ROOT, Documents
from penstock.ingress.admin.explaining import Explaining, Hashing
from penstock.ingress.admin.fleet import Fleet
from penstock.ingress.admin.openapi import document
from penstock.ingress.admin.operations import Answer, Call, Operation
from penstock.ingress.admin.resources import RESOURCES
from penstock.ingress.admin.router import Router
from penstock.ingress.admin.routing import Routing
from penstock.ingress.disaggregation.protocols import Method
from penstock.ingress.methods import Methods

log = logging.getLogger(__name__)

API_VERSION = "1"


@dataclass(frozen=True)
class Division:
    """What the settings say of disaggregation; `profiles` is the profiles' file, or why it cannot be read."""

    protocol: str = ""
    staged: bool = False
    profiles: Callable[[], bytes | str] = bytes


class AdminService:
    """What the admin API knows and does; `router` answers requests."""

    def __init__(
        self,
        bus: Bus,
        events: EventWriter | None,
        access: Access,
        hashing: Hashing = Hashing(),  # noqa: B008  # frozen
        users: UserHashes | None = None,
        division: Division = Division(),  # frozen
    ) -> None:
        """`users` gives what stands for a user in the log."""
        self._bus, self.hashing = bus, hashing
        self.table, self.config = InstanceTable(), LiveConfig(keeps=True)
        self._division = division
        self.writer = ConfigWriter(bus, self.config, events, users=users)
        self.router = Router(list(operations(self)), access)

    def loops(self) -> Iterator[tuple[str, Coroutine[Any, Any, None]]]:
        """The eternal loops, by name."""
        yield "admin-config", follow_config(self._bus, self.config)
        yield "admin-registry", self._follow_registry()

    @property
    def bus(self) -> Bus:
        """The admin API's own connection."""
        return self._bus

    def method_of(self, request: ScheduleRequest) -> Method | None:
        """How the workers would divide a request. Raises GatewayError where nobody says how."""
        methods = Methods(self._division.protocol, staged=self._division.staged, table=self.table)
        sources = ProfileSources(methods.fault)
        sources.take_documents(self.config.documents(PROFILE))
        sources.take_file(self._division.profiles())
        sources.take_instances(self.table.instances())
        methods.configure(sources.models())
        return methods.of(request)

    async def _follow_registry(self) -> None:
        async for event in self._bus.watch(INSTANCES):
            self.table.apply(event)


def api_document() -> dict[str, Any]:
    """The OpenAPI document, for whoever has no gateway at hand."""
    nobody = AdminService(MemoryBus(MemoryBroker()), None, Access(lambda: ""))
    return document(nobody.router.operations[:-1], API_VERSION)


def operations(service: AdminService) -> Iterator[Operation]:
    """The whole admin API."""
    table, config, writer = service.table, service.config, service.writer
    own = [
        *Fleet(table, config, writer).operations(),
        *Routing(table, config, writer).operations(),
        *Discovering(service.bus).operations(),
        *Explaining(service.bus, table, service.hashing, service.method_of).operations(),
    ]
    for resource in RESOURCES:
        own += Documents(resource, config, writer).operations()
    yield from own

    async def tell(call: Call) -> Answer:
        return Answer(200, told)

    told = document(own, API_VERSION)
    yield Operation("GET", f"{ROOT}/openapi.json", "This document", tell, {})
