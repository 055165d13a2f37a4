"""The OpenAPI document of the admin API, out of the table of its operations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from penstock.ingress.admin.operations import ErrorBody, NoQuery, Operation
from penstock.ingress.failures import PHRASES

REF = "#/components/schemas/{model}"
# What every operation may answer beside its own: no token, a foreign host or origin, too large, no bus.
COMMON_FAULTS = (400, 401, 403, 404, 413, 503)


def document(operations: Iterable[Operation], version: str) -> dict[str, Any]:
    """OpenAPI 3.1 in plain JSON types."""
    operations = tuple(operations)
    models: set[type[BaseModel]] = {ErrorBody}
    for operation in operations:
        models.update(operation.answers.values())
        if operation.body is not None:
            models.add(operation.body)
    listed = sorted(models, key=lambda model: model.__name__)
    refs, schemas = models_json_schema([(model, "validation") for model in listed], ref_template=REF)
    names = {model.__name__: schema for (model, _), schema in refs.items()}
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, names)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock admin API", "version": version},
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas["$defs"],
        },
    }


def _operation(operation: Operation, names: Mapping[str, Any]) -> dict[str, Any]:
    answers = {
        str(status): _content(PHRASES[status], names[model.__name__])
        for status, model in operation.answers.items()
    }
    for status in sorted({*COMMON_FAULTS, *operation.faults}):
        answers[str(status)] = _content(PHRASES[status], names[ErrorBody.__name__])
    told: dict[str, Any] = {
        "operationId": _id(operation),
        "summary": operation.summary,
        "parameters": [*_in_path(operation), *_in_query(operation)],
        "responses": answers,
    }
    if operation.body is not None:
        told["requestBody"] = {
            "required": operation.body_required,
            "content": {"application/json": {"schema": names[operation.body.__name__]}},
        }
    return told


def _id(operation: Operation) -> str:
    words = re.findall(r"[A-Za-z0-9]+", operation.path.removeprefix("/admin"))
    return "_".join([operation.method.lower(), *words])


def _content(text: str, schema: Any) -> dict[str, Any]:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _in_path(operation: Operation) -> list[dict[str, Any]]:
    schema = {"type": "string", "minLength": 1, "maxLength": 512}
    return [
        {"name": name, "in": "path", "required": True, "schema": schema}
        for name in re.findall(r"\{(\w+)\}", operation.path)
    ]


def _in_query(operation: Operation) -> list[dict[str, Any]]:
    if operation.query is NoQuery:
        return []
    schema = operation.query.model_json_schema()
    required = schema.get("required", [])
    return [
        {"name": name, "in": "query", "required": name in required, "schema": field}
        for name, field in schema["properties"].items()
    ]
