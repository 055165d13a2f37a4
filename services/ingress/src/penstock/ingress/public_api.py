"""The OpenAPI document of the public API: the part of OpenAI's that is placed and relayed, as far as the
gateway reads it. What an instance reads of a body, and answers, is the instance's."""

from __future__ import annotations

from typing import Any

from penstock.ingress.failures import CODES, PHRASES
from penstock.ingress.openai import GENERATION_PATHS, MAX_MODEL_LENGTH, MULTIPART_PATHS
from penstock.ingress.owners import MAX_OWNER, NAMES

_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "param"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "code": {"type": "string", "enum": list(CODES)},
                "param": {"type": ["string", "null"]},
            },
        }
    },
}
# Text that a header carries unchanged.
_HEADER = {"type": "string", "maxLength": 512, "pattern": r"^[!-~]([ -~]*[!-~])?$"}
_HEADERS = (
    "routing-strategy",
    "config-profile",
    "user",
    "x-owned-by",
    "x-engine",
    "x-inference-server",
    "x-session-id",
    "x-priority",
)
_FAULTS = (400, 401, 404, 405, 408, 413, 429, 431, 502, 503, 504)
_OWNER = {"type": ["string", "null"], "maxLength": MAX_OWNER}
# What the field of the prompt holds, as far as it is looked at.
_PROMPTS: dict[str, Any] = {
    "messages": {"type": "array", "minItems": 1, "items": {"type": "object"}},
    "prompt": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1}]},
    "input": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "array", "minItems": 1}]},
    "documents": {"type": "array", "minItems": 1},
}


def public_document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1 in plain JSON types."""
    paths: dict[str, Any] = {}
    for raw, (field, required) in GENERATION_PATHS.items():
        paths[raw.decode()] = {"post": _relayed(raw.decode(), "application/json", _body(field, required))}
    for path in sorted(name.decode() for name in MULTIPART_PATHS):
        form = {"type": "object", "required": ["model"], "properties": {"model": _model()}}
        paths[path] = {"post": _relayed(path, "multipart/form-data", form)}
    paths["/v1/models"] = {"get": _told("List live models by owner", {"type": "object"}, [_query(NAMES[0])])}
    for path, summary in (
        ("/health", "Whether the process runs"),
        ("/healthz", "The same"),
        ("/readyz", "Whether requests can be taken"),
    ):
        paths[path] = {"get": _told(summary, {"type": "object"}, [])}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Penstock", "version": version},
        "paths": paths,
        "components": {"schemas": {"Error": _ERROR}},
    }


def _model() -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": MAX_MODEL_LENGTH}


def _body(field: str | None, required: bool) -> dict[str, Any]:
    properties: dict[str, Any] = {
        "model": _model(),
        "stream": {"type": ["boolean", "null"]},
        "max_tokens": {"type": ["integer", "null"]},
        **dict.fromkeys(NAMES, _OWNER),
    }
    if field is not None:
        properties[field] = _PROMPTS[field]
    wanted = ["model", field] if field is not None and required else ["model"]
    return {"type": "object", "required": wanted, "properties": properties}


def _relayed(path: str, kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    headers = [{"name": name, "in": "header", "schema": _HEADER} for name in _HEADERS]
    answers = {
        "200": {
            "description": "What the instance answered",
            "content": {"application/json": {}, "text/event-stream": {}},
        },
        "default": {"description": "What the instance answered, or an error of the gateway"},
    }
    return {
        "operationId": "_".join(["post", *path.removeprefix("/v1/").split("/")]),
        "summary": "Placed on an instance of the model, and relayed",
        "parameters": [*headers, *map(_query, NAMES)],
        "requestBody": {"required": True, "content": {kind: {"schema": schema}}},
        "responses": answers | {str(status): _error(status) for status in _FAULTS},
    }


def _told(summary: str, schema: dict[str, Any], parameters: list[dict[str, Any]]) -> dict[str, Any]:
    answers: dict[str, Any] = {
        "200": {"description": "OK", "content": {"application/json": {"schema": schema}}}
    }
    return {
        "summary": summary,
        "parameters": parameters,
        "responses": answers | {str(status): _error(status) for status in (400, 405, 431, 503)},
    }


def _query(name: str) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": {"type": "string", "maxLength": MAX_OWNER}}


def _error(status: int) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"description": PHRASES[status], "content": content}
