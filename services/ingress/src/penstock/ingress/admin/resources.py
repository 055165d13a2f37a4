"""The kinds of live configuration that the admin API reads and writes, each with its model.

To add one: a line in RESOURCES. Everything else (paths, validation, versions, OpenAPI) follows from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel

from penstock.common.live_config import MIRROR
from penstock.common.mirroring import MirrorConfig


@dataclass(frozen=True)
class Resource:
    """Documents of `kind` under `/admin/api/<path>/{name}`; `model` is what a document's value has to be.

    `singleton`: there is one document, without a name, at `/admin/api/<path>`.
    """

    path: str
    kind: str
    model: type[BaseModel]
    what: str
    singleton: bool = False


RESOURCES: tuple[Resource, ...] = (
    Resource("mirror", MIRROR, MirrorConfig, "mirror configuration", singleton=True),
)
