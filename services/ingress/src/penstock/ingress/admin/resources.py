"""The kinds of live configuration that the admin API reads and writes, each with its model.

To add one: a line in RESOURCES. Everything else (paths, validation, versions, OpenAPI) follows from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, model_validator

from penstock.common.live_config import KEY, MIRROR, PROFILE, ROUTE, USER
from penstock.common.mirroring import MirrorConfig
from penstock.common.profiles import ModelProfiles
from penstock.ingress.api_keys import ApiKey
from penstock.ingress.limit_settings import UserRecord
from penstock.ingress.methods import fault_of
from penstock.ingress.route_config import RouteDocument, masked


@dataclass(frozen=True)
class Resource:
    """Documents of `kind` under `/admin/api/<path>/{name}`; `model` is what a document's value has to be.

    `singleton`: there is one document, without a name, at `/admin/api/<path>`. `masked` takes secrets out of
    a value before it is answered.
    """

    path: str
    kind: str
    model: type[BaseModel]
    what: str
    singleton: bool = False
    masked: Callable[[Any], Any] = lambda value: value


class ProfileDocument(ModelProfiles):
    """The profiles of one model."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if fault := fault_of(self, "", staged=False):
            raise ValueError(fault)
        return self


RESOURCES: tuple[Resource, ...] = (
    Resource("mirror", MIRROR, MirrorConfig, "mirror configuration", singleton=True),
    Resource("routes", ROUTE, RouteDocument, "the routes", singleton=True, masked=masked),
    Resource("profiles", PROFILE, ProfileDocument, "profile document"),
    Resource("users", USER, UserRecord, "user record"),
    Resource("keys", KEY, ApiKey, "API key"),
)
