"""What people write about routes, checked: the array of `--route-config`, the document of the admin API."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

LOCAL = "local"
MAX_ROUTES = 256
# In place of a key that is not shown.
MASK = "***"
MAX_WEIGHT = 1_000_000
_HEADER_LINE = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}(?::[\x20-\x7e]{0,256})?")
_HOST = re.compile(r"[A-Za-z0-9._:-]{1,253}")
_WORDS = {
    "missing": "is required",
    "extra_forbidden": "is no field of a route",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "string_type": "must be a string",
    "model_type": 'must be an object such as {"base_url": "local"}',
    "model_attributes_type": 'must be an object such as {"base_url": "local"}',
    "list_type": "must be an array of routes",
    "too_long": f"holds at most {MAX_ROUTES} routes",
}

Text = Annotated[str, Field(max_length=512, pattern=r"^[\x20-\x7e]*$")]
Policy = Literal["weight", "prefix"]


class RouteFaults(ValueError):
    """Everything that is wrong with a route configuration, one line a fault."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n  ".join(faults))


class RouteEntry(BaseModel):
    """One route: the fields of the reference gateways, and those below `prefix` that are Penstock's own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, hide_input_in_errors=True)

    base_url: str = Field(
        max_length=2048,
        description="`local`, or the URL of an external endpoint: `http(s)://host[:port][/path]`",
    )
    api_key: Text = Field(
        "", repr=False, description="sent to the endpoint as `Authorization: Bearer`; never shown again"
    )
    model: Text = Field("", description="the endpoint's name of the model; used with `rewrite_model` alone")
    fallback: bool = Field(False, description="whether the endpoint is in the fallback chain")
    weight: int | None = Field(None, ge=0, le=MAX_WEIGHT, description="its share under the policy `weight`")
    prefix: str | None = Field(
        None, min_length=1, max_length=512, description="model name, or its beginning and a `*`, or `*`"
    )
    name: Text = Field(
        "", max_length=128, description="name in headers, events and metrics; else `local`, or host and port"
    )
    rewrite_model: bool = Field(False, description="send `model` instead of the client's in JSON bodies")
    canary_header: str = Field(
        "", max_length=512, description="requests with this header (`name` or `name: value`) come here first"
    )
    canary_percent: float = Field(
        0.0,
        ge=0,
        le=100,
        allow_inf_nan=False,
        description="percent of users (the API key's owner, or the header `user`) that come here first",
    )
    forward_authorization: bool = Field(
        False, description="the endpoint has the same owner: send it the client's credentials"
    )

    @field_validator("base_url")
    @classmethod
    def _url(cls, text: str) -> str:
        if text == LOCAL:
            return text
        example = 'give "local" or http(s)://host[:port][/path]'
        if not text.isascii() or not text.isprintable() or " " in text:
            raise ValueError(f"is no http or https URL; {example}")
        try:
            url = urlsplit(text)
            port = url.port
        except ValueError as exc:
            raise ValueError(f"is no URL ({exc}); {example}") from None
        if url.scheme not in ("http", "https"):
            raise ValueError(f"is no http or https URL; {example}")
        if url.username is not None or url.password is not None:
            raise ValueError("holds credentials; give them as api_key")
        if not url.hostname or not _HOST.fullmatch(url.hostname) or port == 0:
            raise ValueError(f"has no valid host and port; {example}")
        if url.query or url.fragment or "?" in text or "#" in text:
            raise ValueError("has a query or a fragment; requests bring their own query")
        return text

    @field_validator("api_key")
    @classmethod
    def _key(cls, text: str) -> str:
        if text == MASK:
            raise ValueError("is the mask that stands for a key; give the key itself")
        return text

    @field_validator("canary_header")
    @classmethod
    def _header(cls, text: str) -> str:
        if text and not _HEADER_LINE.fullmatch(text):
            raise ValueError('is no header; give a name, or "name: value"')
        return text

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.base_url == LOCAL and (self.api_key or self.forward_authorization):
            raise ValueError("local takes no api_key and no forward_authorization; remove them")
        if self.api_key and self.forward_authorization:
            raise ValueError("api_key and forward_authorization exclude each other; give one")
        if self.rewrite_model and not self.model:
            raise ValueError("rewrite_model needs model, the name to send")
        if self.canary and self.weight:
            raise ValueError("a canary takes its own requests and no share; remove weight")
        return self

    @property
    def canary(self) -> bool:
        """Whether it takes the requests that ask for it, before policies are looked at."""
        return bool(self.canary_header or self.canary_percent)


class RouteDocument(BaseModel):
    """The routes as one document of live configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    policy: Policy = Field(description="how routes are chosen")
    routes: list[RouteEntry] = Field(max_length=MAX_ROUTES, description="in the order that breaks ties")

    @model_validator(mode="after")
    def _served(self) -> Self:
        if faults := list(_unreachable(self.policy, self.routes)):
            raise RouteFaults(faults)
        return self


