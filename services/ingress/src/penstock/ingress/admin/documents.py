"""Reading, changing and rolling back documents of live configuration: the same operations for each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pydantic import BaseModel, Field

from penstock.common.config_keeping import ConfigWriter
from penstock.common.live_config import Document, LiveConfig
from penstock.ingress.admin.operations import Answer, Call, ExpectedVersion, Operation, validated
from penstock.ingress.admin.resources import Resource
from penstock.ingress.failures import GatewayError

ORIGIN = "admin"
ROOT = "/admin/api"


class DocumentOut(BaseModel):
    """A document with its version, and who wrote it when and through what."""

    name: str
    version: int
    by: str
    changed_at: str
    origin: str
    value: Any


class DocumentsOut(BaseModel):
    """All documents of a kind, by name."""

    documents: list[DocumentOut]
    total: int


class VersionsOut(BaseModel):
    """What a document was, the latest first; `deleted` says that it is no more."""

    deleted: bool
    versions: list[DocumentOut]


class DeletedOut(BaseModel):
    """It is gone."""

    deleted: bool = True
    name: str


class Rollback(ExpectedVersion):
    """Which version to go back to."""

    version: int = Field(ge=1, le=2**53, description="one of the versions that are kept")


def shown(name: str, document: Document, masked: Callable[[Any], Any]) -> DocumentOut:
    """A document as it is answered: without secrets."""
    return DocumentOut(
        name=name,
        version=document.version,
        by=document.by,
        changed_at=document.changed_at,
        origin=document.origin,
        value=masked(document.value),
    )


class Documents:
    """The operations on one resource."""

    def __init__(self, resource: Resource, config: LiveConfig, writer: ConfigWriter) -> None:
        self._resource, self._config, self._writer = resource, config, writer

    def operations(self) -> Iterator[Operation]:
        """What can be asked."""
        resource = self._resource
        root = f"{ROOT}/{resource.path}"
        one = root if resource.singleton else f"{root}/{{name}}"
        what = resource.what
        if not resource.singleton:
            yield Operation("GET", root, f"List {what}", self._list, {200: DocumentsOut})
        yield Operation("GET", one, f"Show {what}", self._get, {200: DocumentOut}, faults=(404,))
        yield Operation(
            "PUT",
            one,
            f"Write {what}",
            self._put,
            {200: DocumentOut, 201: DocumentOut},
            body=resource.model,
            query=ExpectedVersion,
            faults=(409,),
        )
        yield Operation(
            "DELETE",
            one,
            f"Delete {what}",
            self._delete,
            {200: DeletedOut},
            query=ExpectedVersion,
            faults=(404, 409),
        )
        yield Operation(
            "GET",
            f"{one}/versions",
            f"Earlier versions of {what}",
            self._versions,
            {200: VersionsOut},
            faults=(404,),
        )
        yield Operation(
            "POST",
            f"{one}/rollback",
            f"Write an earlier version of {what} again",
            self._roll_back,
            {200: DocumentOut},
            query=Rollback,
            faults=(404, 409),
        )

    async def _list(self, call: Call) -> Answer:
        documents = self._config.documents(self._resource.kind)
        listed = [shown(name, documents[name], self._resource.masked) for name in sorted(documents)]
        return Answer(200, DocumentsOut(documents=listed, total=len(listed)))

    async def _get(self, call: Call) -> Answer:
        return Answer(200, shown(_name(call), self._held(_name(call)), self._resource.masked))

    async def _put(self, call: Call) -> Answer:
        name, body = _name(call), call.body
        before = self._config.get(self._resource.kind, name)
        value = body.model_dump(mode="json", exclude_unset=True)
        document = await self._write(name, value, call)
        return Answer(200 if before else 201, shown(name, document, self._resource.masked))

    async def _delete(self, call: Call) -> Answer:
        name, query = _name(call), call.query
        if not await self._writer.delete(self._resource.kind, name, call.by, ORIGIN, query.expected_version):
            raise self._missing(name)
        return Answer(200, DeletedOut(name=name))

    async def _versions(self, call: Call) -> Answer:
        name = _name(call)
        record, _ = self._config.record(self._resource.kind, name)
        if record is None:
            raise self._missing(name)
        past = record.history if record.deleted else (record.document, *record.history)
        return Answer(
            200,
            VersionsOut(
                deleted=record.deleted, versions=[shown(name, one, self._resource.masked) for one in past]
            ),
        )

    async def _roll_back(self, call: Call) -> Answer:
        name, wanted = _name(call), call.query.version
        record, _ = self._config.record(self._resource.kind, name)
        past = [one for one in (record.document, *record.history) if one.version == wanted] if record else []
        if not past or (record and record.deleted and record.version == wanted):
            text = f"there is no version {wanted} of {self._resource.what} {name!r}; see its versions"
            raise GatewayError("not_found", text, param="version")
        # What was right then may not be now: it has to pass the same model.
        value = validated(self._resource.model, past[0].value).model_dump(mode="json", exclude_unset=True)
        return Answer(200, shown(name, await self._write(name, value, call), self._resource.masked))

    async def _write(self, name: str, value: Any, call: Call) -> Document:
        expected = call.query.expected_version
        return await self._writer.put(self._resource.kind, name, value, call.by, ORIGIN, expected)

    def _held(self, name: str) -> Document:
        document = self._config.get(self._resource.kind, name)
        if document is None:
            raise self._missing(name)
        return document

    def _missing(self, name: str) -> GatewayError:
        text = f"there is no {self._resource.what} {name!r}" if name else f"there is no {self._resource.what}"
        return GatewayError("not_found", text, param="name")


def _name(call: Call) -> str:
    return call.params.get("name", "")
