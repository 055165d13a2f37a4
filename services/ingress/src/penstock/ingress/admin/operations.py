"""One operation of the admin API: everything that is said of it, for the router and the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from penstock.ingress.admin_messages import AdminRequest
from penstock.ingress.failures import GatewayError

# A value of the configuration bucket, and what stands around it.
MAX_BODY_BYTES = 256 * 1024
MAX_QUERY_FIELDS = 16
MAX_NAME = 512
_CONTROL = re.compile(r"[\x00-\x1f\x7f]|[\ud800-\udfff]")


class Strict(BaseModel):
    """Base of everything that people send: no unknown fields, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NoQuery(Strict):
    """An operation without query parameters."""


class NoBody(Strict):
    """An operation without a body: nothing, or an empty object."""


class ErrorDetail(BaseModel):
    """What is wrong; `param` names the field."""

    message: str
    type: str
    code: str
    param: str | None = None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


@dataclass(frozen=True)
class Call:
    """A request that fits an operation: `params` out of the path, `query` and `body` validated, `by` who asks
    as far as is known, `raw` the body as it came."""

    params: Mapping[str, str]
    query: Any
    body: Any
    by: str
    raw: bytes = b""


@dataclass(frozen=True)
class Answer:
    """What an operation answers."""

    status: int
    content: BaseModel | Mapping[str, Any]


@dataclass(frozen=True)
class Operation:
    """`path` holds `{names}` of segments; `answers` the statuses of success, `faults` those of errors beside
    the ones that every operation has."""

    method: str
    path: str
    summary: str
    handler: Callable[[Call], Awaitable[Answer]]
    answers: Mapping[int, type[BaseModel]]
    body: type[BaseModel] | None = None
    body_required: bool = True
    query: type[BaseModel] = NoQuery
    faults: tuple[int, ...] = ()

    def match(self, segments: list[str]) -> dict[str, str] | None:
        """The segments of a path that fill this one's names; None if it is another path."""
        own = self.path.split("/")
        if len(own) != len(segments):
            return None
        params = {}
        for mine, theirs in zip(own, segments, strict=True):
            if mine.startswith("{"):
                params[mine.strip("{}")] = theirs
            elif mine != theirs:
                return None
        return params

    def call(self, request: AdminRequest, params: Mapping[str, str], by: str) -> Call:
        """Raises GatewayError that names the field."""
        for name, text in params.items():
            if not 0 < len(text) <= MAX_NAME or _CONTROL.search(text):
                fault = f"{name} has 1 to {MAX_NAME} characters, none of them a control character"
                raise GatewayError("invalid_request", fault, param=name)
        query = validated(self.query, _query_of(request.target))
        body = None
        if request.body or (self.body is not None and self.body_required):
            body = validated(self.body or NoBody, request.body)
        return Call(params, query, body, by, request.body)


def segments_of(path: str) -> list[str]:
    """The path's segments, unescaped one by one: an escaped slash stays within its segment. Raises
    GatewayError."""
    try:
        return [unquote(segment, errors="strict") for segment in path.split("/")]
    except UnicodeDecodeError:
        raise GatewayError("invalid_request", "the path is not UTF-8", param="path") from None


def _query_of(target: str) -> dict[str, str]:
    text = target.partition("?")[2]
    try:
        pairs = parse_qsl(
            text, keep_blank_values=True, max_num_fields=MAX_QUERY_FIELDS, errors="strict", separator="&"
        )
    except ValueError as exc:
        raise GatewayError("invalid_request", f"the query cannot be read: {exc}", param="query") from None
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise GatewayError("invalid_request", "a query parameter is given twice", param="query")
    return fields


def validated(model: type[BaseModel], content: Any) -> BaseModel:
    """`content`, JSON if it is bytes, as a `model`. Raises GatewayError that names the field."""
    try:
        if isinstance(content, bytes):
            return model.model_validate_json(content)
        return model.model_validate(content)
    except ValidationError as exc:
        faults = exc.errors(include_url=False, include_context=False, include_input=False)
        places = [".".join(map(str, fault["loc"])) for fault in faults]
        text = "; ".join(
            f"{place or 'the body'}: {fault['msg']}" for place, fault in zip(places, faults, strict=True)
        )
        raise GatewayError("invalid_request", text[:2000], param=places[0] or None) from None
    except (RecursionError, UnicodeError, ValueError) as exc:
        raise GatewayError("invalid_request", f"the body cannot be read: {exc}"[:2000]) from None


class ExpectedVersion(Strict):
    """A change that is only made over a known version."""

    expected_version: int | None = Field(
        None,
        ge=0,
        le=2**53,
        description="the version that the document must have, 0 for none; a conflict is answered with 409",
    )