def read(policy: str, text: str, where: str = "--route-config") -> RouteDocument:
    """The routes of a JSON array. Raises RouteFaults that name `where` and the field."""
    try:
        routes = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise RouteFaults(
            [f"{where}: is no JSON ({exc}); give an array of routes, or a file's path"]
        ) from None
    if not isinstance(routes, list):
        kind = type(routes).__name__
        raise RouteFaults([f'{where}: must be an array such as [{{"base_url": "local"}}], is a {kind}'])
    return document({"policy": policy, "routes": routes}, where)


def document(value: Any, where: str = "routes") -> RouteDocument:
    """The document of live configuration that `value` is. Raises RouteFaults."""
    try:
        return RouteDocument.model_validate(value)
    except ValidationError as exc:
        raise RouteFaults(
            [line for error in exc.errors() for line in _explain(error, value, where)]
        ) from None


def masked(value: Any) -> Any:
    """The value of a document without its keys, for people to see."""
    routes = value.get("routes") if isinstance(value, dict) else None
    if not isinstance(routes, list):
        return value
    return {
        **value,
        "routes": [
            {**route, "api_key": MASK} if isinstance(route, dict) and route.get("api_key") else route
            for route in routes
        ],
    }


def warnings(routes: Iterable[RouteEntry]) -> Iterator[str]:
    """What is right and does nothing."""
    for index, route in enumerate(routes):
        if route.base_url == LOCAL and route.fallback:
            yield f"route {index}: local is never a fallback, its fallback is ignored"


def _unreachable(policy: Policy, routes: list[RouteEntry]) -> Iterator[str]:
    for index, route in enumerate(routes):
        chained = route.fallback and route.base_url != LOCAL
        if route.canary or chained:
            continue
        if policy == "weight" and route.weight is None:
            yield f"[{index}].weight: is required with the policy weight unless fallback is true; 0: no share"
        if policy == "prefix" and route.prefix is None:
            yield f'[{index}].prefix: is required with the policy prefix unless fallback is true; "*": all'
    if routes and policy == "weight" and not any(route.weight or route.fallback for route in routes):
        yield ": no route has a weight above 0 and none is a fallback: nothing would be served"
    names = [route.name for route in routes if route.name]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f": more than one route has the name {name!r}; names are unique"


def _explain(error: Any, value: Any, where: str) -> Iterator[str]:
    """One error of pydantic as lines for people; a secret's value is not among them."""
    path, shown = "", value
    for step in error["loc"]:
        if step == "routes" and not path:
            shown = shown.get("routes")
            continue
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
        held = (isinstance(shown, dict) and step in shown) or (isinstance(shown, list) and step != "")
        shown = shown[step] if held else None
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, RouteFaults):
        yield from (f"{where}{fault}" for fault in cause.faults)
        return
    text = _WORDS.get(error["type"]) or str(error["msg"]).removeprefix("Value error, ")
    plain = isinstance(shown, int | float) or (isinstance(shown, str) and "@" not in shown)
    plain = plain and not path.endswith("api_key")
    got = f", got {shown!r:.200}" if plain and error["type"] != "extra_forbidden" else ""
    yield f"{where}{path}: {text[0].lower() + text[1:]}{got}"
